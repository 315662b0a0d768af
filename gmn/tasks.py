"""Tasks: a few classes of a data set, and the pre-trained network with a head for them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmn.data import Data, Split
from gmn.errors import DataError, NetworkError
from gmn.graph import GraphSpec
from gmn.trace import clone
from gmn.zoo_task import Split as Part
from gmn.zoo_task import Task


def sample_tasks(class_names: Sequence[str], sizes: Sequence[int], zoo: int, targets: int, *, seed: int) -> list[Task]:
    """Different sets of classes, first those of the zoo, then the targets; sizes take turns.

    Args:
        class_names: Of the data set.
        sizes: Numbers of classes of a task, such as 3, 5, 10.
        zoo, targets: How many tasks of each.
        seed: Of the choice; more tasks of the same seed begin with the same ones.

    Raises:
        DataError: if there are not so many different sets of classes.

    >>> [task.classes for task in sample_tasks(["a", "b", "c"], [2], 2, 1, seed=0)]
    [(0, 2), (1, 2), (0, 1)]
    """
    total, generator = len(class_names), torch.Generator().manual_seed(seed)
    wanted = dict.fromkeys(sizes, 0)
    for size in itertools.islice(itertools.cycle(sizes), zoo + targets):
        wanted[size] += 1
    for size, count in wanted.items():
        if not 2 <= size <= total or count > math.comb(total, size):
            expected = f"{count} different tasks of {size} of {total} classes"
            raise DataError("too few classes for so many tasks", expected=expected, got=str(math.comb(total, size)))
    seen: set[tuple[int, ...]] = set()
    tasks: list[Task] = []
    for number, size in enumerate(itertools.islice(itertools.cycle(sizes), zoo + targets)):
        classes = _draw(total, size, generator)
        while classes in seen:
            classes = _draw(total, size, generator)
        seen.add(classes)
        split: Part = "zoo" if number < zoo else "target"
        names = tuple(class_names[c] for c in classes)
        tasks.append(Task(f"{split}-{number:05d}", classes, names, split, seed=seed + number))
    return tasks


def _draw(total: int, size: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randperm(total, generator=generator)[:size].sort().values.tolist())


def task_data(data: Data, classes: Sequence[int]) -> Data:
    """The images of some classes, which are numbered anew from 0 on in the given order.

    Raises:
        DataError: if a class is none of the data set's.
    """
    unknown = [c for c in classes if not 0 <= c < data.num_classes]
    if unknown:
        raise DataError("no such class", expected=f"0 to {data.num_classes - 1}", got=str(unknown))
    number = torch.full((data.num_classes,), -1)
    number[torch.tensor(classes)] = torch.arange(len(classes))
    splits = {name: _of_classes(getattr(data, name), number) for name in ("train", "val", "test")}
    return dataclasses.replace(data, **splits, class_names=tuple(data.class_names[c] for c in classes))


def _of_classes(split: Split, number: Tensor) -> Split:
    labels = number.to(split.labels.device)[split.labels]
    subset = split.subset((labels >= 0).nonzero().flatten().cpu())
    return dataclasses.replace(subset, labels=labels[labels >= 0])


def with_head(model: nn.Module, name: str, classes: int, *, seed: int) -> nn.Module:
    """A copy of a network whose head, the linear layer of that name, is a new one for so many classes.

    Raises:
        NetworkError: if it is no linear layer.
    """
    copy = clone(model)
    old = copy.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise NetworkError("no head to replace", expected="a linear layer", got=type(old).__name__, where=name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    owner, _, key = name.rpartition(".")
    setattr(copy.get_submodule(owner), key, new.to(old.weight))
    return copy


def head_of(spec: GraphSpec) -> str:
    """The layer that makes the network's output, by name.

    Raises:
        NetworkError: if it is not one layer, whose nodes are the last.
    """
    ends = {nodes for nodes, reason in spec.frozen if reason == "network output"}
    last = spec.groups[-1]
    if ends != {(last.start, last.size)}:
        raise NetworkError(
            "no head to replace", expected="an output made by the last layer alone", got=str(sorted(ends))
        )
    return last.name
