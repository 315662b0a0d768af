"""Progress for people: a bar with the time left on a terminal, one line per finished task elsewhere.

Progress goes to stderr, results to stdout, so that a pipe gets results only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gmn.consoles import plain_console


class Advance(Protocol):
    """Says that a step of a task is done, or several."""

    def __call__(self, text: str = "", steps: int = 1) -> None:
        """Show a short note."""
        ...


WORTH_A_LINE = 1.0  # seconds; shorter tasks say nothing when the output is no terminal
LINE_EVERY = 60.0  # seconds between the lines of a longer task

console = plain_console(stderr=True)


_active: list[Progress] = []  # the bar on the terminal, if there is one: rich allows one at a time
_titles: list[str] = []  # the tasks that are under way, the outermost first


@contextmanager
def track(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Follow a task of `total` steps; call what it yields after each step, with a short note (such as the loss).

    Steps that were `done` before, by a run that goes on, do not count for the time left.

    A task inside another one gets a second row of the same bar; without a terminal it says nothing.
    """
    start, note = time.perf_counter(), ""
    _titles.append(title)
    try:
        with _bar(title, total, done) if console.is_terminal else _lines(title, total, done) as show:

            def advance(text: str = "", steps: int = 1) -> None:
                nonlocal note
                note = text or note
                show(note, steps)

            yield advance
    finally:
        _titles.pop()
    seconds = time.perf_counter() - start
    if seconds >= WORTH_A_LINE and not _titles:
        say(f"{title}: {seconds:.1f} s" + (f", {note}" if note else ""))


@contextmanager
def _bar(title: str, total: int, done: int) -> Iterator[Callable[[str, int], None]]:
    outermost = not _active
    if outermost:
        title_column, note_column = (
            TextColumn(f"{{task.{of}}}", markup=False) for of in ("description", "fields[note]")
        )
        columns = (title_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note_column)
        _active.append(Progress(*columns, console=console, transient=True))
        _active[0].start()
    bar = _active[0]
    task = bar.add_task(title, total=total, completed=done, note="")
    try:
        yield lambda note, steps: bar.update(task, advance=steps, note=note)
    finally:
        bar.remove_task(task)
        if outermost:
            _active.pop().stop()


@contextmanager
def _lines(title: str, total: int, done: int) -> Iterator[Callable[[str, int], None]]:
    start, before = time.perf_counter(), done
    last = start

    def advance(note: str, steps: int) -> None:
        nonlocal done, last
        done, now = done + steps, time.perf_counter()
        if now - last > LINE_EVERY and len(_titles) == 1:
            last, left = now, (now - start) / (done - before) * (total - done)
            say(f"{title}: {done}/{total}, {left:.0f} s left, {note}")

    yield advance


def say(line: str) -> None:
    """One line about what happens, to stderr."""
    console.print(line, highlight=False, soft_wrap=True)
