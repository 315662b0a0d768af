"""This program as one of several processes that a launcher has started; it imports nothing that takes time."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import NoReturn

SHARED = ("meta-train", "prune")
"""The commands whose work several processes share."""

GRACE = 5.0  # seconds for the first process to say the same, and for the launcher to end this one


def processes() -> int:
    """How many processes a launcher has started for this command; 1 without a launcher."""
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if started else 1


def rank() -> int | None:
    """The number of this process, from 0; None if there is only one."""
    return int(os.environ["RANK"]) if processes() > 1 else None


def crash(error: BaseException) -> None:
    """Of several processes, show an error's traceback and end at once; alone, do nothing: Python shows it."""
    if rank() is not None:
        traceback.print_exception(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(1)  # an orderly end may wait for the others, who may wait for this one


def fail(line: str, code: int = 2) -> NoReturn:
    """Say what went wrong, in one line, and end with an exit code.

    Of several processes the first says it. Another one leaves it time to: mistakes in a recipe are found by all.
    """
    number = rank()
    if number:
        time.sleep(GRACE)
    if line:  # nothing to say where a command has shown its help
        print(f"gmn: {f'process {number}: ' if number else ''}{line}", file=sys.stderr, flush=True)
    if number is not None:
        os._exit(code)  # an orderly end would wait for the others
    sys.exit(code)
