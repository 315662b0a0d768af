"""The one pre-trained network that all tasks of a zoo share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gmn.batches import moved
from gmn.convert import to_graph
from gmn.data import Data
from gmn.errors import CheckpointError, GmnError, of_machine
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask, inside
from gmn.state_dict import checksum
from gmn.surgery import remove, settled
from gmn.tasks import head_of, with_head
from gmn.trace import clone, evaluation
from gmn.zoo import fingerprint
from gmn.zoo_task import WEIGHTS


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
    def of(cls, model: nn.Module, example_inputs: Any, *, only_inside: bool = False) -> Backbone:
        """Read a network's graph once for all tasks; `only_inside` keeps its residual streams whole."""
        spec = to_graph(model, example_inputs).spec
        coupled = settled(model, spec, example_inputs)
        return cls(model, example_inputs, spec, inside(spec, coupled) if only_inside else coupled, head_of(spec))

    def to(self, device: torch.device) -> Backbone:
        """The same network on a device: a copy, unless it is there."""
        here = next(self.model.parameters()).device == device
        return self if here else replace(self, model=clone(self.model).to(device), example=moved(self.example, device))

    def about(self, **more: Any) -> dict[str, Any]:
        """What a zoo says of its tasks' network."""
        own = {"nodes": self.spec.num_nodes, "fingerprint": fingerprint(self.spec)}
        return {**own, WEIGHTS: checksum(self.model.state_dict()), **more}

    def with_head(self, classes: int, *, seed: int) -> nn.Module:
        """A copy of the network with a new head for so many classes."""
        return with_head(self.model, self.head, classes, seed=seed)

    def widened(self, keep: Tensor) -> Tensor:
        """[N] bool from a mask of the same network with another head: the nodes of the head, the last ones, stay."""
        own = torch.ones(self.spec.num_nodes, dtype=torch.bool)
        start = self.spec.groups[-1].start
        own[:start] = keep[:start]
        return own

    def rebuilt(self, keep: KeepMask, weights: Mapping[str, Tensor]) -> nn.Module:
        """The pruned network of a task from its mask and weights; CheckpointError if they are not those of one."""
        try:
            smaller = remove(self.model, self.spec, keep, self.example, coupled=self.coupled)
            model = with_head(smaller, self.head, len(weights[f"{self.head}.weight"]), seed=0)
            model.load_state_dict(weights)
        except (GmnError, KeyError, TypeError, RuntimeError) as error:
            if of_machine(error):
                raise
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise CheckpointError("not the weights of a task", got=last) from error
        return model.eval()


def cut_inside(about: Mapping[str, Any]) -> bool:
    """Whether the tasks of a zoo keep their residual streams whole, from what the zoo says of itself."""
    return about.get("only_inside") is True or about.get("pruner") == "heads"


PROTOTYPE_IMAGES = 50
"""Training images of a class that its prototype is the mean of."""


def prototypes(backbone: Backbone, data: Data, *, per_class: int = PROTOTYPE_IMAGES) -> Tensor:
    """[classes, D]: mean of what the pre-trained network's head reads, over some training images of each class."""
    seen: list[Tensor] = []
    layer = backbone.model.get_submodule(backbone.head)
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        means = []
        for label in range(data.num_classes):
            index = (data.train.labels == label).nonzero().flatten()[:per_class]
            seen.clear()
            with evaluation(backbone.model), torch.no_grad():
                for images, _ in data.train.subset(index).batches(PROTOTYPE_IMAGES):
                    backbone.model(images)
            means.append(torch.cat(seen).flatten(1).mean(0))
    finally:
        hook.remove()
    return torch.stack(means).cpu()
