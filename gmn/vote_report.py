"""What a vote run says in the end: a table of the methods, and the picture of their accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
from rich.console import Console
from rich.table import Table

from gmn.consoles import plain_console
from gmn.plots import save_figure
from gmn.report import human
from gmn.vote_compare import summarise

TITLES = {
    "vote": "vote",
    "nearest": "nearest only",
    "short": "short pruning",
    "long": "long pruning",
    "random": "random units",
    "reptile": "Reptile",
}
SPREADS = ("spread", "difference_spread")
COLUMNS = ("method", "test %", "from vote", "val. %", "steps", "training", "search", "FLOPs", "params", "N")
NARROW = ("method", "test %", "from vote", "steps", "training", "search")  # what fits into a terminal of 80 columns


def cells(report: dict[str, Any], columns: Sequence[str] = COLUMNS) -> list[list[str]]:
    """The table, a line per method."""
    return [[_cell(entry, name) for name in columns] for entry in summarise(report["results"])]


def _cell(entry: dict[str, Any], column: str) -> str:
    spread, apart = (f" ± {100 * entry[key]:.2f}" if entry["trials"] > 1 else "" for key in SPREADS)
    return {
        "method": TITLES[entry["row"]],
        "test %": f"{100 * entry['test_accuracy']:.2f}{spread}",
        "from vote": "" if entry["row"] == "vote" else f"{100 * entry['difference']:+.2f}{apart}",
        "val. %": f"{100 * entry['validation_accuracy']:.2f}",
        "steps": f"{entry['iterations']:g}",
        "training": human(entry["training_flops"]),
        "search": human(entry["search_flops"]) if entry["search_flops"] else "",
        "FLOPs": human(entry["flops"]),
        "params": human(entry["parameters"]),
        "N": f"{entry['neighbours']:g}" if entry["neighbours"] else "",
    }[column]


def table(report: dict[str, Any]) -> Table:
    """Accuracy and cost of every method."""
    result = Table(title=f"{report['recipe']}: {report['ratio']:.0%} of the units pruned", caption=caption(report))
    for name in NARROW:
        result.add_column(name, justify="left" if name == "method" else "right")
    for line in cells(report, NARROW):
        result.add_row(*line)
    return result


def caption(report: dict[str, Any]) -> str:
    """What one must know to read the table."""
    targets, zoo = len(report["targets"]), report["zoo"]
    vote, base = summarise(report["results"])[0], report["base"]
    seeds = len({result["seed"] for result in report["results"]})
    several = targets * seeds > 1
    task = f"{targets} target task{'s' if targets > 1 else ''}, {seeds} seed{'s' if seeds > 1 else ''} each"
    return "; ".join(
        [
            f"{task}: mean{' ± standard deviation over trials' if several else ''}",
            f"neighbours out of {zoo['tasks']} tasks by {report['similarity']}",
            f"making the zoo cost {human(zoo['training_flops'])} FLOPs once",
            "training and search: FLOPs for one target, a multiply-add is one, backward counts as two forward passes",
            f"pruned from {human(base['flops'])} to {human(vote['flops'])} FLOPs, "
            f"from {human(base['parameters'])} to {human(vote['parameters'])} parameters",
            "from vote: difference on the same task and seed",
            "test images read once per network",
        ]
    )


def show(report: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print the table, and write the page with the pictures."""
    from gmn import vote_page

    console = console or plain_console()
    console.print(table(report))
    console.print(f"page: {vote_page.write(folder)}", soft_wrap=True, highlight=False)


def accuracies(report: dict[str, Any], path: Path) -> Path:
    """Test accuracy of every method on every target against the FLOPs of getting there."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, entry in enumerate(summarise(report["results"])):
        own = [result for result in report["results"] if result["row"] == entry["row"]]
        flops, colour = [r["training_flops"] + r["search_flops"] for r in own], f"C{number}"
        axes.scatter(flops, [r["test_accuracy"] for r in own], s=12, alpha=0.35, color=colour)
        where = entry["training_flops"] + entry["search_flops"], entry["test_accuracy"]
        axes.errorbar(*where, yerr=entry["spread"], marker="D", capsize=3, color=colour, label=TITLES[entry["row"]])
    axes.set(xlabel="FLOPs of training and search for one target (multiply-adds)", ylabel="test accuracy", xscale="log")
    axes.set_title(f"{report['recipe']}: {report['ratio']:.0%} of the units pruned")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, path)
