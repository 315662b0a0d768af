"""The metanetwork: a graph network that rewrites the weights of another network (GMN, appendix B.1).

    v <- Enc_node(v_in)    e <- Enc_edge(e_in)         one edge encoder per kernel size
    L message-passing layers (`gmn.layers.MessageLayer`)
    v_out = v_in + node_ratio * Dec_node(v)            e_out = e_in + edge_ratio * Dec_edge(e)

It sees only a graph: no module, no name of an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from gmn.errors import ConversionError
from gmn.graph import EdgeBlock, GraphSpec, NetworkGraph
from gmn.groups import parametric
from gmn.layers import MessageLayer

WIDE = 256  # from this many features on an edge encoder has a layer in between, as for 16x16 patch embeddings


@dataclass(frozen=True)
class MetaNetworkConfig:
    """Size and residual ratios of a metanetwork.

    Attributes:
        node_features: F.
        edge_kinds: Number of features of each kind of edge.
        layers, hidden: Number of message-passing layers, and their width (even).
        node_ratio, edge_ratio: alpha and beta of the paper: how much of the prediction is added.
        zero_init: Start as the identity: the last layer of each decoder is zero.
        backend: `blocks`, or `pyg` (PyTorch Geometric, the slow reference).
    """

    node_features: int
    edge_kinds: dict[str, int]
    layers: int = 4
    hidden: int = 32
    node_ratio: float = 0.05
    edge_ratio: float = 0.05
    zero_init: bool = True
    backend: Literal["blocks", "pyg"] = "blocks"


class MetaNetwork(nn.Module):
    """Graph to graph, for every network whose kinds of edges it knows.

    Args:
        config: Size and ratios.
    """

    def __init__(self, config: MetaNetworkConfig) -> None:
        super().__init__()
        if config.hidden % 2 or config.hidden <= 0:
            raise ConversionError("malformed metanetwork", expected="an even hidden size", got=str(config.hidden))
        self.config = config
        hidden = config.hidden
        self.node_encoder = nn.Linear(config.node_features, hidden)
        self.edge_encoders = nn.ModuleDict({kind: _encoder(k, hidden) for kind, k in config.edge_kinds.items()})
        self.layers = nn.ModuleList([MessageLayer(hidden) for _ in range(config.layers)])
        self.node_decoder = _decoder(hidden, config.node_features, zero=config.zero_init)
        self.edge_decoders = nn.ModuleDict(
            {kind: _decoder(hidden, k, zero=config.zero_init) for kind, k in config.edge_kinds.items()}
        )

    def forward(self, graph: NetworkGraph) -> NetworkGraph:
        """The same graph with rewritten features; identity edges and the structure stay.

        Raises:
            ConversionError: if the graph has other node features, or a kind of edge this metanetwork never learnt.
        """
        spec = graph.spec
        self.check(spec)
        nodes = self.node_encoder(graph.node_features)
        edges = [self.edge_encoders[b.kind](e) for b, e in zip(spec.blocks, graph.edge_features, strict=True)]
        for layer in self.layers:
            assert isinstance(layer, MessageLayer)
            nodes, edges = self._pass(layer, nodes, edges, spec.blocks)
        new_nodes = graph.node_features + self.config.node_ratio * self.node_decoder(nodes)
        weights = parametric(spec)
        new_edges = tuple(
            old + self.config.edge_ratio * self.edge_decoders[block.kind](state) if index in weights else old
            for index, (block, old, state) in enumerate(zip(spec.blocks, graph.edge_features, edges, strict=True))
        )
        return graph.replace(new_nodes, new_edges)

    def _pass(
        self, layer: MessageLayer, nodes: Tensor, edges: list[Tensor], blocks: tuple[EdgeBlock, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        if self.config.backend == "pyg":
            from gmn.layers_pyg import forward_pyg  # torch-geometric takes seconds to import

            return forward_pyg(layer, nodes, edges, blocks)
        result: tuple[Tensor, list[Tensor]] = layer(nodes, edges, blocks)
        return result

    def check(self, spec: GraphSpec) -> None:
        """Raise ConversionError unless this metanetwork can read such a graph."""
        if len(spec.columns) != self.config.node_features:
            raise ConversionError(
                "the graph is for another metanetwork",
                expected=f"{self.config.node_features} node features",
                got=str(len(spec.columns)),
                hint="make the graph with the layout the metanetwork was trained with",
            )
        unknown = {kind: k for kind, k in spec.edge_kinds.items() if self.config.edge_kinds.get(kind) != k}
        if unknown:
            raise ConversionError(
                "the graph has kinds of edges that this metanetwork never learnt",
                expected=", ".join(self.config.edge_kinds),
                got=", ".join(unknown),
                hint="meta-train on a network that has them, or use a padded layout",
            )


def _encoder(features: int, hidden: int) -> nn.Module:
    if features < WIDE:
        return nn.Linear(features, hidden)
    return nn.Sequential(nn.Linear(features, 64), nn.SiLU(), nn.Linear(64, hidden))


def _decoder(hidden: int, features: int, *, zero: bool) -> nn.Module:
    last = nn.Linear(hidden, features)
    if zero:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LayerNorm(hidden, elementwise_affine=False), nn.Linear(hidden, hidden), nn.SiLU(), last)
