"""What `gmn zoo list`, `gmn zoo verify` and `gmn zoo add` print: a table on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gmn.consoles import plain_console
from gmn.errors import GmnError
from gmn.names import nearest
from gmn.progress import say
from gmn.zoo import Split, Status, Task, Zoo
from gmn.zoo_index import zoo_path

T = TypeVar("T")
SPLITS: dict[str, Split] = {name: name for name in get_args(Split)}
STATUSES: dict[str, Status] = {name: name for name in get_args(Status)}
MOST_METRICS = 4  # columns of a table
Line = tuple[str, ...]


def list_tasks(
    folder: Path, *, label: str | None, split: str | None, status: str, sort: str, limit: int | None
) -> None:
    """Print the tasks of a zoo, and to stderr how many there are.

    Args:
        folder: The zoo.
        label: Only tasks with a class of this name.
        split: Only `zoo` or only `target`.
        status: `planned`, `done`, `failed` or `all`.
        sort: See `Zoo.tasks`.
        limit: At most so many.

    Raises:
        GmnError: if a choice is unknown, or there is no sound zoo.
    """
    if limit is not None and limit < 0:
        raise GmnError("not a number of tasks", expected="0 or more", got=str(limit), where="--limit")
    only = None if split is None else _choice("--split", split, SPLITS)
    which = None if status == "all" else _choice("--status", status, STATUSES, "all")
    zoo = _opened(folder)
    tasks = zoo.tasks(only, None if label is None else [label], which, order_by=sort)
    if label is not None and not tasks:
        known = sorted({name for task in zoo.tasks(status=None) for name in task.class_names})
        say(f"no task with class {label!r}" + (f"; {hint}" if (hint := nearest(label, known)) else ""))
    show(tasks[:limit])
    counts = ", ".join(f"{count:,} {name}" for name, count in zoo.counts().items())
    say(f"{folder}: {counts}; shown: {len(tasks[:limit]):,} of {len(tasks):,}")


def verify(folder: Path) -> bool:
    """Print what is wrong with a zoo, a line each, and tell whether nothing is; GmnError if there is no zoo."""
    zoo = _opened(folder)
    problems = zoo.verify()
    for problem in problems:
        print(problem)
    print(f"{zoo.counts()['done']:,} tasks, {len(problems):,} problems")
    return not problems


def add(folder: Path, file: Path) -> None:
    """Add a task's file to a zoo; GmnError if it is damaged, for another network, or there already."""
    zoo = _opened(folder)
    task = zoo.add_file(file)
    if others := [other.name for other in zoo.tasks(limit=2) if other.name != task.name]:
        own, usual = zoo.masks([task.name, others[0]]).sum(1).tolist()
        if own != usual:
            say(f"it keeps {own:,} of {zoo.nodes:,} nodes, {others[0]} {usual:,}: not pruned by the same ratio")
    print(f"added {task.name}: {', '.join(task.class_names)}; {task.bytes:,} bytes")


def show(tasks: Sequence[Task], console: Console | None = None) -> None:
    """Print tasks to stdout; in a pipe one per line, the columns apart by tabs."""
    console = console or plain_console()
    metrics = list(dict.fromkeys(name for task in tasks for name in task.metrics))[:MOST_METRICS]
    header = ("task", "split", "status", "classes", *metrics, "FLOPs", "parameters", "bytes", "error")
    lines = [_line(task, metrics) for task in tasks]
    if not console.is_terminal:
        print("\t".join(header))
        for line in lines:
            print("\t".join(line))
        return
    console.print(_table(header, lines))


def _line(task: Task, metrics: Iterable[str]) -> Line:
    measured = (f"{task.metrics[name]:.4g}" if name in task.metrics else "" for name in metrics)
    numbers = f"{task.flops:.4g}", str(task.parameters), str(task.bytes)
    return (task.name, task.split, task.status, ", ".join(task.class_names), *measured, *numbers, task.error)


def _table(header: Line, lines: Sequence[Line]) -> Table:
    """Columns that hold nothing are left out."""
    table = Table()
    filled = [index for index in range(len(header)) if any(line[index] for line in lines)]
    for index in filled:
        words = header[index] in ("task", "split", "status", "classes", "error")
        table.add_column(Text(header[index]), justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for line in lines:
        table.add_row(*(Text(line[index]) for index in filled))
    return table


def _opened(folder: Path) -> Zoo:
    """The zoo in a folder, or in that of its run."""
    return Zoo.open(zoo_path(folder) or folder)


def _choice(option: str, name: str, valid: dict[str, T], *more: str) -> T:
    if name not in valid:
        raise GmnError("no such choice", expected=" or ".join([*valid, *more]), got=repr(name), where=option)
    return valid[name]
