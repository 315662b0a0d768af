"""The weights of a message-passing layer, and the statistics that a node makes of its messages (GMN, appendix B.1).

The receiver's factor A(v_i) is the same for all messages to node i and is multiplied after the reduction:
mean = A S, E[m^2] = A^2 SS, and where A < 0 max and min swap. What happens on the edges stands in `gmn.edge_tape`.

N nodes, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gmn.blockwise import exact

if TYPE_CHECKING:
    from gmn.edge_tape import EdgeTape

VAR_FLOOR = 1e-5  # torch-geometric clamps the variance here and reports 0 where it did


def mlp(size: int) -> nn.Sequential:
    """One Linear and SiLU, H -> H."""
    return nn.Sequential(nn.Linear(size, size), nn.SiLU())


class MessageLayer(nn.Module):
    """The weights of one layer; `forward` runs it on edge blocks.

        m_ij  = A(v_i) * B(v_j) * e_ij                  along the edge
        m'_ij = A(v_j) * B(v_i) * e_ij * inv            against it, inv = (1,..,1,-1,..,-1)
        v_i  <- v_i + PNA(m_ij) + PNA(m'_ij)            PNA = Linear([mean, std, max, min] over the edges of i)
        e_ij <- e_ij (1 + C(v_i) D(v_j) + C(v_j) D(v_i))

    Both updates read the states from before the layer, after a LayerNorm of the nodes.
    """

    inv: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.receive, self.send = mlp(hidden), mlp(hidden)  # A, B
        self.edge_left, self.edge_right = mlp(hidden), mlp(hidden)  # C, D
        self.aggregate = nn.Linear(4 * hidden, hidden)
        signs = torch.cat([torch.ones(hidden // 2), -torch.ones(hidden - hidden // 2)])
        self.register_buffer("inv", signs, persistent=False)

    def forward(self, nodes: Tensor, tape: EdgeTape, token: Tensor) -> tuple[Tensor, Tensor]:
        """[N, H] to the same; the tape's edges take their step, and the token says so."""
        nodes = self.norm(nodes)
        vectors = (part(nodes).T.contiguous() for part in (self.receive, self.send, self.edge_left, self.edge_right))
        factor, sent, left, right = vectors
        token, *found = tape.layer(token, sent, sent * self.inv[:, None], left, right)
        weight, bias = self.aggregate.weight, self.aggregate.bias
        update = _Update.apply(weight, bias, tape.in_degree, tape.out_degree, factor, *found)
        return nodes + update.T, token


class _Update(Function):
    """[H, N]: what the aggregations of messages along and against the edges add to the nodes, together.

    Its arguments are weight and bias of the linear layer on the statistics; [N] the numbers of messages along and
    against; [H, N] the receiver's factor, and the moments along and against, four each. It keeps none of the forty
    node vectors of a layer that it makes: they would be most of the memory.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        weight, bias, in_degree, out_degree, factor, *found = tensors
        both = statistics(factor, found[:4], in_degree) + statistics(factor, found[4:], out_degree)
        return torch.addmm(2 * bias[:, None], weight, both)

    @staticmethod
    @exact
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        weight, _, in_degree, out_degree, factor, *found = ctx.saved_tensors
        ways = (found[:4], in_degree), (found[4:], out_degree)
        along, against = (statistics(factor, moments, degree) for moments, degree in ways)
        back = weight.T @ grad
        of_factor, *of_along = statistics_backward(factor, *ways[0], along, back)
        other, *of_against = statistics_backward(factor, *ways[1], against, back)
        of_weight = grad @ along.add_(against).T
        return of_weight, 2 * grad.sum(1), None, None, of_factor.add_(other), *of_along, *of_against


def statistics(factor: Tensor, moments: Sequence[Tensor], degree: Tensor) -> Tensor:
    """[4H, N]: mean, std, max, min of factor * message.

    Args:
        factor: [H, N], the receiver's.
        moments: Total, squares, high, low [H, N] of the messages before the factor.
        degree: [N], number of messages; a node without messages gets 0.
    """
    (total, squares, high, low), count = moments, degree.clamp(min=1)
    mean = factor * total / count
    var = factor * factor * squares / count - mean * mean
    std = var.clamp(min=VAR_FLOOR).sqrt()
    std = std.masked_fill(std <= math.sqrt(VAR_FLOOR), 0.0)
    positive = factor >= 0
    extremes = factor * torch.where(positive, high, low), factor * torch.where(positive, low, high)
    return torch.cat([mean, std, *extremes])


def statistics_backward(
    factor: Tensor, moments: Sequence[Tensor], degree: Tensor, found: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the factor and of the moments, from those of the statistics [4H, N] that were found."""
    (total, squares, high, low), count = moments, degree.clamp(min=1)
    mean, std, _, _ = found.chunk(4)
    of_mean, of_std, of_max, of_min = grad.chunk(4)
    of_var = (of_std / (2 * std)).masked_fill_(std == 0, 0.0)
    of_mean = torch.addcmul(of_mean, mean, of_var, value=-2).div_(count)
    of_var = of_var.div_(count)
    positive = factor >= 0
    of_high, of_low = torch.where(positive, of_max, of_min), torch.where(positive, of_min, of_max)
    of_squares = factor * of_var
    of_factor = (total * of_mean).addcmul_(of_squares, squares, value=2).addcmul_(of_high, high).addcmul_(of_low, low)
    return of_factor, of_mean.mul_(factor), of_squares.mul_(factor), of_high.mul_(factor), of_low.mul_(factor)
