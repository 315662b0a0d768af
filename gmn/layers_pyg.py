"""The same layer on an explicit edge list, with PyTorch Geometric: gather, four aggregations, scatter.

This is how the published implementation works, and the reference that `gmn.layers` is tested against. It stores
messages and edge states of size E x H in every layer. torch-scatter is used by PyTorch Geometric when installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from gmn.graph import EdgeBlock, block_edges
from gmn.layers import MessageLayer


class PygMessagePassing(MessagePassing):
    """Mean, std, max and min of factor_i * sent_j * e_ij over the edges j -> i: [N, 4H]."""

    def __init__(self) -> None:
        super().__init__(aggr=["mean", "std", "max", "min"])

    def forward(self, edge_index: Tensor, factor: Tensor, sent: Tensor, edge_attr: Tensor) -> Tensor:
        """`edge_index` [2, E], nodes [N, H], `edge_attr` [E, H]."""
        size = (factor.shape[0], factor.shape[0])
        result: Tensor = self.propagate(edge_index, factor=factor, sent=sent, edge_attr=edge_attr, size=size)
        return result

    def message(  # pyright: ignore[reportIncompatibleMethodOverride] (PyTorch Geometric passes arguments by name)
        self, factor_i: Tensor, sent_j: Tensor, edge_attr: Tensor
    ) -> Tensor:
        """[E, H]."""
        return factor_i * sent_j * edge_attr


def forward_pyg(
    layer: MessageLayer, nodes: Tensor, edges: Sequence[Tensor], blocks: Sequence[EdgeBlock]
) -> tuple[Tensor, list[Tensor]]:
    """`MessageLayer.forward` with the same weights on the flattened graph."""
    index = torch.cat([block_edges(block) for block in blocks], dim=1).to(nodes.device)
    e = torch.cat([part.reshape(-1, part.shape[3]) for part in edges])
    passing = PygMessagePassing()
    nodes = layer.norm(nodes)
    factor, sent = layer.receive(nodes), layer.send(nodes)
    update = layer.aggregate(passing(index, factor, sent, e))
    update = update + layer.aggregate(passing(index.flip(0), factor, sent, e * layer.inv))
    left, right = layer.edge_left(nodes), layer.edge_right(nodes)
    source, target = index
    e = e + left[target] * right[source] * e + left[source] * right[target] * (e * layer.inv) * layer.inv
    parts = e.split([part[..., 0].numel() for part in edges])
    return nodes + update, [part.view(old.shape) for part, old in zip(parts, edges, strict=True)]
