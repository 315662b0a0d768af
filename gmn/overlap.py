"""How far pruned models agree: intersection over union of two tasks, and the recall of a vote.

A *layer* here is a prunable group of coupled channels, in the order of the network; coupled nodes count as the one
channel they are. C: prunable channels, L: layers, N: nodes of the graph, T and A: neighbour tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gmn.errors import PruningError
from gmn.groups import Couplings


@dataclass(frozen=True)
class Recall:
    """How well the votes of A neighbours foretell what a target keeps.

    Attributes:
        b: [L, A] float64 in [0, 1]: column a - 1 is b(a), a = 1..A; NaN where no channel has a votes.
        d: [L, A + 1] int64: column a is d(a), channels, a = 0..A.
    """

    b: Tensor
    d: Tensor


def layer_names(coupled: Couplings) -> list[str]:
    """Name of each layer, in the order of the network: the first of the modules that make its channels."""
    return [coupled.names[group] for group in _groups(coupled).tolist()]


def iou(target: Tensor, neighbours: Tensor, coupled: Couplings) -> Tensor:
    """Intersection over union of the channels that a target keeps and those that each neighbour keeps.

    IoU_l = |Omega_l^i & Omega_l^j| / |Omega_l^i | Omega_l^j|      Omega_l^i: channels of layer l that task i keeps

    Args:
        target: [N] bool, the nodes that one task keeps.
        neighbours: [N] bool, those of another; or [T, N], of T others.
        coupled: The couplings of the network.

    Returns:
        [L] or [T, L], float64 in [0, 1]; NaN where both masks leave nothing of a layer.

    Raises:
        PruningError: Masks of another network or dtype, or that separate coupled channels.

    Source: MVP, section 3.2, "Overlap between tasks".

    >>> of_four = Couplings(torch.arange(4), torch.zeros(4, dtype=torch.int64), ("fc",), {})
    >>> iou(torch.tensor([True, True, False, False]), torch.tensor([False, True, True, True]), of_four)
    tensor([0.2500], dtype=torch.float64)
    """
    one, others = _channels(target, coupled, 1), _channels(neighbours, coupled, 1 if neighbours.dim() == 1 else 2)
    return _per_layer(one & others, coupled) / _per_layer(one | others, coupled)


def recall(target: Tensor, neighbours: Tensor, coupled: Couplings) -> Recall:
    """Share of the channels with a votes that the target's own pruned model keeps, and how many of its own have a.

    B_l(a) = {k in layer l: a of the A neighbours keep k}
    b_l(a) = |B_l(a) & Omega_l| / |B_l(a)|,  a = 1..A      d_l(a) = |B_l(a) & Omega_l|,  a = 0..A

    The d(a) of a layer sum to the number of channels that the target keeps of it.

    Args:
        target: [N] bool, the nodes that the target's own pruned model keeps: Omega.
        neighbours: [A, N] bool, those of the neighbours that vote.
        coupled: The couplings of the network.

    Raises:
        PruningError: No neighbour, masks of another network or dtype, or that separate coupled channels.

    Source: MVP-SSL, section 3.3, b_{i,l,c}(a) and d_{i,l,c}(a) for one target i and one set N_c^i of neighbours.

    >>> of_four = Couplings(torch.arange(4), torch.zeros(4, dtype=torch.int64), ("fc",), {})
    >>> found = recall(torch.tensor([1, 1, 0, 0]) > 0, torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]) > 0, of_four)
    >>> found.b.tolist(), found.d.tolist()  # 2 votes: kept; 1 vote: not; and one of no vote is kept all the same
    ([[0.0, 1.0]], [[1, 0, 1]])
    """
    kept, votes = _channels(target, coupled, 1), _channels(neighbours, coupled, 2)
    if not len(votes):
        raise PruningError("there is no neighbour to vote")
    width, layers = len(votes) + 1, len(_groups(coupled))
    cell = _layer(coupled) * width + votes.sum(dim=0)
    total, d = (torch.bincount(x, minlength=layers * width).view(layers, width) for x in (cell, cell[kept]))
    return Recall(d[:, 1:].double() / total[:, 1:], d)


def _groups(coupled: Couplings) -> Tensor:
    """[L]: the prunable groups."""
    return coupled.group[coupled.prunable].unique()


def _layer(coupled: Couplings) -> Tensor:
    """[C]: the layer of each prunable channel, from 0."""
    return torch.searchsorted(_groups(coupled), coupled.group[coupled.prunable])


def _channels(masks: Tensor, coupled: Couplings, dims: int) -> Tensor:
    """[..., C]: which prunable channels masks of nodes [..., N] keep."""
    if masks.dim() != dims or masks.dtype != torch.bool or masks.shape[-1] != len(coupled.channel):
        expected = f"bool [{'neighbours, ' * (dims - 1)}N] with N = {len(coupled.channel)} nodes"
        got = f"{masks.dtype} {list(masks.shape)}"
        raise PruningError("masks do not fit the network", expected=expected, got=got)
    kept = masks[..., coupled.first_nodes]
    if not torch.equal(kept[..., coupled.channel], masks):
        raise PruningError("the mask separates channels that are coupled")
    return kept[..., coupled.prunable]


def _per_layer(channels: Tensor, coupled: Couplings) -> Tensor:
    """[..., L] float64: how many of each layer's channels are set."""
    members = _layer(coupled)[:, None] == torch.arange(len(_groups(coupled)))
    return (channels.float() @ members.float()).double()  # counts below 2^24 are exact in single precision
