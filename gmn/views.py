"""A graph for other libraries: PyTorch Geometric (neurons) and networkx (layers or neurons).

Shapes: N nodes, F node features, E edges, K features of an edge of one kind, Kmax the largest K.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from gmn.errors import ConversionError
from gmn.graph import EdgeBlock, GraphSpec, NetworkGraph, NodeGroup, block_edges
from gmn.groups import parametric

if TYPE_CHECKING:
    from networkx import MultiDiGraph
    from torch_geometric.data import Data

Level = Literal["layer", "neuron"]
PADDED_BYTES = 4 * 2**30  # more than this is not allocated for padding
NEURON_EDGES = 1_000_000  # an edge of networkx takes about 1 kB


def to_pyg(graph: NetworkGraph, *, padded: bool = True) -> Data:
    """Every channel as a node and every kernel as an edge, for PyTorch Geometric.

    `x` [N, F]; `edge_index` [2, E] (source, target); `edge_kind` [E], a position in `kinds`; `edge_block` [E], a
    position in `block_names`; `node_group` [N], a position in `group_names`; `columns` names the F features of x.
    Edges come block by block, in the order of `graph.spec.edge_index()`.

    Args:
        graph: The graph; gradients flow back to its features.
        padded: With True `edge_attr` [E, Kmax] holds all edge features, zeros on the right where a kind has fewer
            than Kmax. With False there is one tensor per kind instead: `edge_attr_0` [edges of kind 0, K],
            `edge_attr_1` and so on, row j for the j-th edge with that `edge_kind`.

    Memory: 32 bytes per edge, and the features. Padding can cost far more than the features: one 16x16 kernel and
    the 71.6 million edges of ViT-B/16 would take 73 GB.

    Raises:
        ConversionError: if the padded features take more than 4 GB.
    """
    from torch_geometric.data import Data

    spec, device = graph.spec, graph.node_features.device
    kinds = list(spec.edge_kinds)
    features = {"edge_attr": _padded(graph)} if padded else _by_kind(graph)
    block = _repeat([torch.Size(block.shape[:3]).numel() for block in spec.blocks])
    kind = torch.tensor([kinds.index(block.kind) for block in spec.blocks], dtype=torch.int64)
    return Data(
        x=graph.node_features,
        edge_index=(spec.edge_index() if spec.blocks else torch.empty(2, 0, dtype=torch.int64)).to(device),
        edge_kind=kind[block].to(device),
        edge_block=block.to(device),
        node_group=_repeat([group.size for group in spec.groups]).to(device),
        num_nodes=spec.num_nodes,
        kinds=kinds,
        columns=list(spec.columns),
        group_names=[group.name for group in spec.groups],
        block_names=[block.name for block in spec.blocks],
        **features,
    )


def _repeat(counts: list[int]) -> Tensor:
    """Position i as often as `counts[i]` says."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def _padded(graph: NetworkGraph) -> Tensor:
    """[E, Kmax]."""
    edges, width = graph.spec.num_edges, max(graph.spec.edge_kinds.values(), default=0)
    needed = edges * width * graph.node_features.element_size()
    if needed > PADDED_BYTES:
        raise ConversionError(
            "the padded edge features are too large",
            expected=f"at most {PADDED_BYTES / 1e9:.1f} GB",
            got=f"{needed / 1e9:.1f} GB for {edges:,} edges x {width} features",
            hint="use padded=False",
        )
    result, start = graph.node_features.new_zeros(edges, width), 0
    for features in graph.edge_features:
        rows = features.reshape(-1, features.shape[3])
        result[start : start + len(rows), : rows.shape[1]] = rows
        start += len(rows)
    return result


def _by_kind(graph: NetworkGraph) -> dict[str, Tensor]:
    """[edges of the kind, K] for each kind."""
    parts: dict[str, list[Tensor]] = {kind: [] for kind in graph.spec.edge_kinds}
    for block, features in zip(graph.spec.blocks, graph.edge_features, strict=True):
        parts[block.kind].append(features.reshape(-1, features.shape[3]))
    return {f"edge_attr_{index}": torch.cat(rows) for index, rows in enumerate(parts.values())}


def to_networkx(graph: NetworkGraph, level: Level = "layer") -> MultiDiGraph:
    """The graph for networkx; edges point the way the data flows and their key is the number of their block.

    Level `layer`: node i is group i (name, kind, size, start); an edge is a block and a pair of groups that it joins
    (name, kind, form, kernel, shape, and identity: whether it has no weight). A block over several groups, or over a
    concatenation, gives several edges; `shape` is that of the whole block.
    Level `neuron`: node n is node n of the graph (features, group), an edge is a pair of nodes (features); the names
    of the node features are in `.graph["columns"]`.

    Raises:
        ConversionError: if the level is unknown, or has more than a million edges (about 1 GB).
    """
    if level not in get_args(Level):
        raise ConversionError("unknown level", expected=" or ".join(get_args(Level)), got=repr(level))
    return _layers(graph.spec) if level == "layer" else _neurons(graph)


def _layers(spec: GraphSpec) -> MultiDiGraph:
    from networkx import MultiDiGraph

    result = MultiDiGraph()
    for index, group in enumerate(spec.groups):
        result.add_node(index, name=group.name, kind=group.kind, size=group.size, start=group.start)
    weights = parametric(spec)
    for index, block in enumerate(spec.blocks):
        facts = {"name": block.name, "kind": block.kind, "form": block.form, "kernel": block.kernel}
        for source, target in _joined(spec, block):
            result.add_edge(source, target, index, **facts, shape=block.shape, identity=index not in weights)
    return result


def _joined(spec: GraphSpec, block: EdgeBlock) -> Iterator[tuple[int, int]]:
    """Pairs of groups with at least one edge of the block between them."""
    _, out, into, _ = block.shape
    sent = {i: part for i, group in enumerate(spec.groups) if (part := _pieces(group, block.src, into))}
    received = {i: part for i, group in enumerate(spec.groups) if (part := _pieces(group, block.dst, out))}
    for (source, a), (target, b) in product(sent.items(), received.items()):
        if max(a.start, b.start) < min(a.stop, b.stop):
            yield source, target


def _pieces(group: NodeGroup, side: tuple[int, int], width: int) -> range:
    """The pieces of a block with a node in the group; `width` nodes of the side make a piece."""
    first, stop = max(group.start, side[0]) - side[0], min(group.start + group.size, sum(side)) - side[0]
    return range(first // width, (stop - 1) // width + 1) if first < stop else range(0)


def _neurons(graph: NetworkGraph) -> MultiDiGraph:
    from networkx import MultiDiGraph

    spec = graph.spec
    if spec.num_edges > NEURON_EDGES:
        raise ConversionError(
            "too many edges for networkx",
            expected=f"at most {NEURON_EDGES:,}",
            got=f"{spec.num_edges:,}",
            hint='use level="layer", or to_pyg',
        )
    result = MultiDiGraph(columns=spec.columns)
    features = graph.node_features.tolist()
    for index, group in enumerate(spec.groups):
        for node in range(group.start, group.start + group.size):
            result.add_node(node, features=features[node], group=index)
    for index, (block, values) in enumerate(zip(spec.blocks, graph.edge_features, strict=True)):
        rows = values.reshape(-1, block.shape[3]).tolist()
        for (source, target), row in zip(block_edges(block).T.tolist(), rows, strict=True):
            result.add_edge(source, target, index, features=row)
    return result
