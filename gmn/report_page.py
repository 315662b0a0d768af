"""The page of a run with a metanetwork: tables, pictures and what made them, in one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmn.baselines import DIGEST
from gmn.checkpoint import load_json
from gmn.compare import STATISTICS, tables_of
from gmn.page import Picture, Section, Table, origin, write_page
from gmn.plots import draw, size
from gmn.report import caption, cells, measure, targets, title
from gmn.statistics_plots import by_layer, distributions

CURVE = "Pruned step by step and read on validation images, without fine-tuning: the flatter, the easier to prune."
TUNED = " Rows that say so were fine-tuned before it, as the recipe says."
MEASURED = (
    "Every layer's weights before and after the metanetwork, not fine-tuned. Sensitivity is |w dL/dw|, what the "
    "loss gains, to first order, when the weight becomes zero; correlation is that of the rows of two output channels; "
    "the effective rank is the exponential of the entropy of the singular values."
)


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write report.html of a finished run, and the pictures in it."""
    pictures = {path.stem: path for path in draw(report, folder / "plots")}
    parts = tables_of(report)
    columns = ("network", "test %", "validation %", "FLOPs", measure(report), "parameters", "latency, ms")
    finished = {
        "speed-ups": "Test accuracy and speed-up: mean and spread over seeds",
        "accuracy": f"Accuracy and {size(report)}",
    }
    said = [f" Pruned to {targets([part])}." for part in parts] if len(parts) > 1 else [""]
    sections = [
        Section(
            "Networks",
            caption(report),
            [
                Table(columns, cells(part), f"One line per way to prune.{own}")
                for part, own in zip(parts, said, strict=True)
            ],
            [Picture(pictures[stem], text) for stem, text in finished.items() if stem in pictures],
        ),
        Section(
            "How easy to prune",
            CURVE + (TUNED if _tuned(report) else ""),
            pictures=_curves(folder, pictures["curve"], measure(report)),
        ),
        *_learning(report, pictures),
        *_statistics(report, folder),
        *origin(folder),
    ]
    return write_page(folder / "report.html", title(parts), sections)


def _tuned(report: dict[str, Any]) -> bool:
    return any(not name.startswith(("with ", "without")) for name in report["curve"])


def _curves(folder: Path, own: Path, against: str) -> list[Picture]:
    against = {"left": "the parameters left"}.get(against, against)
    pictures = [Picture(own, f"Accuracy against {against}, with the chosen metanetwork and without")]
    more = folder / "curves" / "curve.png"
    return [*pictures, Picture(more, "The checkpoints of gmn curve")] if more.is_file() else pictures


def _learning(report: dict[str, Any], pictures: dict[str, Path]) -> list[Section]:
    if not report["meta_train"]:
        return []  # the metanetwork came from another run
    looks = sorted(report["select"], key=lambda look: look["epoch"])
    rows = [[str(look["epoch"]), f"{100 * look['validation_accuracy']:.2f}"] for look in looks]
    table = Table(("checkpoint", "validation %"), rows, "Pruned, before the last fine-tuning; 0 is no metanetwork.")
    picture = Picture(pictures["meta-training"], "Losses and gradients by epoch")
    return [Section("Meta-training", tables=[table], pictures=[picture])]


def _statistics(report: dict[str, Any], folder: Path) -> list[Section]:
    if not (folder / STATISTICS).is_file():
        return []  # a run of an older gmn
    statistics = load_json(folder / STATISTICS)
    if statistics.pop(DIGEST, None) != report.get(DIGEST):
        return []  # a run that goes on with another metanetwork was stopped before its report
    drawn = [
        Picture(by_layer(statistics, report["recipe"], folder / "plots" / "statistics.png"), "Five measures by layer"),
        Picture(
            distributions(statistics, report["recipe"], folder / "plots" / "channels.png"), "Channels of a few layers"
        ),
    ]
    return [Section("What the metanetwork did to the weights", MEASURED, pictures=drawn)]
