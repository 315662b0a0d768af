"""Iterative filter pruning (IFP): fine-tune on a task and drop the units that matter least to it (MVP, section 3.1).

    p = 1 - (1 - r)^(1 / floor(J / h))        every h of J iterations, p of the units that are left go

A unit is a coupled channel, so that whatever must go together is scored and dropped as one. The network is really cut
each time: later iterations are cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmn.convert import to_graph
from gmn.costs import training_flops
from gmn.criteria import Importance
from gmn.data import Augment, Split
from gmn.errors import PruningError
from gmn.gradients import loss_gradients
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask, inside
from gmn.guard import Pieces
from gmn.ranking import refuse_whole
from gmn.settings import Criterion, Fit
from gmn.settings_vote import FilterPruning
from gmn.surgery import remove, settled
from gmn.tasks import head_of
from gmn.trace import clone, evaluation
from gmn.training import fit, generator


@dataclass(frozen=True)
class Shrunk:
    """A network cut for a task, the nodes of the original network that it kept, and what that cost in FLOPs."""

    model: nn.Module
    keep: KeepMask
    training_flops: float


def filter_prune(
    model: nn.Module,
    split: Split,
    config: FilterPruning,
    example_inputs: Any,
    *,
    ratio: float,
    seed: int = 0,
    augment: Augment | None = None,
) -> Shrunk:
    """Fine-tune a network on a task's images while its least active units are dropped; the network is not changed.

    Args:
        model: The pre-trained network with a head for the task.
        split: The task's training images.
        config: Iterations and scores.
        example_inputs: For the graph.
        ratio: Share of each layer's units that goes.
        seed: Of the order of the images.
        augment: Random changes of the images in training.

    Raises:
        PruningError: if nothing can be removed.
        TrainingError: if loss or gradient is NaN or infinite several times in a row.
    """
    spec = to_graph(model, example_inputs).spec
    coupled = settled(model, spec, example_inputs)
    coupled = inside(spec, coupled) if config.only_inside else coupled
    refuse_whole(coupled)
    floor = coupled.left_after(ratio)
    nodes = torch.arange(spec.num_nodes)  # of the original network, those that are left
    rounds = max(1, config.iterations // config.interval)
    share = 1 - (1 - ratio) ** (1 / rounds)
    current = clone(model)
    stages = _Stages(split, config, example_inputs, seed * 1009, augment)
    stages.train_head(current, head_of(spec), config.head_iterations)
    for number in range(rounds):
        stages.train(current, config.interval)
        spec_now = to_graph(current, example_inputs).spec
        left = _restrict(coupled, nodes)
        own = share if number < rounds - 1 else 1.0  # the last round goes down to the floor, whatever was rounded
        keep = _weakest_dropped(_scores(current, spec_now, left, split, config), left, floor, own)
        stages.count_scores(current)
        mask = KeepMask(left.nodes(keep))
        current = remove(current, spec_now, mask, example_inputs, coupled=left)
        nodes = nodes[mask.keep]
    stages.train(current, config.iterations - rounds * config.interval + config.final_iterations, decay=config.decay)
    kept = torch.zeros(spec.num_nodes, dtype=torch.bool)
    kept[nodes] = True
    return Shrunk(current, KeepMask(kept).validate(spec, coupled), stages.flops)


class _HeadAlone(nn.Module):
    """A network whose head is trained: its norms read their running statistics, and keep them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def train(self, mode: bool = True) -> _HeadAlone:
        super().train(mode)
        self.model.eval()
        return self


class _Stages:
    """The trainings between the rounds, each with a seed of its own, and the FLOPs of them all."""

    def __init__(
        self, split: Split, config: FilterPruning, example_inputs: Any, seed: int, augment: Augment | None = None
    ) -> None:
        self.split, self.config, self.example, self.seed, self.augment = split, config, example_inputs, seed, augment
        self.flops = 0.0

    def train(self, model: nn.Module, iterations: int, *, decay: bool = False, passes: int = 3) -> None:
        """So many steps on all parameters that may change; `passes` is what a step costs, see `_count`."""
        config = self.config
        if iterations > 0:
            steps = Fit(
                epochs=1,
                iterations=iterations,
                lr=config.lr,
                schedule="cosine" if decay else "multistep",
                batch_size=config.batch_size,
                bf16=config.bf16,
            )
            fit(model, self.split, steps, seed=self.seed, augment=self.augment, title="filter pruning")
            self._count(model, iterations * min(config.batch_size, len(self.split)), passes)
        self.seed += 1

    def train_head(self, model: nn.Module, head: str, iterations: int) -> None:
        """So many steps on the head alone: a forward pass through the network, all else is next to nothing."""
        wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[0] == head)
        self.train(_HeadAlone(model), iterations, passes=1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])

    def count_scores(self, model: nn.Module) -> None:
        """The passes over the images for the scores: forward only, or forward and backward."""
        self._count(model, min(self.config.score_images, len(self.split)), 3 if self.config.score == "taylor" else 1)

    def _count(self, model: nn.Module, images: int, passes: int) -> None:
        """Add the FLOPs of so many passes over images: a forward pass is one, a backward pass counts as two."""
        self.flops += training_flops(model, self.example, images) / 3 * passes


def _restrict(coupled: Couplings, nodes: Tensor) -> Couplings:
    """The couplings of what is left: nodes, channels and groups keep their order, groups their numbers."""
    channels, channel = coupled.channel[nodes].unique(return_inverse=True)
    return Couplings(channel, coupled.group[channels], coupled.names, coupled.frozen)


def _weakest_dropped(scores: Tensor, coupled: Couplings, floor: Tensor, share: float) -> Tensor:
    """[channels] bool: what stays when every layer drops that share of its weakest, down to its floor."""
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    for g in coupled.group[coupled.prunable].unique().tolist():
        members = (coupled.group == g).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - int(floor[g]))
        keep[members[scores[members].argsort(stable=True)[: max(count, 0)]]] = False
    return keep


# -- scores ------------------------------------------------------------------------------------------------------------


def _scores(model: nn.Module, spec: GraphSpec, coupled: Couplings, split: Split, config: FilterPruning) -> Tensor:
    """[channels]: how much each unit matters to the task: what it puts out, or w dL/dw summed over its numbers."""
    if config.score == "taylor":
        importance = Importance(spec, coupled, Criterion(score="taylor"))
        gradients = loss_gradients(model, split, config.score_images, batch_size=config.batch_size)
        return importance.raw(dict(model.state_dict()), gradients).cpu()
    limit = min(config.score_images, len(split))
    images = split.batches(config.batch_size, generator=generator(0, 0), limit=limit)  # those that gradients are of
    return _activation(model, spec, coupled, list(images), Pieces("scores of filters", config.batch_size))


def _activation(
    model: nn.Module, spec: GraphSpec, coupled: Couplings, batches: list[tuple[Tensor, Tensor]], pieces: Pieces
) -> Tensor:
    """Size of what a unit puts out after its norm: mean over positions, sum over images and coupled layers.

    Raises:
        PruningError: if units are put out by no module of their own, as the heads of a fused q, k and v are.
    """
    totals, own = torch.zeros(spec.num_nodes), torch.zeros(spec.num_nodes)
    seen = torch.zeros(spec.num_nodes, dtype=torch.bool)
    with _watched(model, spec, own, seen), evaluation(model), torch.no_grad():
        for batch in batches:

            def sizes(images: Tensor, _: Tensor) -> list[Tensor]:
                own.zero_()
                model(images)
                return [own * len(images)]

            totals += pieces.total(sizes, batch)[0]
    unseen = coupled.prunable & ~torch.isin(torch.arange(coupled.num_channels), coupled.channel[seen])
    if bool(unseen.any()):
        where = coupled.names[int(coupled.group[unseen][0])]
        hint = "zoo.filters.score: taylor reads gradients; zoo.pruner: heads is for transformers"
        raise PruningError("units without an activation to score", where=where, hint=hint)
    return torch.zeros(coupled.num_channels).index_add_(0, coupled.channel, totals)


@contextmanager
def _watched(model: nn.Module, spec: GraphSpec, totals: Tensor, seen: Tensor) -> Iterator[None]:
    """Hooks on the module that puts out each layer's channels: its norm, or the layer itself."""
    owners = {(group.start, group.size): group.name for group in spec.groups}
    for slot in spec.node_slots:  # a norm that lies on the layer's nodes comes after the layer
        if spec.columns[slot.column] == "norm.weight":
            owners[slot.nodes] = slot.param.rpartition(".")[0]
    modules = dict(model.named_modules())

    def hook(start: int, size: int) -> Any:
        def add(module: nn.Module, _: Any, output: Any) -> None:
            axis = _channel_axis(module, output, size) if isinstance(output, Tensor) else None
            if axis is not None:
                rest = [d for d in range(output.dim()) if d != axis]
                totals[start : start + size] += F.relu(output).mean(rest).cpu()
                seen[start : start + size] = True

        return add

    handles = [modules[n].register_forward_hook(hook(*nodes)) for nodes, n in owners.items() if n and n in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_axis(module: nn.Module, output: Tensor, size: int) -> int | None:
    """Where a module's output has its channels; a subclass of a norm over the last axis may have them second."""
    last = isinstance(module, (nn.Linear, nn.Embedding)) or type(module) in (nn.LayerNorm, nn.RMSNorm)
    axes = (output.dim() - 1,) if last else (1, output.dim() - 1)
    return next((axis for axis in axes if output.dim() > 1 and output.shape[axis] == size), None)
