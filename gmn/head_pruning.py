"""Automatic head and node pruning (AHNP) of transformers: learnt scores decide what goes (MVP, section 3.1).

    loss = CE(f(x; w, s), y) + penalty * sum |s_u|      s_u = 1 at first; unit u goes when s_u < threshold

A unit is a coupled channel inside one layer, such as an attention head or a node of an MLP, never a channel of the
residual stream. Its score multiplies the columns of the weights that read it: of a head, what it hands to the output
projection, not its queries and keys. The network is cut once, at the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from gmn.address import EdgeSlot
from gmn.convert import to_graph
from gmn.costs import training_flops
from gmn.data import Augment, Split
from gmn.errors import PruningError
from gmn.filter_pruning import Shrunk
from gmn.graph import GraphSpec, group_of
from gmn.groups import Couplings, KeepMask, inside
from gmn.guard import Pieces
from gmn.ranking import refuse_whole
from gmn.settings import Fit
from gmn.settings_vote import HeadPruning
from gmn.surgery import remove, settled
from gmn.trace import clone
from gmn.training import Metrics, fit, passes, run_epochs


def head_prune(
    model: nn.Module,
    split: Split,
    config: HeadPruning,
    example_inputs: Any,
    *,
    ratio: float,
    seed: int = 0,
    augment: Augment | None = None,
) -> Shrunk:
    """Fine-tune a network on a task's images while scores choose the heads and nodes that go; it is not changed.

        w[:, k] <- s_u w[:, k]      for every column k that reads unit u, when the scores are removed

    so removing them does not change the function. Layers that have too many units left after all steps lose those
    with the lowest scores, so every layer ends at its ratio; a layer that is there is penalised no more. When all are
    there, the steps that are left of J fine-tune the cut network, as the last K do.

    Args:
        model: The pre-trained network with a head for the task.
        split: The task's training images, [n, C, H, W].
        config: Steps, learning rates, threshold and penalty of the scores.
        example_inputs: For the graph.
        ratio: Share of each layer's units that goes, in 0..1; one unit stays at least.
        seed: Of the order of the images.
        augment: Random changes of the images in training.

    Raises:
        PruningError: if nothing can be removed, or no weight reads a unit.
        TrainingError: if loss or gradient is NaN or infinite several times in a row.

    Source: MVP, section 3.1 and algorithm 3 (appendix 7.2).
    """
    spec = to_graph(model, example_inputs).spec
    coupled = inside(spec, settled(model, spec, example_inputs))
    refuse_whole(coupled)
    scored = _Scored(clone(model), spec, coupled, ratio)
    size = min(config.batch_size, len(split))
    taken = _learn_scores(scored, split, config, 2 * seed, augment)
    flops = training_flops(model, example_inputs, taken * size)
    scored.drop(math.inf)
    scored.fold()
    mask = KeepMask(coupled.nodes(scored.alive)).validate(spec, coupled)
    smaller = remove(scored.model, spec, mask, example_inputs, coupled=coupled)
    if steps := config.total - taken:
        fit(smaller, split, _last(config, steps), seed=2 * seed + 1, augment=augment, title="fine-tuning")
        flops += training_flops(smaller, example_inputs, steps * size)
    return Shrunk(smaller.eval(), mask, flops)


def _last(config: HeadPruning, steps: int) -> Fit:
    return Fit(
        epochs=1,
        iterations=steps,
        optimizer="adamw",
        lr=config.lr,
        schedule="cosine",
        batch_size=config.batch_size,
        bf16=config.bf16,
    )


class _Scored:
    """A network whose units have scores; `alive` [channels] says which are left.

    Args:
        model: The network, changed by training and by `fold`.
        spec, coupled: Its graph's structure and couplings; what is frozen has no score.
        ratio: Share of each layer's units that goes.

    Raises:
        PruningError: if no weight reads a unit.
    """

    def __init__(self, model: nn.Module, spec: GraphSpec, coupled: Couplings, ratio: float) -> None:
        self.model, self.coupled, self.floor = model, coupled, coupled.left_after(ratio)
        self.parameters = dict(model.named_parameters())
        device = next(iter(self.parameters.values())).device
        self.readers = {name: (slot, channel.to(device)) for name, (slot, channel) in _readers(spec, coupled).items()}
        self.scores = nn.Parameter(torch.ones(coupled.num_channels, device=device))
        self.alive = torch.ones(coupled.num_channels, dtype=torch.bool)

    @property
    def surplus(self) -> Tensor:
        """[groups]: how many units each layer has still to lose."""
        group = self.coupled.group[self.alive & self.coupled.prunable]
        return (torch.bincount(group, minlength=len(self.floor)) - self.floor).clamp(min=0)

    def norm(self) -> Tensor:
        """L1 norm of the scores in the layers that have units to lose."""
        pressed = self.alive & self.coupled.prunable & (self.surplus > 0)[self.coupled.group]
        return self.scores[pressed.to(self.scores.device)].abs().sum()

    def weights(self) -> dict[str, Tensor]:
        """The weights that read units, every column times the score of its unit; 0 for units that are gone."""
        learnt = (self.alive & self.coupled.prunable).to(self.scores.device)
        factors = torch.where(learnt, self.scores, self.alive.to(self.scores))
        return {
            name: _scaled(self.parameters[name], slot, factors[channel])
            for name, (slot, channel) in self.readers.items()
        }

    def drop(self, threshold: float) -> None:
        """Let go what scores less, the lowest first, until its layer is at its ratio; nothing comes back."""
        scores, surplus = self.scores.detach().cpu(), self.surplus
        low = self.alive & self.coupled.prunable & (scores < threshold)
        for g in surplus.nonzero().flatten().tolist():
            units = (low & (self.coupled.group == g)).nonzero().flatten()
            self.alive[units[scores[units].argsort(stable=True)[: int(surplus[g])]]] = False

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the scores into the weights that read the units."""
        for name, weight in self.weights().items():
            self.parameters[name].copy_(weight)


def _readers(spec: GraphSpec, coupled: Couplings) -> dict[str, tuple[EdgeSlot, Tensor]]:
    """The weights with columns that read prunable units, and the [G * I] channel that each column reads."""
    found: dict[str, tuple[EdgeSlot, Tensor]] = {}
    unread = coupled.prunable
    for name, slots in spec.weights().items():
        channel = coupled.channel[spec.read_by(slots)]
        if bool(coupled.prunable[channel].any()):
            found[name] = slots[0], channel
            unread[channel] = False
    if bool(unread.any()):
        first = int(coupled.first_nodes[unread][0])
        raise PruningError(
            "units that no weight reads cannot be scored",
            expected="a weight with a column for every unit",
            got=f"{int(unread.sum())} units without",
            where=group_of(spec, first).name,
            hint="is the layer's output used?",
        )
    return found


def _scaled(weight: Tensor, slot: EdgeSlot, factors: Tensor) -> Tensor:
    """The weight with its columns multiplied by [G * I] factors."""
    pieces, _, into, _ = slot.canonical_shape
    return slot.restore(slot.canonical(weight) * factors.to(weight).view(pieces, 1, into, 1), weight.shape)


def _learn_scores(scored: _Scored, split: Split, config: HeadPruning, seed: int, augment: Augment | None) -> int:
    """Train weights and scores until every layer is at its ratio, or for J steps; how many steps that took."""
    size, device_type, taken = min(config.batch_size, len(split)), split.labels.device.type, 0
    pieces = Pieces("head pruning", size, least=2)

    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in itertools.islice(passes(split, size, seed, augment=augment), config.iterations):
            scored.drop(config.threshold)
            if not bool(scored.surplus.any()):
                return
            yield batch

    def step(batch: tuple[Tensor, Tensor]) -> Metrics:
        nonlocal taken
        entropy, norm = 0.0, scored.norm()
        for images, labels in pieces.cut(batch):
            with torch.autocast(device_type, torch.bfloat16, enabled=config.bf16):
                logits = functional_call(scored.model, scored.weights(), (images,))
            part = F.cross_entropy(logits.float(), labels) * (len(labels) / len(batch[1]))
            part.backward()
            entropy += part.item()
        (config.penalty * norm).backward()
        taken += 1
        return {"loss": entropy, "scores": norm.item(), "to go": float(scored.surplus.sum())} | pieces.metrics

    scored.model.train()
    own = {"model": scored.model, "seed": seed, "title": "head pruning", "pieces": pieces}
    run_epochs(1, config.iterations, batches, step, *_optimizer(scored, config), **own)
    scored.model.zero_grad(set_to_none=True)
    return taken


def _optimizer(scored: _Scored, config: HeadPruning) -> tuple[AdamW, LambdaLR]:
    """One optimizer with a rate for the weights and one for the scores; the rates stay as they are."""
    weights = [p for p in scored.parameters.values() if p.requires_grad]
    groups = [
        {"params": weights, "lr": config.lr, "weight_decay": _last(config, 1).weight_decay},
        {"params": [scored.scores], "lr": config.score_lr, "weight_decay": 0.0},
    ]
    optimizer = AdamW([group for group in groups if group["params"]])
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)
