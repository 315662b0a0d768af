"""The one loop that everything trains in: data models, fine-tuning and the metanetwork."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gmn.bookmark import Bookmark, Place, set_random_numbers
from gmn.distributed import team
from gmn.guard import Guard, Item, Metrics, Pieces
from gmn.progress import say, track
from gmn.stages import spend


def run_epochs(
    epochs: int,
    steps: int,
    batches: Callable[[int], Iterable[Item]],
    step: Callable[[Item], Metrics],
    optimizer: Optimizer,
    schedule: LambdaLR,
    *,
    model: nn.Module,
    seed: int,
    title: str,
    start: int = 0,
    log: Callable[[Metrics], None] | None = None,
    after_epoch: Callable[[int], bool | None] | None = None,
    average: nn.Module | None = None,
    bookmark: Bookmark | None = None,
    pieces: Pieces | None = None,
) -> None:
    """The loop: `step` leaves gradients, the optimizer takes them; `after_epoch` may save, and says True to stop.

    Args:
        epochs, steps: Number of epochs, and of steps in each.
        batches: Of an epoch, the same whenever it is asked for.
        step: Computes the gradients of one step and returns its metrics.
        model, average: What is trained, and averaged weights that belong to it.
        start: First epoch, when a run is resumed; the schedule stands there.
        log: Gets the mean metrics of each epoch, and `skipped`, the number of steps not taken, where there are such.
        bookmark: Where a long training is kept, and goes on from.
        pieces: How `step` cuts mini-batches; of several processes none cuts them further.

    Raises:
        TrainingError: if loss or gradient is NaN or infinite several times in a row.
    """
    modules = {"model": model} if average is None else {"model": model, "average": average}
    guard = Guard(title, model, optimizer, schedule, epochs * steps, pieces)
    found = bookmark and bookmark.restore(modules, optimizer, start, epochs, steps)
    place, random = found or (Place(start), {})
    done = _go_on(title, place, start, steps, schedule) if place.seconds else 0
    with track(title, (epochs - start) * steps, done) as advance, torch.random.fork_rng(devices=[]):
        for epoch in range(place.epoch, epochs):
            torch.manual_seed(seed * 100_003 + epoch + 7919 * team().rank)  # dropout and the like
            place = place if place.epoch == epoch else Place(epoch, in_a_row=place.in_a_row, seconds=place.seconds)
            began = time.perf_counter() - (place.seconds.pop() if place.step else 0.0)
            place.seconds.append(0.0)
            if place.step == steps:  # that one is only to be logged
                random.clear()
            for item in itertools.islice(batches(epoch), place.step, None) if place.step < steps else ():
                set_random_numbers(random)
                _add(place, metrics := guard.take(step, item, place), steps)
                place.seconds[-1] = time.perf_counter() - began
                advance(", ".join(f"{key} {value:.3g}" for key, value in (metrics or {}).items()))
                if bookmark and bookmark.is_due():
                    bookmark.save(place, modules, optimizer)
            if log:
                log({"epoch": epoch + 1, **_means(place, steps)})
            if after_epoch and after_epoch(epoch):
                break
        if bookmark and bookmark.is_due(done=True):  # what it is part of may still be killed
            bookmark.save(place, modules, optimizer)


def _go_on(title: str, place: Place, start: int, steps: int, schedule: LambdaLR) -> int:
    """Bring schedule and stopwatch from the beginning of epoch `start` to where the training stands; steps between."""
    say(f"{title} goes on in epoch {place.epoch + 1}, after {place.step} steps")
    spend(place.since(start))
    done = (place.epoch - start) * steps + place.step
    schedule.last_epoch += done
    for group, rate, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(schedule.last_epoch)
    return done


def _add(place: Place, metrics: Metrics | None, steps: int) -> None:
    """Count a step; None is one that was skipped."""
    place.step += 1
    place.skipped += metrics is None
    for key, value in (metrics or {}).items():
        place.sums[key] = place.sums.get(key, 0.0) + value / steps


def _means(place: Place, steps: int) -> Metrics:
    """The means of an epoch's metrics over the steps that were taken."""
    if not place.skipped:
        return dict(place.sums)
    taken = max(1, place.step - place.skipped)
    return {key: value * steps / taken for key, value in place.sums.items()} | {"skipped": place.skipped}
