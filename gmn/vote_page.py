"""The page of a vote run: its table, its pictures, its studies, and what made them, in one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmn.checkpoint import load_json
from gmn.page import Picture, Section, Table, origin, write_page
from gmn.run import load_report, open_run
from gmn.vote_report import COLUMNS, accuracies, caption, cells

MEANINGS = {
    "iou": "Intersection over union of the units that two tasks of the zoo keep, per layer, by their similarity.",
    "recall": "Left: the share of units with a votes that the task's own pruned network keeps, b(a). Right: how many "
    "of its own units have a votes, d(a). Below: b(a) of every layer.",
    "neighbours": "Test accuracy of the vote against the number of neighbours that vote.",
    "iterations": "Test accuracy against the steps of SGD on the target.",
    "similarity": "Test accuracy of the vote when the neighbours come from one of five groups of similarity. A group "
    "with fewer tasks than neighbours lets all of them vote; targets without a task in a group are left out there.",
}


def write(folder: Path) -> Path:
    """Write report.html of a finished vote run; CheckpointError if it has no report."""
    report = load_report(open_run(folder))
    methods = Section(
        "Methods",
        caption(report),
        tables=[Table(COLUMNS, cells(report), "One line per method.")],
        pictures=[Picture(accuracies(report, folder / "plots" / "methods.png"), "Accuracy and cost of every method")],
    )
    studies = [_study(path) for path in sorted((folder / "studies").glob("*.json"))]
    sections = [methods, *studies, *origin(folder)]
    return write_page(folder / "report.html", f"{report['recipe']}: meta-vote pruning", sections)


def _study(path: Path) -> Section:
    content: dict[str, Any] = load_json(path)
    name = path.stem
    pictures = [Picture(file, content["title"]) for file in sorted(path.parent.glob(f"{name}*.png"))]
    return Section(content["title"], MEANINGS.get(name, ""), pictures=pictures)
