"""Pictures of a run: accuracy against speed-up, the finished networks, and the course of meta-training."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker

from gmn.checkpoint import write_atomic
from gmn.compare import summarise, tables_of
from gmn.report import row_title, targets

COLOURS = {
    **{"base": "#444444", "metanetwork": "#0072b2", "same-schedule": "#e69f00", "direct": "#d55e00"},
    **{"sparse": "#009e73", "torch-pruning": "#cc79a7", "torch-pruning-sparse": "#56b4e9", "random": "#999999"},
}
CURVES = {"with metanetwork": COLOURS["metanetwork"], "without": COLOURS["same-schedule"]}
OUTSIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}  # a legend that covers no lines
MARKERS = dict(zip(COLOURS, ("_", "o", "s", "D", "^", "v", "P", "x"), strict=True))
LABELLED = [("#882255", "*"), ("#f0c000", "h"), ("#332288", "<"), ("#117733", ">"), ("#aa4499", "p"), ("#000000", "X")]


def styles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every row; rows with a metanetwork are solid lines."""
    found = {row: {"color": COLOURS[row], "marker": MARKERS[row], "linestyle": "--"} for row in COLOURS}
    found["metanetwork"]["linestyle"] = "-"
    for place, label in enumerate(report.get("metanetworks", {})):
        colour, marker = LABELLED[place % len(LABELLED)]
        found[label] = {"color": colour, "marker": marker, "linestyle": "-"}
    return found


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all plots of a report as PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [curve(report, folder / "curve.png"), accuracy(report, folder / "accuracy.png")]
    if len(tables_of(report)) > 1:
        paths.append(speed_ups(report, folder / "speed-ups.png"))
    if report["meta_train"]:
        paths.append(meta_training(report, folder / "meta-training.png"))
    return paths


def curve(report: dict[str, Any], path: Path) -> Path:
    """Validation accuracy against speed-up before fine-tuning: how easy the network is to prune."""
    own = styles(report)
    tuned = [name for name in report["curve"] if name in own]  # rows, after their first fine-tuning
    figure = matplotlib.figure.Figure(figsize=(9, 4.5) if tuned else (6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in report["curve"].items():
        if name in tuned:
            style = {**own[name], "label": f"{row_title(name)}, fine-tuned"}
        else:
            colour = CURVES.get(name) or own[name.removeprefix("with ")]["color"]
            style = {"color": colour, "label": name, "marker": "" if tuned else "o", "linestyle": ":" if tuned else "-"}
        axes.plot(*zip(*points, strict=True), **style)
    weights = "pattern" in report
    for place, part in enumerate(parts := tables_of(report)):
        aim = report["results"][0]["parameters"] / report["base"]["parameters"] if weights else part["speed_up"]
        axes.axvline(aim, color="0.7", linestyle="--", label=None if place else f"target {targets(parts)}")
    axes.set_title(f"{report['recipe']}: pruned, not yet fine-tuned{' after it' if tuned else ''}")
    return _finish(figure, _against(axes, weights), path, **(OUTSIDE if tuned else {}))


def curves(content: dict[str, Any], title: str, path: Path) -> Path:
    """Validation accuracy against speed-up of several checkpoints, with the turning point of each."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    shades = matplotlib.colormaps["viridis"].resampled(max(2, len(content["curves"])))
    for number, entry in enumerate(content["curves"]):
        name = f"checkpoint {entry['checkpoint']}" if entry["checkpoint"] else "no metanetwork"
        colour = CURVES["without"] if not entry["checkpoint"] else shades(number)
        axes.plot(*zip(*entry["points"], strict=True), marker=".", color=colour, label=name)
        if entry["turning_point"]:
            axes.plot(entry["turning_point"], content["threshold"], marker="D", color=colour)
    axes.axhline(content["threshold"], color="0.7", linestyle="--", label=f"{content['threshold']:.1%}")
    tuned = f", {content['finetune_images']:,} images of fine-tuning" if content["finetune_images"] else ""
    axes.set_title(f"{title}: how easy to prune{tuned}")
    return _finish(figure, _against(axes, content["axis"] != "speed-up"), path)


def _against(axes: Any, weights: bool) -> Any:
    """Accuracy against the speed-up, or against the parameters that are left where single weights go."""
    axes.set(xlabel="speed-up (FLOPs before / after)", ylabel="validation accuracy", xscale="log")
    ticks, form = [1, 1.5, 2, 3, 4, 6, 8, 12, 16], matplotlib.ticker.FormatStrFormatter("%gx")
    if weights:
        axes.set(xlabel="parameters left (not zero / all)")
        axes.invert_xaxis()  # as with speed-ups, what is smaller lies to the right
        ticks, form = [1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02], matplotlib.ticker.PercentFormatter(1.0)
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter(form)
    return axes


def size(report: dict[str, Any]) -> str:
    """What networks are drawn against: FLOPs, or the parameters that are not zero where single weights go."""
    return "parameters" if "pattern" in report else "FLOPs"


def accuracy(report: dict[str, Any], path: Path) -> Path:
    """Test accuracy of every finished network against its size, a point per seed."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes, key = figure.add_subplot(), size(report).lower()
    label = {"flops": "FLOPs (multiply-adds)", "parameters": "parameters that are not zero"}[key]
    axes.scatter(report["base"][key], report["base"]["test_accuracy"], color=COLOURS["base"], label="base")
    results, own = [result for part in tables_of(report) for result in part["results"]], styles(report)
    for row in dict.fromkeys(result["row"] for result in results):
        points = [(r[key], r["test_accuracy"]) for r in results if r["row"] == row]
        axes.scatter(*zip(*points, strict=True), color=own[row]["color"], label=row_title(row))
    axes.set(xlabel=label, ylabel="test accuracy", title=f"{report['recipe']}: finished networks")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    return _finish(figure, axes, path)


def speed_ups(report: dict[str, Any], path: Path) -> Path:
    """Test accuracy of every finished row against its speed-up: mean over seeds, and their spread as error bars."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    base, parts, own = report["base"]["test_accuracy"], tables_of(report), styles(report)
    axes.axhline(base, color=COLOURS["base"], linestyle=":", label=f"base, {base:.1%}")
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for entry in (entry for part in parts for entry in summarise(part)[1:]):
        lines.setdefault(entry["row"], []).append((entry["speed_up"], entry["test_accuracy"], entry["spread"]))
    for row, points in lines.items():
        reached, accuracies, spreads = zip(*points, strict=True)
        axes.errorbar(reached, accuracies, yerr=spreads, capsize=3, label=row_title(row), **own[row])
    axes.set(xlabel="speed-up (FLOPs before / after)", ylabel="test accuracy")
    axes.set_title(f"{report['recipe']}: finished networks")
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([part["speed_up"] for part in parts]))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%gx"))
    return _finish(figure, axes, path, **OUTSIDE)


def meta_training(report: dict[str, Any], path: Path) -> Path:
    """Both losses, and the norms of their gradients with respect to the new parameters, by epoch."""
    figure = matplotlib.figure.Figure(figsize=(11, 3.5), layout="constrained")
    epochs = [entry["epoch"] for entry in report["meta_train"]]
    for place, keys in enumerate((("loss",), ("sparsity",), ("accuracy_gradient", "sparsity_gradient"))):
        axes = figure.add_subplot(1, 3, place + 1)
        for key in keys:
            axes.plot(
                epochs, [entry.get(key, nan) for entry in report["meta_train"]], marker="o", label=key.replace("_", " ")
            )
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report['recipe']}: meta-training")
    return save_figure(figure, path)


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> Path:
    """Write a picture as PNG, whole or not at all; returns its path."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    return path


def _finish(figure: matplotlib.figure.Figure, axes: Any, path: Path, **legend: Any) -> Path:
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(**legend)
    return save_figure(figure, path)
