"""What a vote run says in the end: a table of the methods, and the picture of their accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
from rich.console import Console
from rich.table import Table

from gmn.checkpoint import write_atomic
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
COLUMNS = ("method", "N", "steps", "test %", "from vote", "val. %", "training", "search", "FLOPs", "params")


def cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table, a line per method."""
    lines = []
    for entry in summarise(report["results"]):
        several = entry["trials"] > 1
        spread, apart = (f" ± {100 * entry[key]:.2f}" * several for key in ("spread", "difference_spread"))
        own = entry["row"] == "vote"
        lines.append(
            (
                TITLES[entry["row"]],
                f"{entry['neighbours']:g}" if entry["neighbours"] else "",
                f"{entry['iterations']:g}",
                f"{100 * entry['test_accuracy']:.2f}{spread}",
                "" if own else f"{100 * entry['difference']:+.2f}{apart}",
                f"{100 * entry['validation_accuracy']:.2f}",
                human(entry["training_flops"]),
                human(entry["search_flops"]) if entry["search_flops"] else "",
                human(entry["flops"]),
                human(entry["parameters"]),
            )
        )
    return lines


def table(report: dict[str, Any]) -> Table:
    """Accuracy and cost of every method."""
    result = Table(title=f"{report['recipe']}: {report['ratio']:.0%} of the units pruned", caption=caption(report))
    for name in COLUMNS:
        result.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for line in cells(report):
        result.add_row(*line)
    return result


def caption(report: dict[str, Any]) -> str:
    """What one must know to read the table."""
    targets, zoo = len(report["targets"]), report["zoo"]
    seeds = len({result["seed"] for result in report["results"]})
    several = targets * seeds > 1
    task = f"{targets} target task{'s' if targets > 1 else ''}, {seeds} seed{'s' if seeds > 1 else ''} each"
    return "; ".join(
        [
            f"{task}: mean{' ± standard deviation over trials' if several else ''}",
            f"neighbours out of {zoo['tasks']} tasks by {report['similarity']}",
            f"making the zoo cost {human(zoo['training_flops'])} FLOPs once",
            "training and search: FLOPs for one target, a multiply-add is one, backward counts as two forward passes",
            f"before pruning: {human(report['base']['flops'])} FLOPs, {human(report['base']['parameters'])} parameters",
            "from vote: difference on the same task and seed",
            "test images read once per network",
        ]
    )


def show(report: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print the table, and write the page with the pictures."""
    from gmn import vote_page

    console = console or Console()
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
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    return path
