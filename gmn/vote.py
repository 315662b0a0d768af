"""The vote of the nearest tasks: which units to keep, and what they start from (MVP, section 3.2, eq. 1).

    p(k) = exp(c_k / tau) / sum_j exp(c_j / tau)      c_k: number of neighbours that keep unit k of a layer

Units are drawn without replacement from p until the layer has its number. Every kept unit starts from the mean of its
parameters over the neighbours that keep it. A unit here is a coupled channel: units that must go together vote as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from gmn.errors import PruningError
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask
from gmn.masks import entries

TEMPERATURE = 0.025
Ties = Literal["random", "nearest"]


def counts(keeps: Tensor, coupled: Couplings, ties: Ties = "random") -> Tensor:
    """[channels]: how many neighbours keep each coupled channel.

        c_k = sum over t of keep_tk                 ties: random, as in eq. 1
        c_k = sum over t of keep_tk (1 + 2^-t)      ties: nearest; t = 1 the nearest

    What is added is below 1 in all: it decides between channels that as many neighbours keep, in favour of the nearest
    one's, so that these come from one network in all layers. That is ours, not the paper's.

    Args:
        keeps: [T, N] bool, the nodes that each of T neighbours keeps, the nearest first.
        coupled: The couplings of the network.

    Raises:
        PruningError: if there is no neighbour, or the masks are of another network.
    """
    if keeps.dim() != 2 or keeps.shape[1] != len(coupled.channel) or not len(keeps):
        expected = f"bool [neighbours, {len(coupled.channel)}]"
        raise PruningError("the masks do not vote on this network", expected=expected, got=str(tuple(keeps.shape)))
    kept = keeps[:, coupled.first_nodes]
    if ties == "random":
        return kept.sum(dim=0)
    ranks = torch.arange(1, len(keeps) + 1, dtype=torch.float64)
    return (kept * (1 + 2**-ranks)[:, None]).sum(dim=0)


def draw(votes: Tensor, coupled: Couplings, ratio: float, generator: torch.Generator, tau: float) -> Tensor:
    """[channels] bool: (1 - ratio) of each layer's channels, drawn without replacement with p = softmax(votes / tau).

    The largest of log p + Gumbel noise are such a draw (Gumbel top-k), all layers in one pass. Frozen layers stay.
    """
    if not 0 <= ratio < 1 or tau <= 0:
        raise PruningError("malformed vote", expected="0 <= ratio < 1 and tau > 0", got=f"{ratio:g}, {tau:g}")
    uniform = torch.rand(len(votes), generator=generator, dtype=torch.float64)
    noisy = votes / tau - torch.log(-torch.log(uniform.clamp(min=1e-300)))
    order = noisy.argsort(descending=True)
    order = order[coupled.group[order].argsort(stable=True)]  # layer by layer, the strongest first
    sizes = torch.bincount(coupled.group)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[coupled.group[order]]
    return (rank < coupled.left_after(ratio)[coupled.group]) | ~coupled.prunable


def vote(
    keeps: Tensor,
    coupled: Couplings,
    *,
    ratio: float,
    generator: torch.Generator,
    tau: float = TEMPERATURE,
    ties: Ties = "random",
) -> KeepMask:
    """The units that the neighbours vote for.

    Args:
        keeps: [T, N] bool, the nodes that each neighbour keeps, the nearest first.
        coupled: The couplings of the network.
        ratio: Share of each layer's units that goes.
        generator: Of the draw.
        tau: Temperature; small: the majority decides, large: anything goes.
        ties: Between units with as many votes: by chance, or the nearest neighbour's; see `counts`.

    Raises:
        PruningError: if there is no neighbour, the masks are of another network, or a number is out of range.
    """
    return KeepMask(coupled.nodes(draw(counts(keeps, coupled, ties), coupled, ratio, generator, tau)))


def prior(keeps: Tensor, coupled: Couplings, weight: float) -> Tensor:
    """[channels]: what neighbours' votes multiply a criterion's scores with.

    prior_k = 2^(weight (v_k - mean of v over the layer))      v_k: share of the neighbours that keep channel k

    Within a layer it favours what the neighbours keep; it does not favour one layer over another.

    Args:
        keeps: [T, N] bool, the nodes that each of T neighbours keeps.
        coupled: The couplings of the network.
        weight: 0: no influence; 1: a channel that all keep counts twice as much as one that none keeps.

    Raises:
        PruningError: if there is no neighbour, or the masks are of another network.
    """
    share = counts(keeps, coupled) / len(keeps)
    sizes = torch.bincount(coupled.group)
    mean = torch.zeros(len(sizes)).index_add_(0, coupled.group, share) / sizes
    return 2.0 ** (weight * (share - mean[coupled.group]))


def _refuse_other(name: str, own: Tensor | None, full: Tensor, count: int) -> None:
    if own is None or own.dtype != full.dtype or own.numel() != count:
        expected = f"{count} numbers of type {full.dtype}"
        got = "nothing" if own is None else f"{list(own.shape)} of {list(full.shape)}, {own.dtype}"
        raise PruningError("a neighbour does not fit its mask", expected=expected, got=got, where=name)


def average(
    spec: GraphSpec,
    origin: Mapping[str, Tensor],
    neighbours: Sequence[Mapping[str, Tensor]],
    keeps: Tensor,
) -> dict[str, Tensor]:
    """The mean of every number over the neighbours that keep its units, in the full network's shapes.

    A number that belongs to two units, such as a weight, is averaged over the neighbours that keep both; where some
    keep the one and some the other but none both, it is 0, since it is missing in all of them. A number that belongs to
    no unit, such as a single slope or a table of positions, is averaged over all.

    Args:
        spec: Structure of the full network.
        origin: The full network's parameters and buffers: units that no neighbour keeps stay as they are there.
        neighbours: Parameters and buffers of each neighbour's pruned network.
        keeps: [T, N] bool, the nodes that each neighbour keeps.

    Raises:
        PruningError: if a neighbour's tensor is not the part of the full one that its mask says.
    """
    totals: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in origin.items()}
    for own, keep in zip(neighbours, keeps, strict=True):
        for name, mask in entries(spec, shapes, keep).items():
            _refuse_other(name, own.get(name), origin[name], int(mask.sum()))
            part = torch.zeros_like(origin[name]).masked_scatter_(mask, own[name])
            totals[name] = totals[name] + part if name in totals else part
            times[name] = times[name] + mask if name in times else mask.long()
    state = {name: _shared(name, tensor, neighbours) for name, tensor in origin.items() if name not in times}
    for name, known in entries(spec, shapes, keeps.any(0)).items():  # by some neighbour each of its units is kept
        full, count = origin[name], times[name]
        state[name] = torch.where(known, totals[name] / count.clamp(min=1), full).to(full.dtype)
    return state


def _shared(name: str, full: Tensor, neighbours: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The mean over all neighbours of a tensor that no unit owns; as in the full network, if it counts or was cut."""
    own = [state[name] for state in neighbours if name in state and state[name].shape == full.shape]
    if not full.is_floating_point() or len(own) < len(neighbours):
        return full.clone()
    return torch.stack([tensor.to(full) for tensor in own]).mean(0)
