"""Pictures of what a metanetwork did to the weights (GMN, figures 7 and 13 to 15): before in orange, after in blue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gmn.plots import COLOURS, save_figure
from gmn.weight_statistics import MEASURES

Statistics = dict[str, list[dict[str, Any]]]
SIDES = {"before": COLOURS["same-schedule"], "after": COLOURS["metanetwork"]}
NAMES = {
    "l1": "mean |w|",
    "l2": "mean l2 norm of a channel",
    "sensitivity": "mean sensitivity |w dL/dw|",
    "correlation": "mean |correlation| of channels",
    "rank": "effective rank",
}
SHOWN = 4  # layers whose distributions are drawn
BINS = 24


def by_layer(statistics: Statistics, title: str, path: Path) -> Path:
    """Every measure by layer, in the order of the network."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    for place, measure in enumerate(MEASURES):
        axes = figure.add_subplot(2, 3, place + 1)
        for side, colour in SIDES.items():
            values = [layer[measure] for layer in statistics[side]]
            axes.plot(range(1, len(values) + 1), values, marker=".", color=colour, label=side)
        axes.set(xlabel="layer", title=NAMES[measure])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"{title}: the weights before and after the metanetwork, not fine-tuned")
    return save_figure(figure, path)


def distributions(statistics: Statistics, title: str, path: Path) -> Path:
    """How l2 norm and sensitivity are spread over the channels of a few layers, from first to last."""
    count = len(statistics["before"])
    chosen = sorted({round(place * (count - 1) / (SHOWN - 1)) for place in range(SHOWN)})
    figure = Figure(figsize=(12, 5), layout="constrained")
    for row, (key, name) in enumerate((("channel_l2", "l2 norm"), ("channel_sensitivity", "sensitivity"))):
        for column, layer in enumerate(chosen):
            axes = figure.add_subplot(2, len(chosen), row * len(chosen) + column + 1)
            sides = {side: statistics[side][layer][key] for side in SIDES}
            most = max(max(values) for values in sides.values()) or 1.0
            for side, values in sides.items():
                axes.hist(values, bins=BINS, range=(0, most), color=SIDES[side], alpha=0.6, label=side)
            axes.set(xlabel=f"{name} of a channel", ylabel="channels" if not column else "")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            if not row:
                axes.set_title(statistics["before"][layer]["layer"])
    figure.axes[0].legend()
    figure.suptitle(f"{title}: channels before and after the metanetwork")
    return save_figure(figure, path)
