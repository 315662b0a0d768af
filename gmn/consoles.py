"""Where gmn prints: a console that shows names and labels as they are, for they may look like markup or emoji codes."""

from __future__ import annotations

import os

from rich.console import Console

WIDTH = 120  # of the output in a pipe


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console without markup: "[a]" is no style, and ":M:" no emoji."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False)


def wide_console() -> Console:
    """Where results are printed; wide in a pipe, if nobody says how wide."""
    console = plain_console()
    return console if console.is_terminal or "COLUMNS" in os.environ else plain_console(width=WIDTH)
