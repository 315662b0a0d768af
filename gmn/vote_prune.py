"""Meta-vote pruning: the sub-network that the nearest tasks vote for (MVP, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gmn.backbone import Backbone
from gmn.data import Augment, Data
from gmn.groups import KeepMask
from gmn.masks import entries
from gmn.settings import Fit
from gmn.surgery import remove
from gmn.tasks import with_head
from gmn.trace import clone
from gmn.training import fit
from gmn.vote import TEMPERATURE, Ties, average, vote
from gmn.zoo import Zoo


def vote_for(
    backbone: Backbone,
    zoo: Zoo,
    neighbours: Sequence[str],
    data: Data,
    config: Fit | None,
    *,
    ratio: float,
    tau: float = TEMPERATURE,
    ties: Ties = "random",
    seed: int = 0,
    augment: Augment | None = None,
) -> tuple[nn.Module, KeepMask]:
    """The sub-network that the neighbours vote for, fine-tuned on the target task, and the nodes it keeps.

    Args:
        neighbours: Names of tasks of the zoo, the nearest first.
        data: The target task's data.
        config: The fine-tuning; None for none.
        ratio: Share of each layer's units that goes.
        tau, ties: Temperature of the vote, and what decides between units with as many votes.
        augment: Random changes of the images in training.

    Raises:
        GmnError: if a neighbour is missing or damaged.
    """
    state, mask = elect(backbone, zoo, neighbours, ratio=ratio, tau=tau, ties=ties, seed=seed)
    model = cut_out(backbone, state, mask, data.num_classes, seed=seed)
    if config is not None:
        fit(model, data.train, config, seed=seed, augment=augment, title="after the vote")
    return model.eval(), mask


def elect(
    backbone: Backbone,
    zoo: Zoo,
    neighbours: Sequence[str],
    *,
    ratio: float,
    tau: float = TEMPERATURE,
    ties: Ties = "random",
    seed: int = 0,
) -> tuple[dict[str, Tensor], KeepMask]:
    """The full network's state with the means of the neighbours that keep each number, and the nodes voted for."""
    keeps = zoo.masks(neighbours)
    generator = torch.Generator().manual_seed(seed)
    mask = vote(keeps, backbone.coupled, ratio=ratio, generator=generator, tau=tau, ties=ties)
    origin = {name: tensor.cpu() for name, tensor in backbone.model.state_dict().items()}
    states = [_with_own_head(backbone, zoo.load(n)[2], k, origin) for n, k in zip(neighbours, keeps, strict=True)]
    return average(backbone.spec, origin, states, keeps), mask


def cut_out(backbone: Backbone, state: Mapping[str, Tensor], mask: KeepMask, classes: int, *, seed: int) -> nn.Module:
    """The sub-network of the backbone that a mask keeps, filled from a state of the full one, with a new head."""
    full = clone(backbone.model)
    full.load_state_dict(state)
    smaller = remove(full, backbone.spec, mask, backbone.example, coupled=backbone.coupled)
    return with_head(smaller, backbone.head, classes, seed=seed)


def _with_own_head(
    backbone: Backbone, weights: Mapping[str, Tensor], keep: Tensor, origin: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A neighbour's numbers with the pre-trained head in place of its own, which is for other classes."""
    heads = {name: tensor.shape for name, tensor in origin.items() if name.rpartition(".")[0] == backbone.head}
    own = {name: origin[name][mask] for name, mask in entries(backbone.spec, heads, keep).items()}
    return {**weights, **own}
