"""Where the time of a step goes: its parts are named where they stand, and timed if somebody asks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Phase = Callable[[str], AbstractContextManager[None]]


def untimed(_: str) -> AbstractContextManager[None]:
    """A phase that nobody times."""
    return nullcontext()


class Stopwatch:
    """Seconds by phase; what an accelerator still computes is waited for.

    >>> watch = Stopwatch()
    >>> with watch("sleep"):
    ...     time.sleep(0.01)
    >>> 0.01 <= watch.seconds["sleep"] < 1
    True
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time that passes inside to a phase."""
        _wait()
        start = time.perf_counter()
        yield
        _wait()
        self.seconds[name] += time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
