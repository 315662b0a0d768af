"""Pictures of the studies of meta-vote pruning, each from the plain dict that a study saves as JSON.

Groups of similarity are "1" (nearest) to "5" (farthest), and "all". Any number may be null and any group missing: what
is not there is not drawn. Spreads are standard deviations over target tasks. IoU, b(a) and accuracies are shares of 1,
as everywhere in gmn; the pictures show accuracies in per cent. `gmn.plots.save_figure` saves them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, takewhile
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

from gmn.errors import GmnError

Study = Mapping[str, Any]
WIDTH = 9  # inches, 1,080 pixels
MOST_TICKS = 60  # names of layers that fit side by side
LONGEST_NAME = 24  # characters of a layer's name at a tick
LONGEST_LABEL = 26  # characters of a line of a legend
MOST_LABELLED = 16  # bars with their value on top
TITLE = 68  # characters of a line of the title, which ends before the legend
COLUMNS = 5  # of panels
GAP = 0.05  # votes between two series' error bars, which would hide each other


class Look(NamedTuple):
    """How a series is drawn; its marker tells it apart in print without colours."""

    label: str
    colour: str
    marker: str


# Plasma without its pale end: lightness and hue both change from near to far, for colour-blind readers too.
GROUPS = {
    "1": Look("1 (nearest)", "#0d0887", "o"),
    "2": Look("2", "#7e03a8", "s"),
    "3": Look("3", "#cc4778", "D"),
    "4": Look("4", "#f07f4f", "^"),
    "5": Look("5 (farthest)", "#f2b134", "v"),
    "all": Look("all", "#444444", "P"),
}
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#444444")  # Okabe and Ito
MARKERS = "osD^vPX*"
DASH_DOT_DOT: Any = (0, (6, 2, 1, 2, 1, 2))
REFERENCES = (("#000000", "--"), ("#777777", "-."), ("#444444", ":"), ("#000000", DASH_DOT_DOT))
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
ERRORS: dict[str, Any] = {"capsize": 2.5, "elinewidth": 0.9, "markersize": 4.5, "linewidth": 1.5}


# -- one per study -----------------------------------------------------------------------------------------------------


def iou_figure(study: Study) -> Figure:
    """IoU of kept channels per layer, a line with a band of one standard deviation per similarity group.

    Args:
        study: {"title", "layers": [L names], "groups": {"1": {"mean": [L], "std": [L], "pairs": int}, ...}}.

    Raises:
        GmnError: A list of another length, or an unknown group.

    Source: MVP, figures 1 and 2; MVP-SSL, figure 3.
    """
    figure = _figure(study, 4.8)
    axes = figure.add_subplot()
    names, groups = study["layers"], _groups(study)
    places = range(len(names))
    for look, group in groups:
        mean, low, high = _band(group, "mean", "std", len(names))
        pairs = f": {group['pairs']:,} pairs" if group.get("pairs") else ""
        axes.fill_between(places, low, high, color=look.colour, alpha=0.13, linewidth=0)
        axes.plot(places, mean, color=look.colour, marker=look.marker, markersize=4.5, label=look.label + pairs)
    axes.set(xlabel="layer, from input to output", ylabel="IoU of the kept channels")
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))
    _layer_ticks(axes, names)
    _finish(figure, axes, "similarity group")
    return figure


def recall_figure(study: Study) -> Figure:
    """Left b(a), the share of channels with a votes that the target keeps; right d(a), how many of its own have a.

    Args:
        study: {"title", "neighbours": A, "groups": {"all": {"b_mean": [A], "b_std": [A], "d_mean": [A + 1]}, ...}}.

    Raises:
        GmnError: A list of another length, or an unknown group.

    Source: MVP-SSL, figure 4.
    """
    figure = _figure(study, 4.4)
    left, right = figure.subplots(1, 2)
    neighbours, groups = int(study["neighbours"]), _groups(study)
    for place, (look, group) in enumerate(groups):
        shift = place - (len(groups) - 1) / 2
        votes = [a + GAP * shift for a in range(1, neighbours + 1)]
        b, _, _ = _band(group, "b_mean", "b_std", neighbours)
        std = _numbers(group, "b_std", neighbours)
        left.errorbar(votes, b, std, color=look.colour, marker=look.marker, label=look.label, **ERRORS)
        width = 0.84 / len(groups)
        d = _numbers(group, "d_mean", neighbours + 1)
        right.bar([a + width * shift for a in range(neighbours + 1)], d, width, color=look.colour)
    left.set(xlabel=_votes(neighbours), ylabel="b(a): share of channels that the target keeps", ylim=(-0.02, 1.02))
    right.set(xlabel=_votes(neighbours), ylabel="d(a): channels of the target, mean")
    for axes, first in ((left, 1), (right, 0)):
        axes.set_xlim(first - 0.6, neighbours + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11))
    right.grid(axis="y", alpha=0.3)
    right.set_axisbelow(True)
    _finish(figure, left, "similarity group")
    return figure


def recall_layers_figure(study: Study) -> Figure:
    """b(a) of every layer, a panel each, on the same axes.

    Args:
        study: {"title", "neighbours": A, "layers": {name: {"b_mean": [A], "b_std": [A] or missing}}}.

    Raises:
        GmnError: A list of another length.

    Source: MVP-SSL, figure 8.
    """
    layers, neighbours = study["layers"], int(study["neighbours"])
    rows = max(1, math.ceil(len(layers) / COLUMNS))
    figure = _figure(study, 1.1 + 1.55 * rows)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    votes, look = range(1, neighbours + 1), GROUPS["1"]
    titles = zip(panels, _short(list(layers)), layers.values(), strict=False)
    for place, (axes, name, layer) in enumerate(titles):
        mean, low, high = _band(layer, "b_mean", "b_std", neighbours)
        axes.fill_between(votes, low, high, color=look.colour, alpha=0.15, linewidth=0)
        axes.plot(votes, mean, color=look.colour, marker=look.marker, markersize=3, linewidth=1.2)
        axes.set_title(name, fontsize=8)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8, labelbottom=place + COLUMNS >= len(layers))  # the lowest of its column
    for axes in panels[len(layers) :]:
        axes.remove()
    if layers:
        panels[0].set(xlim=(0.5, neighbours + 0.5), ylim=(-0.05, 1.05))
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    figure.supxlabel(_votes(neighbours), fontsize=10)
    figure.supylabel("b(a): share of channels that the target keeps", fontsize=10)
    return figure


def lines_figure(study: Study) -> Figure:
    """Accuracy in per cent against x, a line with bars of one standard deviation per method.

    Args:
        study: {"title", "xlabel", "log": bool, "x_ticks": null or [..], "series": {name: {"x", "mean", "std"}},
            "references": {name: accuracy}}; references are dashed, the last three keys but "series" may be missing.

    Raises:
        GmnError: Lists of different lengths, or an accuracy that is no share of 1.

    Source: MVP, figures 4a and 5b.
    """
    figure = _figure(study, 4.8)
    axes = figure.add_subplot()
    colours, markers = cycle(PALETTE), cycle(MARKERS)
    for name, series in study["series"].items():
        x = [float(value) for value in series["x"]]
        mean, std = _accuracies(series, "mean", len(x), name), _numbers(series, "std", len(x))
        axes.errorbar(x, mean, std, color=next(colours), marker=next(markers), label=_wrapped(name), **ERRORS)
    _references(axes, study)
    if study.get("log"):
        _log_axis(axes, [value for series in study["series"].values() for value in series["x"]])
    if study.get("x_ticks"):
        axes.xaxis.set_major_locator(FixedLocator(study["x_ticks"]))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel=study["xlabel"], ylabel="accuracy (per cent)")
    _finish(figure, axes, None, percent=True)
    return figure


def bars_figure(study: Study) -> Figure:
    """Accuracy in per cent per similarity group, a bar per series, from 0.

    Args:
        study: {"title", "xlabel", "groups": [G names], "series": {name: {"mean": [G], "std": [G]}},
            "references": {name: accuracy} or missing}.

    Raises:
        GmnError: A list of another length, or an accuracy that is no share of 1.

    Source: MVP, figure 4b.
    """
    figure = _figure(study, 4.8)
    axes = figure.add_subplot()
    groups, series, colours = study["groups"], study["series"], cycle(PALETTE)
    width = 0.84 / max(len(series), 1)
    for place, (name, values) in enumerate(series.items()):
        mean, std = _accuracies(values, "mean", len(groups), name), _numbers(values, "std", len(groups))
        places = [at + width * (place - (len(series) - 1) / 2) for at in range(len(groups))]
        errors = {"elinewidth": 0.9, "capsize": 2.5}
        bars = axes.bar(places, mean, width, yerr=std, color=next(colours), label=_wrapped(name), error_kw=errors)
        if len(series) * len(groups) <= MOST_LABELLED:
            axes.bar_label(bars, fmt=lambda share: f"{100 * share:.1f}", fontsize=8, padding=3, bbox=LABEL_BOX)
    _references(axes, study)
    axes.set(xlabel=study["xlabel"], ylabel="accuracy (per cent)")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, max(len(groups), 1) - 0.4)
    axes.set_ylim(bottom=0)
    _finish(figure, axes, None, percent=True)
    axes.grid(visible=False, axis="x")
    return figure


# -- what they share ---------------------------------------------------------------------------------------------------


def _groups(study: Study) -> list[tuple[Look, Mapping[str, Any]]]:
    """The study's groups from near to far, "all" last; without those where there is nothing to draw."""
    unknown = sorted(set(study["groups"]) - set(GROUPS))
    if unknown:
        raise GmnError("unknown group of similarity", expected=", ".join(GROUPS), got=", ".join(unknown))
    found = [(look, study["groups"].get(name) or {}) for name, look in GROUPS.items()]
    return [(look, group) for look, group in found if any(_some(values) for values in group.values())]


def _some(values: Any) -> bool:
    return isinstance(values, Sequence) and any(value is not None for value in values)


def _numbers(entry: Mapping[str, Any], key: str, length: int) -> list[float]:
    """The list under a key, NaN for null; all NaN where the key is missing."""
    values = entry.get(key)
    if values is None:
        return [math.nan] * length
    if len(values) != length:
        raise GmnError("a study's list has the wrong length", expected=str(length), got=str(len(values)), where=key)
    return [math.nan if value is None else float(value) for value in values]


def _band(entry: Mapping[str, Any], mean: str, std: str, length: int) -> tuple[list[float], list[float], list[float]]:
    """Mean, and one standard deviation below and above."""
    middle, spread = _numbers(entry, mean, length), _numbers(entry, std, length)
    pairs = list(zip(middle, spread, strict=True))
    return middle, [m - s for m, s in pairs], [m + s for m, s in pairs]


def _accuracies(entry: Mapping[str, Any], key: str, length: int, where: str) -> list[float]:
    values = _numbers(entry, key, length)
    wrong = [value for value in values if value < 0 or value > 1]
    if wrong:
        raise GmnError("an accuracy is no share of 1", expected="0 to 1", got=f"{wrong[0]:g}", where=where)
    return values


def _references(axes: Axes, study: Study) -> None:
    """Broken lines across the picture, grey: apart from every series."""
    for (name, value), (grey, style) in zip((study.get("references") or {}).items(), cycle(REFERENCES), strict=False):
        [height] = _accuracies({"value": [value]}, "value", 1, name)
        if not math.isnan(height):
            axes.axhline(height, color=grey, linestyle=style, linewidth=1.2, label=_wrapped(name))


def _log_axis(axes: Axes, xs: Sequence[float]) -> None:
    """A logarithmic x axis that also has a place for 0: a network before its first step."""
    positive = [value for value in xs if value > 0]
    if len(positive) == len(xs):
        axes.set_xscale("log")
        return
    lowest = min(positive, default=1)
    axes.set_xscale("symlog", linthresh=lowest, linscale=0.5)
    axes.set_xlim(left=min(xs) - 0.15 * lowest)


def _votes(neighbours: int) -> str:
    return f"votes a, of {neighbours} neighbours"


def _layer_ticks(axes: Axes, names: Sequence[str]) -> None:
    step = max(1, math.ceil(len(names) / MOST_TICKS))
    shown = _short(names)[::step]
    angle, align, size = (45, "top", 8) if len(shown) <= 24 else (90, "center", 8 if len(shown) <= 40 else 6.5)
    axes.set_xticks(range(0, len(names), step), shown, fontsize=size)
    axes.tick_params(axis="x", rotation=angle)
    for label in axes.get_xticklabels():
        label.set(ha="right", va=align, rotation_mode="anchor")


def _short(names: Sequence[str]) -> list[str]:
    """Names that fit: without the modules that all layers are in, and those still too long with shorter parts."""
    if max(map(len, names), default=0) <= LONGEST_NAME:
        return list(names)
    parts = [name.split(".") for name in names]
    shared = len(list(takewhile(lambda modules: len(set(modules)) == 1, zip(*(p[:-1] for p in parts), strict=False))))
    return [("…" if shared else "") + _abbreviated(part[shared:]) for part in parts]


def _abbreviated(parts: Sequence[str]) -> str:
    """A name whose numbers stay: they tell layers apart."""
    name = ".".join(parts)
    return name if len(name) < LONGEST_NAME else ".".join([*(module[:4] for module in parts[:-1]), parts[-1]])


def _wrapped(label: str) -> str:
    return textwrap.fill(label, LONGEST_LABEL)


def _figure(study: Study, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(study["title"], TITLE), x=0.01, ha="left", fontsize=12)
    return figure


def _finish(figure: Figure, axes: Axes, legend: str | None, *, percent: bool = False) -> None:
    """Grid, format of accuracies, and the legend beside the axes, where it hides no data."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    pairs = list(zip(*axes.get_legend_handles_labels(), strict=True))
    pairs.sort(key=lambda pair: not isinstance(pair[0], Container))  # series before references
    if pairs:
        figure.legend(*zip(*pairs, strict=True), loc="outside right upper", title=legend, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
