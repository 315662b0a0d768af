"""The weights of a message-passing layer, and the statistics that a node makes of its messages (GMN, appendix B.1).

The receiver's factor A(v_i) is the same for all messages to node i and is multiplied after the reduction:
mean = A S, E[m^2] = A^2 SS, and where A < 0 max and min swap. What happens on the edges stands in `gmn.edge_tape`.

N nodes, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
        factor, sent = self.receive(nodes), self.send(nodes)
        token, *found = tape.layer(token, sent, self.inv, self.edge_left(nodes), self.edge_right(nodes))
        along = statistics(factor, found[:4], tape.in_degree)
        against = statistics(factor, found[4:], tape.out_degree)
        return nodes + self.aggregate(along) + self.aggregate(against), token


def statistics(factor: Tensor, moments: Sequence[Tensor], degree: Tensor) -> Tensor:
    """[N, 4H]: mean, std, max, min of factor * message.

    Args:
        factor: [N, H], the receiver's.
        moments: Total, squares, high, low [N, H] of the messages before the factor.
        degree: [N], number of messages; a node without messages gets 0.
    """
    (total, squares, high, low), count = moments, degree.clamp(min=1)[:, None]
    mean = factor * total / count
    var = factor * factor * squares / count - mean * mean
    std = var.clamp(min=VAR_FLOOR).sqrt()
    std = std.masked_fill(std <= math.sqrt(VAR_FLOOR), 0.0)
    positive = factor >= 0
    return torch.cat(
        [mean, std, factor * torch.where(positive, high, low), factor * torch.where(positive, low, high)], 1
    )
