"""The metanetwork: a graph network that rewrites the weights of another network (GMN, appendix B.1).

    v <- Enc_node(v_in)    e <- Enc_edge(e_in)         one edge encoder per kernel size
    L message-passing layers (`gmn.layers.MessageLayer`)
    v_out = v_in + node_ratio * Dec_node(v)            e_out = e_in + edge_ratio * Dec_edge(e)

It sees only a graph: no module, no name of an architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gmn.blockwise import PLAIN, compiled
from gmn.edge_tape import KEEP_MB, EdgeTape
from gmn.errors import ConversionError
from gmn.graph import GraphSpec, NetworkGraph
from gmn.groups import parametric
from gmn.layers import MessageLayer

RUNTIME = ("backend", "max_chunk_mb", "keep_mb", "bf16", "compile")  # how it runs, not what it is: not saved with it
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
        max_chunk_mb: Largest piece of the edges that `blocks` works on at a time; None chooses by device.
        keep_mb: Room for edge states of some layers; the others are computed again in the backward pass.
        bf16: Let `blocks` hold edge states in bfloat16: half the memory, three digits; sums stay as they are.
        compile: Let `torch.compile` fuse what `blocks` does; the first pass takes a minute more.
    """

    node_features: int
    edge_kinds: dict[str, int]
    layers: int = 4
    hidden: int = 32
    node_ratio: float = 0.05
    edge_ratio: float = 0.05
    zero_init: bool = True
    backend: Literal["blocks", "pyg"] = "blocks"
    max_chunk_mb: float | None = None
    keep_mb: float = KEEP_MB
    bf16: bool = False
    compile: bool = False


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

        It computes in the precision of its parameters, also under autocast: two digits would hide what it adds.

        Raises:
            ConversionError: if the graph has other node features, or a kind of edge this metanetwork never learnt.
        """
        self.check(graph.spec)
        if (got := graph.node_features.dtype) != (own := self.node_encoder.weight.dtype):
            hint = "model.float() before the graph is made"
            raise ConversionError("a graph of other numbers", expected=str(own), got=str(got), hint=hint)
        with torch.autocast(graph.node_features.device.type, enabled=False):
            return self._rewritten(graph)

    def _rewritten(self, graph: NetworkGraph) -> NetworkGraph:
        spec = graph.spec
        nodes = self.node_encoder(graph.node_features)
        weights = parametric(spec)
        passing = self._by_edges if self.config.backend == "pyg" else self._by_blocks
        nodes, changes = passing(graph, nodes, [index in weights for index in range(len(spec.blocks))])
        new_nodes = graph.node_features + self.config.node_ratio * self.node_decoder(nodes)
        pairs = zip(graph.edge_features, changes, strict=True)
        return graph.replace(new_nodes, tuple(old if change is None else old + change for old, change in pairs))

    def _by_blocks(
        self, graph: NetworkGraph, nodes: Tensor, changes: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The final nodes, and what is added to each block's features; None where they stay."""
        blocks = graph.spec.blocks
        decoders = [self.edge_decoders[b.kind] if own else None for b, own in zip(blocks, changes, strict=True)]
        encoders = [self.edge_encoders[block.kind] for block in blocks]
        config, kernels = self.config, compiled() if self.config.compile else PLAIN
        sizes = {"nodes": len(nodes), "hidden": config.hidden, "depth": config.layers}
        limits: dict[str, Any] = {"max_chunk_mb": config.max_chunk_mb, "keep_mb": config.keep_mb}
        limits["stored"] = torch.bfloat16 if config.bf16 else None
        tape = EdgeTape(blocks, graph.edge_features, encoders, decoders, **sizes, **limits, kernels=kernels)
        token = tape.encode()
        for layer in self.layers:
            nodes, token = layer(nodes, tape, token)
        made = iter(tape.decode(token, self.config.edge_ratio))
        return nodes, [next(made) if own else None for own in changes]

    def _by_edges(
        self, graph: NetworkGraph, nodes: Tensor, changes: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        from gmn.layers_pyg import forward_pyg  # torch-geometric takes seconds to import

        blocks, shapes = graph.spec.blocks, [f.shape[:3] for f in graph.edge_features]
        encoded = [self.edge_encoders[b.kind](e) for b, e in zip(blocks, graph.edge_features, strict=True)]
        edge_index, edges = graph.spec.edge_index().to(nodes.device), torch.cat([e.flatten(0, 2) for e in encoded])
        del encoded
        for layer in self.layers:
            assert isinstance(layer, MessageLayer)
            nodes, edges = forward_pyg(layer, nodes, edges, edge_index)
        parts = [
            e.unflatten(0, shape) for e, shape in zip(edges.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        each = zip(blocks, parts, changes, strict=True)
        return nodes, [self.config.edge_ratio * self.edge_decoders[b.kind](e) if own else None for b, e, own in each]

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
