"""What a run says in the end: one table on the terminal, and its plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gmn.baselines import DIGEST, digest
from gmn.bench_report import markdown
from gmn.checkpoint import load_metanetwork, load_sound, save_text
from gmn.compare import summarise, tables_of
from gmn.consoles import plain_console
from gmn.progress import say
from gmn.run import METANETWORK_FILE
from gmn.weight_masks import reasons

TITLES = {
    "base": "base",
    "metanetwork": "metanetwork",
    "same-schedule": "same schedule",
    "direct": "direct",
    "sparse": "sparse training",
    "torch-pruning": "torch-pruning",
    "torch-pruning-sparse": "torch-pruning, sparse",
    "random": "random",
}


def table(report: dict[str, Any]) -> Table:
    """Accuracy, cost and latency of every row."""
    result = Table(title=title([report]), caption=caption(report))
    first, *others = header(report)
    result.add_column(first)
    for name in others:
        result.add_column(name, justify="right", no_wrap=True)
    for row in cells(report):
        result.add_row(*row)
    return result


def tables(report: dict[str, Any]) -> list[Table]:
    """A table for each speed-up; the last one has the caption of all."""
    found = [table(part) for part in tables_of(report)]
    for own in found[:-1]:
        own.caption = None
    return found


def title(parts: list[dict[str, Any]]) -> str:
    """The name of the run, and what its networks were pruned to, from a report for each target.

    >>> title([{"recipe": "quickstart", "speed_up": 2.0}, {"recipe": "quickstart", "speed_up": 3.0}])
    'quickstart: pruned to 2x, 3x'
    """
    return f"{parts[0]['recipe']}: pruned to {targets(parts)}"


def targets(parts: list[dict[str, Any]]) -> str:
    """Speed-ups, or the pattern, as people read them.

    >>> targets([{"speed_up": 2.0}, {"speed_up": 2.5}]), targets([{"pattern": "2:4", "goal": "2:4"}])
    ('2x, 2.5x', '2:4')
    """
    return ", ".join(part["goal"] if "pattern" in part else f"{part['speed_up']:g}x" for part in parts)


def row_title(row: str) -> str:
    """What a table calls a row; those with a metanetwork of their own have a label."""
    return TITLES.get(row, row)


def measure(report: dict[str, Any]) -> str:
    """What tells how small a network is: the speed-up, or the share of the parameters that is not zero."""
    return "left" if "pattern" in report else "speed-up"


def header(report: dict[str, Any]) -> list[str]:
    """What the columns of `cells` are called."""
    return ["network", "test %", "val. %", "FLOPs", measure(report), "params", "ms"]


def text(report: dict[str, Any]) -> str:
    """The tables in Markdown, with what one must know to read them."""
    parts = [markdown(title([part]), header(part), cells(part)) for part in tables_of(report)]
    return "\n\n".join([*parts, caption(report)]) + "\n"


def cells(report: dict[str, Any]) -> list[list[str]]:
    """Of every row: name, test and validation accuracy in per cent, FLOPs, `measure`, parameters, latency in ms."""
    found: list[list[str]] = []
    for entry in summarise(report):
        small = f"{entry['speed_up']:.2f}x"
        if "pattern" in report:
            small = f"{entry['parameters'] / report['base']['parameters']:.1%}"
        accuracies = accuracy(entry), f"{100 * entry['validation_accuracy']:.2f}"
        cost = human(entry["flops"]), small, human(entry["parameters"])
        found.append([row_title(entry["row"]), *accuracies, *cost, f"{entry['latency']:.2f}"])
    return found


def accuracy(entry: dict[str, Any]) -> str:
    """Mean test accuracy in per cent, with its spread over seeds if there are several.

    >>> accuracy({"test_accuracy": 0.9704, "spread": 0.0016, "seeds": 3})
    '97.04 ± 0.16'
    """
    spread = f" ± {100 * entry['spread']:.2f}" if entry["seeds"] > 1 else ""
    return f"{100 * entry['test_accuracy']:.2f}{spread}"


MEANINGS = {
    "direct": "direct: pruned at once, all fine-tuning after it",
    "same-schedule": "same schedule: without the metanetwork step",
    "sparse": "sparse training: the same schedule, our sparsity loss in the first fine-tuning",
    "torch-pruning": "torch-pruning: as direct, with that library's group magnitudes and pruner",
    "torch-pruning-sparse": "torch-pruning, sparse: the same schedule, regularized and pruned by its GroupNormPruner",
    "random": "random: like direct, what goes drawn at random",
}
SEEN = {True: "the metanetwork learnt on this network", False: "a network the metanetwork never saw"}


def caption(report: dict[str, Any]) -> str:
    """What one must know to read the table."""
    entries = summarise(report)
    seeds = max(entry["seeds"] for entry in entries)
    parts = [
        *(MEANINGS[entry["row"]] for entry in entries if entry["row"] in MEANINGS),
        *(f"{label}: as metanetwork, with that of {path}" for label, path in report.get("metanetworks", {}).items()),
        *([SEEN[report["seen"]]] if report["seen"] in SEEN else []),
        *([f"initially pruned to {start:g}x"] if (start := report.get("initial_speed_up", 1)) > 1 else []),
        f"{report['finetune_images']:,} fine-tuning images per row",
        f"{seeds} fine-tuning seed{'s' if seeds > 1 else ''}",
        f"chosen on {report['validation_images']:,} validation images",
        f"{report['test_images']:,} test images read once",
        *(_of_weights(report) if "pattern" in report else ["a multiply-add is one FLOP"]),
        "ms: latency per batch, median of interleaved runs",
    ]
    return "; ".join(parts)


def _of_weights(report: dict[str, Any]) -> list[str]:
    """What one must know where single weights are zero."""
    return [
        "params, left: parameters that are not zero",
        "FLOPs (a multiply-add is one) and ms are those of dense kernels, which do not skip zeros",
        *([f"dense: {reasons(report['dense'])}"] if report["dense"] else []),
    ]


def human(value: float) -> str:
    """A number as people read it.

    >>> human(41_216_000), human(950), human(1.2e9), human(3.09e12)
    ('41.2 M', '950', '1.2 G', '3.1 T')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value:.0f}"


def show(report: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print the table; write it as report.md, and the page with its pictures; of a run of any method."""
    from gmn import matrix_report, report_page, vote_report  # matplotlib takes a second to import

    if other := {"vote": vote_report.show, "matrix": matrix_report.show}.get(report.get("method", "")):
        other(report, folder, console)
        return
    console = console or plain_console()
    for own in tables(report):
        console.print(own)
    _say_outdated(report, folder)
    save_text(folder / "report.md", text(report))
    console.print(f"page: {report_page.write(report, folder)}", soft_wrap=True, highlight=False)


def _say_outdated(report: dict[str, Any], folder: Path) -> None:
    """Warn where the run has another metanetwork by now: table and page stay those of the report."""
    path, before = folder / METANETWORK_FILE, report.get(DIGEST)
    if before and load_sound(path, "the report is shown as it is") and digest(load_metanetwork(path)[0]) != before:
        hint = "gmn meta-train ... --resume makes its rows and the report again"
        say(f"warning: the report is of another metanetwork than the run has now (gmn select --use); {hint}")
