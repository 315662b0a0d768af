"""Filling a zoo: the one pre-trained network, pruned for every task that is planned."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from gmn.backbone import Backbone, prototypes
from gmn.costs import cost
from gmn.data import Augment, Data, Split
from gmn.errors import GmnError
from gmn.filter_pruning import Shrunk, filter_prune
from gmn.head_pruning import head_prune
from gmn.progress import say, track
from gmn.settings_vote import FilterPruning, HeadPruning
from gmn.tasks import task_data
from gmn.training import evaluate
from gmn.zoo import Stored, Task, Zoo

WAIT = 0.5  # seconds between two looks at what other processes do
STALE = 3600.0  # seconds after which a task is taken from a process of another machine, which may be dead

Pruner = Callable[[nn.Module, Split, int], Shrunk]  # of a network with a head, on images, with a seed


def pruner(
    config: FilterPruning | HeadPruning, example_inputs: Any, ratio: float, *, augment: Augment | None = None
) -> Pruner:
    """IFP or AHNP with its numbers, to a ratio."""

    def prune(model: nn.Module, split: Split, seed: int) -> Shrunk:
        options: dict[str, Any] = {"ratio": ratio, "seed": seed, "augment": augment}
        if isinstance(config, HeadPruning):
            return head_prune(model, split, config, example_inputs, **options)
        return filter_prune(model, split, config, example_inputs, **options)

    return prune


def build_zoo(backbone: Backbone, data: Data, zoo: Zoo, prune: Pruner, *, worker: str = "build") -> int:
    """Prune the network for every task that is planned, beside other processes; returns how many were done here.

    A task that fails is noted in the zoo, and the next one is taken. At the end no task is planned any more: those that
    other processes work on are waited for, so that all of them go on with the same zoo.
    """
    done, waiting = 0, zoo.counts()["planned"]
    with track("pruning tasks for the zoo", waiting) as advance:
        for task in _claimed(zoo, worker):
            try:
                task = add_pruned(backbone, data, zoo, task, prune)
                done, before, waiting = done + 1, waiting, zoo.counts()["planned"]
                advance(f"{task.name}: {task.metrics['accuracy']:.1%}", before - waiting)  # others work on it too
            except GmnError as error:
                zoo.fail(task, error)
                say(f"{task.name} failed: {error}")
            except BaseException:  # Ctrl-C too: nobody works on the task any more
                zoo.release(task)
                raise
    return done


def _claimed(zoo: Zoo, worker: str) -> Iterator[Task]:
    """The tasks that this process is to work on, those that a dying process leaves included."""
    told = False
    while True:
        if (task := zoo.claim(worker)) is not None:
            yield task
        elif others := zoo.tasks(status="planned"):
            if not told:
                say(f"waiting for other processes, which work on {', '.join(task.name for task in others)}")
            told = True
            time.sleep(WAIT)
            zoo.release_stale(STALE)
        else:
            return


def add_pruned(backbone: Backbone, data: Data, zoo: Zoo, task: Task, prune: Pruner) -> Task:
    """Prune the network for a task and keep what was found; the accuracy is that on validation images.

    Raises:
        GmnError: if the task cannot be done, or the zoo has it.
    """
    own = task_data(data, task.classes)
    model = backbone.with_head(len(task.classes), seed=task.seed)
    found = stored(backbone, zoo, own, task, prune(model, own.train, task.seed))
    return zoo.add(found.task, found.keep, found.weights, found.extra)


def stored(backbone: Backbone, zoo: Zoo, own: Data, task: Task, shrunk: Shrunk) -> Stored:
    """What a zoo keeps of a task: its mask, weights, prototypes, accuracy on validation images, and cost.

    Args:
        own: The task's data.
    """
    price = cost(shrunk.model, backbone.example)
    metrics = {"accuracy": evaluate(shrunk.model, own.val).accuracy, "training_flops": shrunk.training_flops}
    task = dataclasses.replace(task, metrics=metrics, flops=price.flops, parameters=price.parameters)
    extra = {"prototypes": prototypes(backbone, own)}
    keep = backbone.widened(shrunk.keep.keep)
    return Stored(task, zoo.identity, keep, dict(shrunk.model.state_dict()), extra)
