"""Meta-vote pruning: a zoo of tasks, and the sub-network that the nearest of them vote for (MVP, algorithm 1).

build_zoo       one pre-trained network, pruned for every planned task
nearest         the tasks of the zoo that are most like a new one
vote_for        their vote, the means of their numbers, a new head, and a short fine-tuning
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmn.convert import to_graph
from gmn.costs import cost
from gmn.data import Data
from gmn.errors import GmnError
from gmn.filter_pruning import filter_prune
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask
from gmn.masks import entries
from gmn.settings import FilterPruning, Fit
from gmn.similarity import Similarity, TaskView, rank
from gmn.surgery import remove, resize, settled
from gmn.tasks import head_of, task_data, with_head
from gmn.trace import clone
from gmn.training import evaluate, fit
from gmn.vote import TEMPERATURE, average, vote
from gmn.zoo import Task, Zoo, fingerprint


@dataclass(frozen=True)
class Backbone:
    """A pre-trained network as all tasks share it; masks are over the nodes of its graph, its own head included.

    Attributes:
        model: The network.
        example: Example inputs.
        spec, coupled: Its graph's structure and couplings.
        head: The layer that every task replaces.
    """

    model: nn.Module
    example: Any
    spec: GraphSpec
    coupled: Couplings
    head: str

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> Backbone:
        """Read a network's graph once for all tasks."""
        spec = to_graph(model, example_inputs).spec
        return cls(model, example_inputs, spec, settled(model, spec, example_inputs), head_of(spec))

    def about(self, **more: Any) -> dict[str, Any]:
        """What a zoo says of its tasks' network."""
        return {"nodes": self.spec.num_nodes, "fingerprint": fingerprint(self.spec), **more}

    def widened(self, keep: Tensor) -> Tensor:
        """[N] bool from a mask of the same network with another head: the nodes of the head, the last ones, stay."""
        own = torch.ones(self.spec.num_nodes, dtype=torch.bool)
        start = self.spec.groups[-1].start
        own[:start] = keep[:start]
        return own

    def rebuilt(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The pruned network of a task from its stored weights."""
        classes = len(weights[f"{self.head}.weight"])
        model = with_head(self.model, self.example, classes, seed=0)
        resize(model, {name: tensor.shape for name, tensor in weights.items()}).load_state_dict(weights)
        return model.eval()


def build_zoo(backbone: Backbone, data: Data, zoo: Zoo, config: FilterPruning, *, worker: str = "build") -> int:
    """Prune the network for every task that is planned and that nobody works on; returns how many were done.

    A task that fails is noted in the zoo, and the next one is taken.
    """
    done = 0
    while (task := zoo.claim(worker)) is not None:
        try:
            zoo.add(*_pruned(backbone, data, task, config))
            done += 1
        except GmnError as error:
            zoo.fail(task, error)
        except BaseException:  # Ctrl-C too: nobody works on the task any more
            zoo.release(task)
            raise
    return done


def _pruned(
    backbone: Backbone, data: Data, task: Task, config: FilterPruning
) -> tuple[Task, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    own = task_data(data, task.classes)
    model = with_head(backbone.model, backbone.example, len(task.classes), seed=task.seed)
    shrunk = filter_prune(model, own.train, config, backbone.example, seed=task.seed)
    price = cost(shrunk.model, backbone.example)
    metrics = {"accuracy": evaluate(shrunk.model, own.val).accuracy}
    task = dataclasses.replace(task, metrics=metrics, flops=price.flops, parameters=price.parameters)
    extra = {"prototypes": prototypes(backbone, own)}
    return task, backbone.widened(shrunk.keep.keep), dict(shrunk.model.state_dict()), extra


def prototypes(backbone: Backbone, data: Data, *, per_class: int = 50) -> Tensor:
    """[classes, D]: mean of what the pre-trained network's head reads, over some training images of each class."""
    seen: list[Tensor] = []
    layer = backbone.model.get_submodule(backbone.head)
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        means = []
        for label in range(data.num_classes):
            index = (data.train.labels == label).nonzero().flatten()[:per_class]
            seen.clear()
            evaluate(backbone.model, data.train.subset(index))
            means.append(torch.cat(seen).flatten(1).mean(0))
    finally:
        hook.remove()
    return torch.stack(means).cpu()


def nearest(
    backbone: Backbone,
    zoo: Zoo,
    data: Data,
    similarity: Similarity,
    count: int,
    *,
    parents: Mapping[str, str] | None = None,
) -> list[str]:
    """The zoo's tasks that are most like the task whose data this is, nearest first.

    Args:
        data: The target task's data.
        similarity: How tasks are compared.
        count: How many.
        parents: Parent class of each class name, for similarities that use them.

    Raises:
        GmnError: if the zoo has not so many tasks.
    """
    tasks = zoo.tasks(split="zoo")
    if len(tasks) < count:
        raise GmnError("the zoo is too small", expected=f"{count} tasks that are done", got=str(len(tasks)))
    target = _view(data.class_names, prototypes(backbone, data), parents, data)
    views = [_neighbour(backbone, zoo, task, data, parents) for task in tasks]
    return [tasks[index].name for index, _ in rank(similarity, target, views)[:count]]


def _view(names: Sequence[str], means: Tensor, parents: Mapping[str, str] | None, data: Data | None) -> TaskView:
    above = tuple(parents[name] for name in names) if parents else ()
    return TaskView(tuple(names), above, means, data.train.labels.cpu() if data else None)


def _neighbour(backbone: Backbone, zoo: Zoo, task: Task, data: Data, parents: Mapping[str, str] | None) -> TaskView:
    def predict(_: TaskView) -> Tensor:
        model = backbone.rebuilt(zoo.load(task.name)[2])
        with torch.no_grad():
            return torch.cat([F.softmax(model(images), 1).cpu() for images, _ in data.train.batches(500)])

    view = _view(task.class_names, zoo.load_extra(task.name)["prototypes"], parents, None)
    return dataclasses.replace(view, predict=predict)


def vote_for(
    backbone: Backbone,
    zoo: Zoo,
    neighbours: Sequence[str],
    data: Data,
    config: Fit,
    *,
    ratio: float,
    tau: float = TEMPERATURE,
    seed: int = 0,
) -> tuple[nn.Module, KeepMask]:
    """The sub-network that the neighbours vote for, fine-tuned on the target task, and the nodes it keeps.

    Args:
        neighbours: Names of tasks of the zoo.
        data: The target task's data.
        config: The fine-tuning.
        ratio: Share of each layer's units that goes.
        tau: Temperature of the vote.

    Raises:
        GmnError: if a neighbour is missing or damaged.
    """
    keeps = zoo.masks(neighbours)
    generator = torch.Generator().manual_seed(seed)
    mask = vote(keeps, backbone.coupled, ratio=ratio, generator=generator, tau=tau)
    origin = dict(backbone.model.state_dict())
    states = [_with_own_head(backbone, zoo.load(n)[2], k, origin) for n, k in zip(neighbours, keeps, strict=True)]
    full = clone(backbone.model)
    full.load_state_dict(average(backbone.spec, origin, states, keeps))
    smaller = remove(full, backbone.spec, mask, backbone.example, coupled=backbone.coupled)
    model = with_head(smaller, backbone.example, data.num_classes, seed=seed)
    fit(model, data.train, config, seed=seed, title="after the vote")
    return model, mask


def _with_own_head(
    backbone: Backbone, weights: Mapping[str, Tensor], keep: Tensor, origin: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A neighbour's numbers with the pre-trained head in place of its own, which is for other classes."""
    heads = {name: tensor.shape for name, tensor in origin.items() if name.rpartition(".")[0] == backbone.head}
    own = {name: origin[name][mask] for name, mask in entries(backbone.spec, heads, keep).items()}
    return {**weights, **own}
