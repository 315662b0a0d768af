"""What the stages of a run cost: seconds and peak memory, a line in the run's log for each that is done.

Stages may lie inside one another, as when a network is trained because checkpoints are to be chosen with it: each
counts what it alone took, so that all lines of a run can be added up. A stage that ends in an error is not logged; a
resumed run does its work again, and logs that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from gmn.memory import memory_now, peak_memory

Log = Callable[..., None]
EVENT = "cost"


@dataclass(frozen=True)
class Spent:
    """Seconds, the most memory that the process held (MB, its libraries included), and the most on CUDA (MB).

    >>> Spent(1.0, 500.0) + Spent(2.0, 400.0, 80.0)
    Spent(seconds=3.0, peak_mb=500.0, cuda_mb=80.0)
    """

    seconds: float = 0.0
    peak_mb: float = 0.0
    cuda_mb: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        """One after the other: times add up, of peaks the higher one counts."""
        peaks = max(self.peak_mb, other.peak_mb), max(self.cuda_mb, other.cuda_mb)
        return Spent(self.seconds + other.seconds, *peaks)


_open: list[Spent] = []  # the stages that are under way, the outermost first
_since = 0.0  # when the innermost one was last credited


@contextmanager
def stage(log: Log, name: str, **labels: object) -> Iterator[Log]:
    """Measure a block and log it; what it yields logs a part of the block, with labels of its own.

    What is left after the last part is not logged again: parts take the place of the whole.

    Args:
        log: Such as `Run.log`.
        name: Of the stage.
        labels: What tells it from others of that name; done again, the later line counts.
    """
    parts = 0

    def part(**own: object) -> None:
        nonlocal parts
        _credit()
        log(EVENT, stage=name, **labels, **own, **{key: round(value, 4) for key, value in asdict(_open[-1]).items()})
        _open[-1] = Spent()
        parts += 1

    _credit()
    _open.append(Spent())
    try:
        yield part
        if not parts:
            part()
    finally:
        _credit()
        _open.pop()


def spend(seconds: float) -> None:
    """Count seconds that a killed process spent on the innermost stage, and that are not spent again."""
    if _open:
        _open[-1] += Spent(seconds)


def _credit() -> None:
    """Give what passed since the last call to the innermost stage; time and peaks count anew from here."""
    global _since
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    peaks = {gpu: peak for gpu in range(count) if (peak := torch.cuda.max_memory_allocated(gpu))}
    for gpu in peaks:  # not the others: to wait for one is to make a context on it
        torch.cuda.synchronize(gpu)
    now = time.perf_counter()
    if _open:
        _open[-1] += Spent(now - _since, peak_memory() or 0.0, max(peaks.values(), default=0) / 2**20)
    _since = now
    memory_now()
    for gpu in peaks:
        torch.cuda.reset_peak_memory_stats(gpu)
