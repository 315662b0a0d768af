"""The initial pruning's speed-up, found: the largest that costs no validation accuracy.

Bisection over a grid, as if accuracy only fell with the speed-up: about log2 of the grid's size probes, each a pruning,
recalibrated batch norms, a tenth of the initial fine-tuning if there is one, and a look at the validation images.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from gmn.settings import Fit

STEP = 0.05
"""Distance of two speed-ups of the grid."""

ROOM = 1.05
"""What the pruning after the initial one must at least have left to do, as a speed-up."""

BRIEF = 0.1
"""Share of the initial fine-tuning that a probe gets."""


def candidates(target: float) -> list[float]:
    """The grid of initial speed-ups below the one that is wanted in the end.

    >>> candidates(1.3)
    [1.05, 1.1, 1.15, 1.2]
    """
    count = math.floor((target / ROOM - 1) / STEP + 1e-9)
    return [round(1 + STEP * (number + 1), 2) for number in range(count)]


def largest(grid: Sequence[float], accepts: Callable[[float], bool]) -> float:
    """The largest number of a rising grid that is accepted, by bisection; 1 if none is.

    >>> largest([1.1, 1.2, 1.3, 1.4], lambda speed_up: speed_up < 1.35)
    1.3
    """
    count = bisect_left(grid, True, key=lambda speed_up: not accepts(speed_up))
    return grid[count - 1] if count else 1.0


def brief(settings: Fit) -> Fit:
    """A tenth of a training, with the same fall of the learning rate; one epoch or one step at least.

    >>> brief(Fit(epochs=80, lr=0.01, milestones=[40, 70])).milestones
    [4, 7]
    """
    if settings.iterations:
        return settings.model_copy(update={"iterations": math.ceil(BRIEF * settings.iterations)})
    epochs = math.ceil(BRIEF * settings.epochs)
    milestones = sorted({round(BRIEF * milestone) for milestone in settings.milestones} & set(range(1, epochs)))
    shorter = {"epochs": epochs, "milestones": milestones, "warmup": BRIEF * settings.warmup}
    return settings.model_copy(update=shorter)
