"""Who does what in a step of meta-training: data models and images over the processes.

With one data model per step all processes work on it, each with a stretch of the big batch, and the gradients with
respect to its new parameters are summed before every process goes back through the metanetwork: one message of the
size of the data model, and losses, norms and gradients in the log are those of the whole big batch. With several, each
process takes whole data models, as in the paper, and only the metanetwork's gradients travel. Either way the step is
that of one process that does everything in turn (equal by linearity), and the metanetwork's gradients are averaged
last, so that all processes hold the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gmn.distributed import ALONE, Team
from gmn.errors import TrainingError
from gmn.settings import MetaTrain


@dataclass(frozen=True)
class Shares:
    """A process's part of every step.

    Attributes:
        models, batches: Data models and mini-batches of a step; mini-batch i is for data model i mod `models`.
        whole: All processes.
        mine: The numbers of the data models that this process works on, of those that a step draws.
        crew: The processes that work on the same data model.
    """

    models: int
    batches: int
    whole: Team
    mine: range
    crew: Team

    def draw(self, count: int, rng: torch.Generator) -> list[int]:
        """The data models of the next step, all different, out of so many."""
        if self.models == 1:
            return [int(torch.randint(count, (), generator=rng))]
        return torch.randperm(count, generator=rng)[: self.models].tolist()

    def parts(self, size: int) -> Iterator[slice] | None:
        """What this process reads of each mini-batch, step after step; None: all of it."""
        if self.models == 1 or self.whole.size == 1:
            return self.crew.parts([size] * self.batches)
        own = (number % self.models in self.mine for number in range(self.batches))
        return itertools.cycle([slice(0, size if is_own else 0) for is_own in own])


def shares_of(config: MetaTrain, whole: Team) -> Shares:
    """This process's part; TrainingError if the data models of a step cannot be dealt out evenly."""
    if config.models == 1:
        return Shares(1, config.batches, whole, range(1), whole)
    if config.models % whole.size:
        expected = f"1, or a multiple of the {whole.size} processes"
        got = f"meta_train.models {config.models}"
        raise TrainingError("the data models of a step cannot be shared", expected=expected, got=got)
    return Shares(config.models, config.batches, whole, range(whole.rank, config.models, whole.size), ALONE)
