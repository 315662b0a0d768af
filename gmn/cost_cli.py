"""What `gmn cost` prints: minutes and peak memory of meta-training and of one pruning by each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gmn.checkpoint import save_json
from gmn.cli_options import numbers
from gmn.consoles import wide_console
from gmn.errors import CheckpointError
from gmn.permission import allow_code
from gmn.recipe import load_recipe
from gmn.report import row_title
from gmn.run import one_of_its_runs, open_run, reading
from gmn.run_cost import account
from gmn.settings import Recipe

PARTS = {"data models": "training the data models", "choosing": "choosing the checkpoint"}
WAYS = {"all": "", "without data models": ", data models at hand"}
WORDS = ("part", "network", "than")  # columns of text
CAPTION = (
    "a pruning: initial pruning, rewriting, both fine-tunings and the pruning, mean over seeds; over N networks: "
    "that and 1/N of meta-training (?: nobody noted what that was); MB: most that the process held, libraries included"
)
EVEN_CAPTION = (
    "from the minutes above, and these also depend on what else the machine did: it means something only where a row "
    "has less to do than the other"
)


def cost(run: Path, *, networks: str, output: Path | None) -> None:
    """Print what a run cost; write JSON if a path is given."""
    with allow_code():  # for its name and labels only
        recipe = load_recipe(open_run(run) / "recipe.yaml")
    if not isinstance(recipe, Recipe):
        expected = "a run of a recipe with `method: metanetwork`"
        hint = one_of_its_runs(run)
        raise CheckpointError("the run has no metanetwork", expected=expected, got=str(run), hint=hint)
    counts, console = numbers("--networks", networks), wide_console()
    with reading(run / "metrics.jsonl"):
        content = {"recipe": recipe.name, **account(run, counts, recipe.report.metanetworks)}
        tables = [*learning(content), pruning(content), even(content)]
    for table in tables:
        console.print(table or "no row without a metanetwork takes longer for a network: there is no break-even")
    if output is not None:
        save_json(output, content)


def learning(content: dict[str, Any]) -> list[Table]:
    """What each metanetwork cost to learn, by part; none of those that nobody noted it of."""
    return [
        _learning(f"{content['recipe']}: meta-training, {row}", costs)
        for row, costs in content["meta_training"].items()
        if costs is not None
    ]


def _learning(name: str, costs: dict[str, Any]) -> Table:
    table, gpu = Table(title=name), bool(costs["cuda_mb"])
    _columns(table, ["part", "minutes", *_memory_names(gpu)])
    for part, spent in costs["parts"].items():
        table.add_row(PARTS.get(part, part), _minutes(spent["seconds"]), *_memory(spent, gpu))
    table.add_section()
    table.add_row("together", _minutes(costs["seconds"]), *_memory(costs, gpu))
    if "data models" in costs["parts"]:
        rest = [spent for part, spent in costs["parts"].items() if part != "data models"]
        peaks = {key: max(spent[key] for spent in rest) for key in ("peak_mb", "cuda_mb")}
        table.add_row("without the data models", _minutes(costs["seconds_without_data_models"]), *_memory(peaks, gpu))
    return table


def pruning(content: dict[str, Any]) -> Table:
    """One pruning by each row, and minutes per network; a metanetwork of unknown cost has no such figures."""
    entries, counts = content["pruning"], [str(count) for count in content["networks"]]
    gpu, several = any(entry["cuda_mb"] for entry in entries), _several(content)
    table = Table(title=f"{content['recipe']}: minutes of one pruning, and per network over N", caption=CAPTION)
    over = [f"over {count}" for count in counts]
    _columns(table, ["network", *(["speed-up"] if several else []), "minutes", *_memory_names(gpu), *over])
    for entry in entries:
        where = [f"{entry['speed_up']:g}x"] if several else []
        own = [*where, _minutes(entry["seconds"]), *_memory(entry, gpu)]
        for way, seconds in (entry["amortised"] or {"all": {}}).items():
            shares = [_minutes(seconds[count]) if seconds else "?" for count in counts]
            table.add_row(f"{row_title(entry['row'])}{WAYS[way]}", *own, *shares)
    return table


def even(content: dict[str, Any]) -> Table | None:
    """From how many networks on a metanetwork is not dearer than another row; None if no row takes longer than it."""
    title, several = "break-even: not dearer per network from so many networks on", _several(content)
    table = Table(title=title, caption=EVEN_CAPTION)
    _columns(table, ["network", *(["speed-up"] if several else []), "than", "networks"])
    for entry in content["pruning"]:
        where = [f"{entry['speed_up']:g}x"] if several else []
        for way, against in entry["break_even"].items():
            for row, count in against.items():
                if count is not None:
                    table.add_row(f"{row_title(entry['row'])}{WAYS[way]}", *where, row_title(row), f"{count:,}")
    return table if table.row_count else None


def _several(content: dict[str, Any]) -> bool:
    return len({entry["speed_up"] for entry in content["pruning"]}) > 1


def _columns(table: Table, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if name in WORDS else "right", no_wrap=bool(place))


def _memory_names(gpu: bool) -> list[str]:
    return ["peak MB", *(["GPU MB"] if gpu else [])]


def _memory(spent: dict[str, float], gpu: bool) -> list[str]:
    return [f"{spent['peak_mb']:,.0f}", *([f"{spent['cuda_mb']:,.0f}"] if gpu else [])]


def _minutes(seconds: float) -> str:
    """Minutes, to a thousandth below a tenth.

    >>> _minutes(90.0), _minutes(1.5), _minutes(7200.0), _minutes(0.02)
    ('1.50', '0.025', '120.00', '< 0.001')
    """
    minutes = seconds / 60
    if minutes < 0.0005:
        return "< 0.001"
    return f"{minutes:.2f}" if minutes >= 0.1 else f"{minutes:.3f}"
