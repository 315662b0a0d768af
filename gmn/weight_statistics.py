"""What a metanetwork does to the weights of each layer: norms, sensitivity, correlation, rank (GMN, section 5.4, H).

A layer's weight is W [O, M]: an output channel is a row of M numbers. Means are over rows or numbers:

    l1           mean |w|
    l2           mean over channels of the row's l2 norm
    sensitivity  mean |w dL/dw|, the first-order estimate of what the loss gains when w becomes zero
    correlation  mean |Pearson correlation| of two channels' rows
    rank         exp(entropy of the singular values, their sum set to 1): the effective rank, 1 to min(O, M)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gmn.graph import GraphSpec

MEASURES = ("l1", "l2", "sensitivity", "correlation", "rank")


@dataclass(frozen=True)
class LayerStatistics:
    """Numbers of one layer; `channel_l2` and `channel_sensitivity` are those of every output channel."""

    layer: str
    l1: float
    l2: float
    sensitivity: float
    correlation: float
    rank: float
    channel_l2: list[float]
    channel_sensitivity: list[float]


def statistics_of(
    spec: GraphSpec, state: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> list[LayerStatistics]:
    """Statistics of every weight in a graph, in its order.

    Args:
        spec: Which parameters are weights, and which of their axes are channels.
        state: The network's parameters by name.
        gradients: dL/dw by name, of the loss in eval mode.
    """
    found: list[LayerStatistics] = []
    for param, slots in spec.weights().items():
        weight, gradient = (_rows(slots[0].canonical(x[param].detach().float())) for x in (state, gradients))
        product = (weight * gradient).abs()
        found.append(
            LayerStatistics(
                layer=param.removesuffix(".weight"),
                l1=float(weight.abs().mean()),
                l2=float(weight.norm(dim=1).mean()),
                sensitivity=float(product.mean()),
                correlation=mean_correlation(weight),
                rank=effective_rank(weight),
                channel_l2=weight.norm(dim=1).tolist(),
                channel_sensitivity=product.sum(1).tolist(),
            )
        )
    return found


def _rows(weight: Tensor) -> Tensor:
    """[G, O, I, K] to [G * O, I * K]."""
    return weight.flatten(0, 1).flatten(1)


def mean_correlation(rows: Tensor) -> float:
    """Mean |Pearson correlation| of two different rows of [O, M]; rows without variance count as uncorrelated.

    >>> round(mean_correlation(torch.tensor([[1.0, 2.0, 3.0], [6.0, 4.0, 2.0], [0.0, 0.0, 0.0]])), 6)
    0.333333
    """
    count = len(rows)
    if count < 2:
        return 0.0
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    among = (unit @ unit.T).abs()
    return (float(among.sum()) - float(among.diagonal().sum())) / (count * (count - 1))


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007); 0 of a matrix of zeros.

    >>> round(effective_rank(torch.eye(3)), 6)
    3.0
    """
    values = torch.linalg.svdvals(rows.double())
    if not float(values.sum()):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
