"""The tasks of a zoo in the order of their similarity to a new one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gmn.backbone import PROTOTYPE_IMAGES, Backbone, prototypes
from gmn.costs import cost
from gmn.data import Data
from gmn.errors import CheckpointError, GmnError
from gmn.guard import Pieces
from gmn.measures import groups_of_five
from gmn.progress import say
from gmn.similarity import Similarity, TaskView, scored
from gmn.state_dict import checksum
from gmn.zoo import Task, Zoo


@dataclass(frozen=True)
class Ranking:
    """Tasks of a zoo, nearest first.

    Attributes:
        names: Of the tasks.
        scores: Their similarity to the target.
        flops: What the search cost: forward passes over the target's images.
    """

    names: tuple[str, ...]
    scores: tuple[float, ...]
    flops: float

    def nearest(self, count: int) -> list[str]:
        """The first of them; GmnError if there are not so many."""
        if len(self.names) < count:
            raise GmnError("the zoo is too small", expected=f"{count} sound tasks", got=str(len(self.names)))
        return list(self.names[:count])

    def group(self, number: int) -> list[str]:
        """Those in one of five groups of equal intervals of similarity, 1 the nearest; it may be empty."""
        groups = groups_of_five(self.scores)
        return [name for name, group in zip(self.names, groups, strict=True) if group == number]


def ranking(
    backbone: Backbone,
    zoo: Zoo,
    data: Data,
    similarity: Similarity,
    *,
    parents: Mapping[str, str] | None = None,
    images: int = 500,
) -> Ranking:
    """Order the zoo's tasks by their similarity to the task whose data this is; damaged ones are named and left out.

    Args:
        data: The target task's data.
        similarity: How tasks are compared.
        parents: Parent class of each class name, for similarities that use them.
        images: Of the target's training images, how many neighbours predict (LEEP).

    Raises:
        GmnError: if the similarity needs what a task lacks.
    """
    search = _Search(backbone, zoo, data, parents or {}, images)
    target = search.target(similarity.reads_images)
    scores: dict[str, float] = {}
    for task in zoo.tasks(split="zoo"):
        try:  # the file is read even where names are compared: a damaged one must not vote
            view = search.neighbour(task)
            view = view if similarity.reads_images else search.view(task.class_names)
            scores[task.name] = scored(similarity, target, view)
        except CheckpointError as error:
            say(f"skipped {task.name}: {error}")
    names = sorted(scores, key=lambda name: -scores[name])  # stable: of equal scores the earlier task first
    return Ranking(tuple(names), tuple(scores[name] for name in names), search.flops)


def electorate(zoo: Zoo) -> str:
    """A digest of the tasks that can vote, of what was planned and found, not of when; damaged ones cannot.

    Every file is read, as every search for neighbours reads them.
    """
    digest = hashlib.sha256()
    for task, mask, weights in zoo.load_all([task.name for task in zoo.tasks(split="zoo")]):
        about = [task.name, task.classes, task.class_names, task.seed]
        digest.update(checksum({**weights, "": mask.keep}, about).encode())
    return digest.hexdigest()[:16]


class _Search:
    """What the tasks look like to a similarity, and the FLOPs of looking."""

    def __init__(self, backbone: Backbone, zoo: Zoo, data: Data, parents: Mapping[str, str], images: int) -> None:
        self.backbone, self.zoo, self.data, self.parents = backbone, zoo, data, parents
        self.sample = data.train.sample(images)
        self.flops = 0.0

    def view(self, names: tuple[str, ...], means: Tensor | None = None) -> TaskView:
        known = all(name in self.parents for name in names)
        return TaskView(names, tuple(self.parents[name] for name in names) if known else (), means)

    def target(self, reads_images: bool) -> TaskView:
        if not reads_images:
            return self.view(self.data.class_names)
        seen = int(torch.bincount(self.data.train.labels.cpu()).clamp(max=PROTOTYPE_IMAGES).sum())
        self.flops += seen * cost(self.backbone.model, self.backbone.example).flops
        view = self.view(self.data.class_names, prototypes(self.backbone, self.data))
        return TaskView(view.classes, view.parents, view.prototypes, self.sample.labels.cpu())

    def neighbour(self, task: Task) -> TaskView:
        try:
            view = self.view(task.class_names, self.zoo.load_extra(task.name).get("prototypes"))
        except GmnError as error:
            raise CheckpointError(str(error)) from error
        return TaskView(view.classes, view.parents, view.prototypes, None, lambda _: self.predictions(task))

    def predictions(self, task: Task) -> Tensor:
        """[images, classes of the neighbour]: what its pruned network says of the target's images."""
        _, keep, weights = self.zoo.load(task.name)
        model = self.backbone.rebuilt(keep, weights)
        self.flops += len(self.sample) * task.flops
        pieces = Pieces("search for neighbours", 500)
        with torch.no_grad():
            said = torch.cat([F.softmax(pieces.read(model, batch), 1).cpu() for batch in self.sample.batches(500)])
        if not bool(said.isfinite().all()):
            raise CheckpointError("its network's predictions are not finite")
        return said
