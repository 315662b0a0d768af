"""Filling a zoo: the one pre-trained network, pruned for every task that is planned."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from gmn.backbone import Backbone, prototypes
from gmn.batches import moved
from gmn.costs import cost
from gmn.data import Augment, Data, Split
from gmn.engine import HERE, Engine
from gmn.errors import GmnError
from gmn.filter_pruning import Shrunk, filter_prune
from gmn.head_pruning import head_prune
from gmn.progress import say, track
from gmn.settings_vote import FilterPruning, HeadPruning
from gmn.tasks import task_data
from gmn.training import evaluate
from gmn.zoo import Stored, Task, Zoo

WAIT = 0.5  # seconds between two looks at what other processes do
COUNT = 5.0  # seconds between two counts of what is left to do: in a large zoo each takes milliseconds
STALE = 3600.0  # seconds after which a task is taken from a process of another machine, which may be dead

CPU = torch.device("cpu")
Device = Callable[[], torch.device]
Pruner = Callable[[nn.Module, Split, int], Shrunk]  # of a network with a head, on images, with a seed


def pruner(
    config: FilterPruning | HeadPruning, example_inputs: Any, ratio: float, *, augment: Augment | None = None
) -> Pruner:
    """IFP or AHNP with its numbers, to a ratio; it may travel to another machine."""
    return partial(_prune, config, moved(example_inputs, CPU), ratio, augment)


def _prune(
    config: FilterPruning | HeadPruning,
    example_inputs: Any,
    ratio: float,
    augment: Augment | None,
    model: nn.Module,
    split: Split,
    seed: int,
) -> Shrunk:
    options: dict[str, Any] = {"ratio": ratio, "seed": seed, "augment": augment}
    inputs = moved(example_inputs, split.labels.device)
    if isinstance(config, HeadPruning):
        return head_prune(model, split, config, inputs, **options)
    return filter_prune(model, split, config, inputs, **options)


def build_zoo(
    backbone: Backbone,
    data: Data,
    zoo: Zoo,
    prune: Pruner,
    *,
    worker: str = "build",
    engine: Engine = HERE,
    device: Device | None = None,
) -> int:
    """Prune the network for every task that is planned, beside other processes; returns how many were done here.

    A task that fails is noted in the zoo, and the next one is taken. At the end no task is planned any more: those that
    other processes work on are waited for, so that all of them go on with the same zoo.

    Args:
        engine: Who prunes. This process claims the tasks, also for workers elsewhere, and alone writes to the zoo.
        device: Says in a worker elsewhere where the network is to be; default: the CPU.
    """
    done, waiting, counted, told = 0, zoo.counts()["planned"], time.monotonic(), False
    if engine.remote:
        backbone, data = backbone.to(CPU), data.to(CPU)
    work = partial(prune_for, backbone, data, zoo.identity, prune, device if engine.remote else None)
    with track("pruning tasks for the zoo", waiting) as advance:
        while True:
            for task in _built(zoo, engine, work, worker):
                done, before, waiting = done + 1, waiting, waiting - 1
                if time.monotonic() - counted > COUNT:  # others work on it too
                    waiting, counted = zoo.counts()["planned"], time.monotonic()
                advance(f"{task.name}: {task.metrics['accuracy']:.1%}", before - waiting)
            others = zoo.tasks(status="planned")
            if not others:
                return done
            if not told:
                say(f"waiting for other processes, which work on {', '.join(task.name for task in others)}")
            told = True
            time.sleep(WAIT)
            zoo.release_stale(STALE)


def _built(zoo: Zoo, engine: Engine, work: Callable[[Task], Stored], worker: str) -> Iterator[Task]:
    """Claim tasks as the engine has room for them, until none is free, and keep what it finds; those that are done."""
    claimed: dict[str, Task] = {}

    def claims() -> Iterator[Task]:
        while (task := zoo.claim(worker)) is not None:
            claimed[task.name] = task
            yield task

    try:
        for task, found in engine.map(work, claims()):
            try:
                if isinstance(found, GmnError):
                    raise found
                yield zoo.add(found.task, found.keep, found.weights, found.extra)
            except GmnError as error:
                zoo.fail(task, error)
                say(f"{task.name} failed: {error}")
            claimed.pop(task.name)
    finally:  # Ctrl-C too: nobody works on these tasks any more
        for task in claimed.values():
            zoo.release(task)


def prune_for(
    backbone: Backbone, data: Data, identity: dict[str, Any], prune: Pruner, device: Device | None, task: Task
) -> Stored:
    """Prune the network for a task; the accuracy is that on validation images.

    Args:
        identity: Of the network, see `Zoo.identity`.
        device: Where, if not where the network is.

    Raises:
        GmnError: if the task cannot be done.
    """
    if device is not None:
        backbone, data = backbone.to(device()), data.to(device())
    own = task_data(data, task.classes)
    model = backbone.with_head(len(task.classes), seed=task.seed)
    return stored(backbone, identity, own, task, prune(model, own.train, task.seed))


def stored(backbone: Backbone, identity: dict[str, Any], own: Data, task: Task, shrunk: Shrunk) -> Stored:
    """What a zoo keeps of a task: its mask, weights, prototypes, accuracy on validation images, and cost.

    Args:
        identity: Of the network, see `Zoo.identity`.
        own: The task's data.
    """
    price = cost(shrunk.model, backbone.example)
    metrics = {"accuracy": evaluate(shrunk.model, own.val).accuracy, "training_flops": shrunk.training_flops}
    task = dataclasses.replace(task, metrics=metrics, flops=price.flops, parameters=price.parameters)
    extra = {"prototypes": prototypes(backbone, own)}
    keep = backbone.widened(shrunk.keep.keep)
    weights = {name: value.cpu() for name, value in shrunk.model.state_dict().items()}
    return Stored(task, identity, keep.cpu(), weights, extra)
