"""Steps of a training that may go wrong: what is not finite is skipped, what does not fit into memory is cut up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gmn.bookmark import Place
from gmn.distributed import team
from gmn.errors import TrainingError
from gmn.progress import say

PATIENCE = 5
"""So many skipped steps in a row end a training; one that has fewer steps ends when all are skipped."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Metrics = dict[str, float]


class Pieces:
    """Into how many pieces mini-batches are cut; doubled whenever the accelerator's memory does not suffice.

    Sums of gradients over pieces are those of the whole, to rounding. Only norms that learn from the batch's own
    statistics see smaller batches.

    Args:
        title: Of the training, for the line that is said.
        images: In a mini-batch.
        least: Images that a piece must have: 1, or 2 where norms learn from the batch.
        count: Pieces at the beginning.

    >>> pieces = Pieces("training", 4)
    >>> pieces.count = 2
    >>> [len(labels) for _, labels in pieces.cut((torch.zeros(4, 3), torch.zeros(4)))]
    [2, 2]
    """

    def __init__(self, title: str, images: int, *, least: int = 1, count: int = 1) -> None:
        self.title, self.images, self.least, self.count, self.asked = title, images, least, count, count

    @property
    def metrics(self) -> Metrics:
        """How many there are, where they are more than were asked for."""
        return {"pieces": self.count} if self.count > self.asked else {}

    def cut(self, batch: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces of a mini-batch."""
        if self.count == 1:
            return iter([batch])
        count = max(1, min(self.count, len(batch[1]) // self.least))
        return zip(*(part.tensor_split(count) for part in batch), strict=True)

    def read(self, model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """What a network in eval mode answers to a batch, without gradients: the same however it is cut."""
        return self._whole(lambda: torch.cat([model(images) for images, _ in self.cut(batch)]))

    def total(
        self, compute: Callable[[Tensor, Tensor], Sequence[Tensor]], batch: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        """Sums over a batch of what is computed of each piece."""

        def sums() -> list[Tensor]:
            pieces = self.cut(batch)
            found = list(compute(*next(pieces)))
            for piece in pieces:
                for at, more in enumerate(compute(*piece)):
                    found[at] = found[at] + more
            return found

        return self._whole(sums)

    def _whole(self, compute: Callable[[], Answer]) -> Answer:
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                if not self.double():
                    raise

    def double(self) -> bool:
        """Cut into twice as many from now on; whether that was possible."""
        if self.images // (2 * self.count) < self.least:
            return False
        self.count *= 2
        torch.cuda.empty_cache()
        say(f"warning: {self.title}: out of memory; from now on a mini-batch is read in {self.count} pieces")
        return True


class Guard:
    """Takes the steps of a training.

    Args:
        title: Of the training, in errors.
        model: Whose buffers (the statistics of norms) are as before after a step that is not taken.
        optimizer, schedule: What takes a step; the schedule advances in any case.
        steps: Of the whole training, those before a resume too.
        pieces: How `step` cuts what it gets, if it does.
    """

    def __init__(
        self, title: str, model: nn.Module, optimizer: Optimizer, schedule: LambdaLR, steps: int, pieces: Pieces | None
    ) -> None:
        # a process that repeats a step would send the others what they do not wait for
        self.title, self.model, self.pieces = title, model, pieces if team().size == 1 else None
        self.optimizer, self.schedule = optimizer, schedule
        self.patience = min(PATIENCE, steps)

    def take(self, step: Callable[[Item], Metrics], item: Item, place: Place) -> Metrics | None:
        """Compute gradients and let the optimizer step; None if something was not finite and the step was not taken.

        Args:
            step, item: What computes the gradients, and of what.
            place: Where the training stands; its `in_a_row` is counted.

        Raises:
            TrainingError: if that is so for `PATIENCE` steps in a row.
            torch.OutOfMemoryError: if the smallest pieces are too large.
        """
        before = [buffer.clone() for buffer in self.model.buffers()]
        metrics = self._gradients(step, item, before)
        bad = self._not_finite(metrics)
        if bad is None:
            place.in_a_row = 0
            self.optimizer.step()
            self.schedule.step()
            return metrics
        self._restore(before)
        self._count(*bad, place)
        with warnings.catch_warnings():  # a schedule that is ahead of its optimizer is meant
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()
        return None

    def _gradients(self, step: Callable[[Item], Metrics], item: Item, before: list[Tensor]) -> Metrics:
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return step(item)
            except torch.OutOfMemoryError:
                if self.pieces is None or not self.pieces.double():
                    raise
            self._restore(before)  # out here, where nothing of the failed pass is held any more

    def _restore(self, before: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)

    def _not_finite(self, metrics: Metrics) -> tuple[str, float] | None:
        """What of the metrics or the gradient is NaN or infinite, with its value."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                return name, value
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        largest = float(get_total_norm(gradients, math.inf))
        return None if math.isfinite(largest) else ("gradient", largest)

    def _count(self, name: str, value: float, place: Place) -> None:
        place.in_a_row += 1
        where = f"epoch {place.epoch + 1}"
        if place.in_a_row >= self.patience:
            got = f"{value} in {place.in_a_row} steps in a row"
            hint = "lower the learning rate, or look for images or weights that are not finite"
            raise TrainingError(f"{self.title}: {name} is not finite", got=got, where=where, hint=hint)
        say(f"warning: {self.title}: {name} is {value} in {where}; the step is skipped")
