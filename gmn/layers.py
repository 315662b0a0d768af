"""Message passing over edge blocks: no index, no gather, no scatter within a block (GMN, appendix B.1).

A block holds the states of all edges between two node ranges as one tensor, so a message is a broadcast product and
an aggregation is a reduction along an axis. The receiver's factor A(v_i) is the same for all messages to node i and
is multiplied after the reduction: mean = A S, E[m^2] = A^2 SS, and where A < 0 max and min swap.

Shapes: N nodes, H hidden, a block [G, O, I, H] joins G*O targets and G*I sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmn.graph import EdgeBlock

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

    def forward(
        self, nodes: Tensor, edges: Sequence[Tensor], blocks: Sequence[EdgeBlock]
    ) -> tuple[Tensor, list[Tensor]]:
        """[N, H] and one [G, O, I, H] per block, to the same."""
        nodes = self.norm(nodes)
        factor, sent = self.receive(nodes), self.send(nodes)
        along = along_edges(sent, edges, blocks, len(nodes))
        against = against_edges(sent * self.inv, edges, blocks, len(nodes))
        update = self.aggregate(along.statistics(factor)) + self.aggregate(against.statistics(factor))
        left, right = self.edge_left(nodes), self.edge_right(nodes)
        return nodes + update, [scale_edges(e, block, left, right) for e, block in zip(edges, blocks, strict=True)]


class Moments(NamedTuple):
    """Per node, over the messages it gets before the receiver's factor: sum, sum of squares, extremes, count."""

    total: Tensor
    squares: Tensor
    high: Tensor
    low: Tensor
    degree: Tensor

    def statistics(self, factor: Tensor) -> Tensor:
        """[N, 4H]: mean, std, max, min of factor * message; 0 for a node without messages."""
        count = self.degree.clamp(min=1)[:, None]
        mean = factor * self.total / count
        var = factor * factor * self.squares / count - mean * mean
        std = var.clamp(min=VAR_FLOOR).sqrt()
        std = std.masked_fill(std <= math.sqrt(VAR_FLOOR), 0.0)
        positive = factor >= 0
        high = factor * torch.where(positive, self.high, self.low)
        low = factor * torch.where(positive, self.low, self.high)
        return torch.cat([mean, std, high, low], dim=1)


def sources(nodes: Tensor, block: EdgeBlock) -> Tensor:
    """[G, 1, I, H]: states of a block's source nodes."""
    return nodes[block.src[0] : sum(block.src)].view(block.pieces, 1, -1, nodes.shape[1])


def targets(nodes: Tensor, block: EdgeBlock) -> Tensor:
    """[G, O, 1, H]: states of a block's target nodes."""
    return nodes[block.dst[0] : sum(block.dst)].view(block.pieces, -1, 1, nodes.shape[1])


def along_edges(sent: Tensor, edges: Sequence[Tensor], blocks: Sequence[EdgeBlock], num_nodes: int) -> Moments:
    """Messages from sources to targets."""
    messages = [sources(sent, block) * e for e, block in zip(edges, blocks, strict=True)]
    return _combine(messages, 2, [block.dst for block in blocks], num_nodes)


def against_edges(sent: Tensor, edges: Sequence[Tensor], blocks: Sequence[EdgeBlock], num_nodes: int) -> Moments:
    """Messages from targets to sources."""
    messages = [targets(sent, block) * e for e, block in zip(edges, blocks, strict=True)]
    return _combine(messages, 1, [block.src for block in blocks], num_nodes)


def scale_edges(e: Tensor, block: EdgeBlock, left: Tensor, right: Tensor) -> Tensor:
    """e (1 + c_i d_j + c_j d_i), i the target and j the source."""
    return e * (1 + targets(left, block) * sources(right, block) + sources(left, block) * targets(right, block))


def _combine(messages: list[Tensor], axis: int, ranges: list[tuple[int, int]], num_nodes: int) -> Moments:
    """Moments of a node over all blocks that send to it, from the moments over each block."""
    hidden = messages[0].shape[3]
    index = torch.cat([torch.arange(start, start + size) for start, size in ranges]).to(messages[0].device)
    flat = lambda parts: torch.cat([part.reshape(-1, hidden) for part in parts])  # noqa: E731
    empty = messages[0].new_zeros(num_nodes, hidden)
    rows = index[:, None].expand(-1, hidden)
    sizes = [m.new_full((size,), float(m.shape[axis])) for m, (_, size) in zip(messages, ranges, strict=True)]
    return Moments(
        total=empty.index_add(0, index, flat([m.sum(axis) for m in messages])),
        squares=empty.index_add(0, index, flat([(m * m).sum(axis) for m in messages])),
        high=empty.scatter_reduce(0, rows, flat([m.amax(axis) for m in messages]), "amax", include_self=False),
        low=empty.scatter_reduce(0, rows, flat([m.amin(axis) for m in messages]), "amin", include_self=False),
        degree=empty[:, 0].index_add(0, index, torch.cat(sizes)),
    )
