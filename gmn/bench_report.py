"""What `gmn bench convert` says: a table on the terminal, and a section of a Markdown file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gmn.checkpoint import save_text
from gmn.consoles import plain_console
from gmn.errors import GmnError

Row = dict[str, Any]
HIGH = 0.95  # the share of the parameters from which on a network counts as held by its graph

TITLES = {
    "torchvision": "torchvision: every classification network",
    "torchvision-video": "torchvision: every network for video",
    "timm": "timm: the smallest network of every family",
    "extra": "What the libraries above lack",
}
SOURCES = {"timm": ("torch", "timm"), "extra": ("torch", "torchvision", "transformers")}
COLUMNS = (
    *("parameters", "in the graph", "of weight layers", "frozen", "nodes", "edges", "blocks", "traced by"),
    *("bit-exact", "edit shows", "seconds"),
)
MEANING = (
    "Random weights and norm statistics, none of them trivial; eval mode; one process per network. Bit for bit: every "
    "entry of the state dict of the copy, and its outputs on inputs that the conversion did not see, are equal. "
    "Edited: noise on every number of the graph reaches every parameter that the graph holds, and the outputs. Weight "
    "layers are convolutions, linear layers, norms and attention. Frozen channels are those that pruning leaves alone. "
    "Seconds: the whole of `to_graph`, one run of the network included, on two cores that had other work too."
)


def totals(rows: Sequence[Row], missing: int = 0) -> list[str]:
    """What the rows say together, a sentence each.

    >>> totals([{"ok": True, "bit_exact": True, "share": 0.99, "layer_share": 1.0, "traced_by": "run"}])[0]
    '1 of 1 round-trip bit-exact'
    """
    count = len(rows)
    exact = sum(bool(row.get("bit_exact")) for row in rows)
    sentences = [f"{exact} of {count} round-trip bit-exact"]
    converted = [row for row in rows if "share" in row]
    for key, what in (("share", "all parameters"), ("layer_share", "the weight layers' parameters")):
        high = sum(row[key] >= HIGH for row in converted)
        sentences.append(f"{high} of {count} with at least {HIGH:.0%} of {what} in the graph")
    ways = {way: sum(row["traced_by"] == way for row in converted) for way in ("run", "export")}
    sentences.append(f"traced by running: {ways['run']}, by exporting: {ways['export']}")
    failed = count - sum(row["ok"] for row in rows)
    return [*sentences, f"{failed} failed"] + ([f"{missing} not converted yet"] if missing else [])


def table(title: str, rows: Iterable[Row]) -> Table:
    """A line per network, what failed last."""
    result = Table(title=title, caption="convert s: the whole of to_graph, its own trace included")
    result.add_column("")
    result.add_column("network", no_wrap=True)
    for name in ("param.", "trace s", "convert s", "by", "in graph", "layers", "frozen", "blocks", "peak MB"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("carried, or why it failed", overflow="fold")
    for row in sorted(rows, key=lambda row: (not row["ok"], row["name"])):
        seconds = row.get("seconds", {})
        result.add_row(
            Text("✓", "green") if row["ok"] else Text("✗", "red"),
            row["name"],
            _millions(row.get("parameters")),
            *(f"{seconds[stage]:.1f}" if stage in seconds else "" for stage in ("trace", "convert")),
            _way(row),
            *(_percent(row.get(key)) for key in ("share", "layer_share", "frozen")),
            *(_whole(row.get(key)) for key in ("blocks", "peak_mb")),
            row["error"] or _carried(row),
        )
    return result


def show(title: str, rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the table and the totals to stdout."""
    console = console or plain_console()
    if not console.is_terminal:
        console.width = max(console.width, 180)  # a file has no edge
    console.print(table(title, rows))
    console.print("; ".join(totals(rows)), highlight=False, soft_wrap=True)


# -- Markdown ----------------------------------------------------------------------------------------------------------


def section(suite: str, rows: Sequence[Row], names: Sequence[str]) -> str:
    """What a suite showed, as Markdown.

    Args:
        suite: Its name.
        rows: What was found; of other networks too.
        names: The networks of the suite.
    """
    mine = sorted((row for row in rows if row["name"] in set(names)), key=lambda row: row["name"])
    failed = [(row["name"], row["error"]) for row in mine if not row["ok"]]
    low = [(row["name"], _carried(row)) for row in mine if row.get("share", 1) < HIGH]
    command = f"`gmn bench convert --suite {suite} --markdown docs/coverage.md`"
    parts = [
        f"## {TITLES.get(suite, suite)}",
        f"{command}, with {_versions(suite, mine)}.",
        "\n".join(f"* {sentence}" for sentence in totals(mine, missing=len(names) - len(mine))),
        markdown("Failed", ("network", "why"), failed),
        markdown(f"Less than {HIGH:.0%} in the graph", ("network", "carried through unchanged"), low),
        markdown("", ("network", *COLUMNS), [_cells(row) for row in mine if "share" in row]),
    ]
    return "\n\n".join(part for part in parts if part)


def write_section(path: Path, suite: str, text: str) -> None:
    """Put a suite's section into a file, between its markers; a new section comes last.

    Raises:
        GmnError: if the section that is there has no end.
    """
    start, end = f"<!-- suite:{suite} -->", "<!-- /suite -->"
    head = f"# What of a network is in its graph\n\n{textwrap.fill(MEANING, 120)}\n"
    old = path.read_text(encoding="utf-8") if path.is_file() else head
    before, found, rest = old.partition(start)
    if found and end not in rest.partition("<!-- suite:")[0]:
        raise GmnError("a section has no end", expected=end, got=start, where=str(path))
    block = f"{start}\n{text}\n{end}"
    save_text(path, before + block + rest.partition(end)[2] if found else f"{old.rstrip()}\n\n{block}\n")


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; nothing without rows."""
    if not rows:
        return ""
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in cells)
    return f"**{title}**\n\n{lines}" if title else lines


def _cells(row: Row) -> list[str]:
    name = row["name"] + "".join(f", {key}={value}" for key, value in row.get("options", {}).items())
    label = f"{name} ({row['family']})" if row.get("family") else name
    return [
        label,
        _millions(row.get("parameters")),
        *(_percent(row.get(key)) for key in ("share", "layer_share", "frozen")),
        *(_whole(row.get(key)) for key in ("nodes", "edges", "blocks")),
        _way(row),
        _yes(row.get("bit_exact")),
        _yes(row.get("edit_shows") and not row.get("unmoved")),
        f"{row.get('seconds', {}).get('convert', 0):.1f}",
    ]


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _versions(suite: str, rows: Sequence[Row]) -> str:
    packages = SOURCES.get(suite, ("torch", "torchvision"))
    found = {package: {row.get("versions", {}).get(package) for row in rows} - {None} for package in packages}
    return ", ".join(f"{package} {'/'.join(sorted(versions))}" for package, versions in found.items() if versions)


def _carried(row: Row, most: int = 3) -> str:
    """The largest parameters that are not in the graph."""
    carried = list(row.get("carried", {}).items())
    more = f" and {len(carried) - most} more" if len(carried) > most else ""
    return ", ".join(f"{name} {size:,}" for name, size in carried[:most]) + more


def _way(row: Row) -> str:
    """How the network was traced; `partly` if some of it ran where nothing could watch it."""
    return ("partly " if row.get("blind") else "") + row.get("traced_by", "")


def _millions(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"


def _percent(value: float | None) -> str:
    """A share, rounded down: 100 % means all.

    >>> _percent(0.99999), _percent(1.0)
    ('99.9 %', '100.0 %')
    """
    return "" if value is None else f"{int(value * 1000) / 10:.1f} %"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
