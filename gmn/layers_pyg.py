"""The same layer on an explicit edge list, with PyTorch Geometric: gather, four aggregations, scatter.

This is how the published implementation works, and the reference that `gmn.layers` is tested against. It stores
messages and edge states of size E x H in every layer. torch-scatter is used by PyTorch Geometric when installed.
"""

from __future__ import annotations

from torch import Tensor
from torch_geometric.nn import MessagePassing

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


def forward_pyg(layer: MessageLayer, nodes: Tensor, e: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """`MessageLayer.forward` with the same weights, on nodes [N, H] and edges [E, H]."""
    passing = PygMessagePassing()
    nodes = layer.norm(nodes)
    factor, sent, turned = layer.receive(nodes), layer.send(nodes), e * layer.inv
    update = layer.aggregate(passing(edge_index, factor, sent, e))
    update = update + layer.aggregate(passing(edge_index.flip(0), factor, sent, turned))
    left, right = layer.edge_left(nodes), layer.edge_right(nodes)
    source, target = edge_index
    e = e + left[target] * right[source] * e + left[source] * right[target] * turned * layer.inv
    return nodes + update, e
