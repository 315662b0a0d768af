"""Progress for people: a bar with the time left on a terminal, one line per finished task elsewhere.

Progress goes to stderr, results to stdout, so that a pipe gets results only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[str], None]

WORTH_A_LINE = 1.0  # seconds; shorter tasks say nothing when the output is no terminal
LINE_EVERY = 60.0  # seconds between the lines of a longer task

console = Console(stderr=True)


@contextmanager
def track(title: str, total: int) -> Iterator[Advance]:
    """Follow a task of `total` steps; call what it yields after each step, with a short note (such as the loss)."""
    start, note = time.perf_counter(), ""
    done, last = 0, start
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
            task = bar.add_task(title, total=total, note="")

            def advance(text: str = "") -> None:
                nonlocal note
                note = text or note
                bar.update(task, advance=1, note=note)

            yield advance
    else:

        def remember(text: str = "") -> None:
            nonlocal note, done, last
            note, done, now = text or note, done + 1, time.perf_counter()
            if now - last > LINE_EVERY:
                last, left = now, (now - start) / done * (total - done)
                say(f"{title}: {done}/{total}, {left:.0f} s left, {note}")

        yield remember
    seconds = time.perf_counter() - start
    if seconds >= WORTH_A_LINE:
        say(f"{title}: {seconds:.1f} s" + (f", {note}" if note else ""))


def say(line: str) -> None:
    """One line about what happens, to stderr."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
