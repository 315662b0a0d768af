"""What a matrix run says in the end: a table on the terminal, the same in Markdown, and a page with what lies behind.

A row is a network, a column a metanetwork, or a way to prune without one; all columns of a row have the same budget.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console
from rich.text import Text

from gmn.bench_report import markdown
from gmn.checkpoint import save_text
from gmn.compare import summarise
from gmn.consoles import plain_console
from gmn.page import Section, Table, origin, write_page
from gmn.report import MEANINGS, TITLES, accuracy, targets
from gmn.settings_matrix import OWN

Report = dict[str, Any]
Entry = dict[str, Any]

NAMES = {**TITLES, "same-schedule": "none"}  # as in the paper's tables
MARKS = {True: "‡", False: "†"}
NOTES = {
    "‡": "‡: the metanetwork learnt on this very network",
    "†": "†: the metanetwork learnt on networks of this kind",
    OWN: "own: the metanetwork that learnt with the settings of its row",
    "same-schedule": "none: the same schedule without metanetwork",
    **{row: meaning for row, meaning in MEANINGS.items() if row != "same-schedule"},
}
MORE: dict[str, tuple[str, Callable[[Entry], str]]] = {
    "Before the last fine-tuning": (
        "Validation accuracy in per cent, pruned, before the last fine-tuning: how easy to prune.",
        lambda entry: f"{100 * entry['pruned']:.2f}",
    ),
    "Speed-up": ("FLOPs before / FLOPs after.", lambda entry: f"{entry['speed_up']:.2f}x"),
}


def columns(report: Report) -> list[str]:
    """The columns beside the label: base, the metanetworks, the baselines of any network."""
    found = dict.fromkeys(result["row"] for network in report["networks"].values() for result in network["results"])
    return list(dict.fromkeys(["base", *report["columns"], *found]))


def header(report: Report) -> list[str]:
    """What the columns are called."""
    return ["network", *(NAMES.get(name, name) for name in columns(report))]


def grid(report: Report, value: Callable[[Entry], str]) -> list[list[str]]:
    """A line per network: its label, and a value in every column."""
    lines: list[list[str]] = []
    for label, network in report["networks"].items():
        entries = _entries(label, network)
        lines.append([label, *(value(entries[name]) if name in entries else "-" for name in columns(report))])
    return lines


def accuracies(report: Report, best: str = "{}*") -> list[list[str]]:
    """Test accuracy in per cent, the diagonal marked; the best of a row in the form `best`."""
    return grid(report, lambda entry: (best if entry["best"] else "{}").format(accuracy(entry)) + entry["mark"])


def _entries(label: str, network: Report) -> dict[str, Entry]:
    """The means of a network's columns; `pruned`: validation accuracy before the last fine-tuning; `best`, `mark`."""
    entries = {entry["row"]: entry for entry in summarise(network)}
    top = max((entry["test_accuracy"] for row, entry in entries.items() if row != "base"), default=None)
    for row, entry in entries.items():
        stages = [result["stages"]["pruned"] for result in network["results"] if result["row"] == row]
        entry["pruned"] = statistics.fmean(stages or [entry["validation_accuracy"]])  # the base is not pruned
        entry["best"] = row != "base" and len(entries) > 2 and entry["test_accuracy"] == top  # of several
        entry["mark"] = MARKS[network["seen"]] if row in (label, OWN) else ""
    return entries


def caption(report: Report, best: str = "*") -> str:
    """What one must know to read the table; `best` is how the best of a row is shown."""
    marks = {MARKS[network["seen"]] for network in report["networks"].values() if network["seen"] is not None}
    budgets: dict[str, list[str]] = {}
    for label, network in report["networks"].items():
        budgets.setdefault(_budget(network), []).append(label)
    learnt, own = bool(report["columns"]), report["columns"] == [OWN]
    parts = [
        f"a row per network, a column per {'metanetwork' if learnt and not own else 'way to prune'}",
        *(note for name, note in NOTES.items() if name in marks or name in columns(report)),
        *(f"{', '.join(labels)}: {budget}" if len(budgets) > 1 else budget for budget, labels in budgets.items()),
        "mean ± standard deviation over fine-tuning seeds"
        + (f", one metanetwork per {'row' if own else 'column'}" if learnt else ""),
        f"{best}: the best of a row",
        "validation images choose, test images are read once",
    ]
    return "; ".join(parts)


def _budget(network: Report) -> str:
    seeds = max((entry["seeds"] for entry in summarise(network)), default=1)
    start = network["initial_speed_up"]
    return (
        f"pruned to {targets([network])}{f', initially to {start:g}x' if start > 1 else ''}"
        f" with {network['finetune_images']:,} fine-tuning images, {network['validation_images']:,} validation and"
        f" {network['test_images']:,} test images, {seeds} seed{'s' if seeds > 1 else ''}"
    )


def table(report: Report) -> rich.table.Table:
    """Test accuracy of every network with every metanetwork."""
    result = rich.table.Table(title=f"{report['recipe']}: test accuracy, %", caption=caption(report))
    for number, name in enumerate(header(report)):
        result.add_column(name, justify="right" if number else "left", overflow="fold")
    for line in accuracies(report, "[bold]{}*[/]"):
        result.add_row(line[0], *map(Text.from_markup, line[1:]))  # the label is a user's
    return result


def text(report: Report) -> str:
    """The table in Markdown, and below it how easy pruning was."""
    names = header(report)
    first = [markdown("", names, accuracies(report, "**{}**")), f"{caption(report, 'bold')}."]
    return (
        "\n\n".join([*first, *(markdown(title, names, grid(report, value)) for title, value in MORE.values())]) + "\n"
    )


def show(report: Report, folder: Path, console: Console | None = None) -> None:
    """Print the table; write it as matrix.md, and the page."""
    console = console or plain_console()
    if not console.is_terminal:
        console.width = max(console.width, 20 * len(columns(report)))  # a file has no edge
    console.print(table(report))
    save_text(folder / "matrix.md", text(report))
    console.print(f"table: {folder / 'matrix.md'}", soft_wrap=True, highlight=False)
    console.print(f"page: {write(report, folder)}", soft_wrap=True, highlight=False)


def write(report: Report, folder: Path) -> Path:
    """Write report.html of a finished matrix run."""
    names = header(report)
    sections = [
        Section("Test accuracy, %", caption(report), [Table(names, accuracies(report))]),
        *(Section(name, tables=[Table(names, grid(report, value), title)]) for name, (title, value) in MORE.items()),
        *origin(folder),
    ]
    what = "each network with its own metanetwork" if report["columns"] == [OWN] else "transfer of metanetworks"
    return write_page(folder / "report.html", f"{report['recipe']}: {what}", sections)
