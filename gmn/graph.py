"""The graph of a network: nodes are channels and neurons, edges are kernels (GMN, section 3.1).

Direction: an edge points the way the data flows, from an input channel (the source) to an output channel (the
target). `edge_index[0]` is the source and `edge_index[1]` the target, as in PyTorch Geometric.

A layer is one `EdgeBlock`: G dense bipartite pieces between two contiguous ranges of nodes. G = 1 is an ordinary
layer, O = I = 1 a diagonal (depthwise convolution, identity residual), anything else a grouped convolution.

Shapes: N nodes, F node features, G pieces, O output and I input channels per piece, K kernel taps.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from gmn.address import EdgeSlot, NodeSlot, Range, Runs, positions
from gmn.errors import ConversionError

if TYPE_CHECKING:
    from networkx import MultiDiGraph
    from torch_geometric.data import Data


@dataclass(frozen=True)
class NodeGroup:
    """Contiguous nodes that one module makes: `kind` is input, conv, linear, attention, norm, ...; names may repeat."""

    name: str
    start: int
    size: int
    kind: str


@dataclass(frozen=True)
class EdgeBlock:
    """All edges of one layer between two contiguous node ranges; features of shape [G, O, I, K]."""

    name: str
    src: Range
    dst: Range
    pieces: int
    kernel: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[G, O, I, K]."""
        taps = torch.Size(self.kernel).numel()
        return self.pieces, self.dst[1] // self.pieces, self.src[1] // self.pieces, taps

    @property
    def form(self) -> str:
        """`dense`, `diagonal` or `grouped`."""
        _, out, into, _ = self.shape
        return "dense" if self.pieces == 1 else "diagonal" if out == into == 1 else "grouped"

    @property
    def kind(self) -> str:
        """What decides the encoder: the kernel's size, `1` for a linear layer, `3x3` for a convolution."""
        return "x".join(map(str, self.kernel)) if torch.Size(self.kernel).numel() > 1 else "1"


@dataclass(frozen=True)
class GraphSpec:
    """Everything about a graph but its numbers: node groups, edge blocks, the address of every parameter.

    Attributes:
        groups: Node groups in the order of their nodes.
        blocks: Edge blocks in the order in which the network computes them.
        node_slots, edge_slots: Addresses of the parameters in the features.
        columns: Names of the F node features; `defaults` are their values where a channel has no such parameter.
        shapes: Shape of every trainable parameter that the graph holds.
        carried: Shape of every parameter without a place in the graph; they stay as they were.
        buffers: Buffers without a place in the graph.
        frozen: Ranges of nodes that must not be removed, each with the reason.
        heads: Ranges of attention nodes, each with its number of heads; the nodes of a head go together.
        ties: Pairs of ranges whose k-th nodes go together although no identity edge says so.
        followers: Carried tensors with an axis along which they have one entry per node: (name, axis, nodes).
    """

    groups: tuple[NodeGroup, ...]
    blocks: tuple[EdgeBlock, ...]
    node_slots: tuple[NodeSlot, ...]
    edge_slots: tuple[EdgeSlot, ...]
    columns: tuple[str, ...]
    defaults: tuple[float, ...]
    shapes: dict[str, tuple[int, ...]]
    carried: dict[str, tuple[int, ...]]
    buffers: tuple[str, ...]
    frozen: tuple[tuple[Range, str], ...]
    heads: tuple[tuple[Range, int], ...] = ()
    ties: tuple[tuple[Range, Range], ...] = ()
    followers: tuple[tuple[str, int, Runs], ...] = ()

    @property
    def num_nodes(self) -> int:
        """N."""
        return sum(group.size for group in self.groups)

    @property
    def num_edges(self) -> int:
        """Number of node pairs that are joined."""
        return sum(torch.Size(block.shape[:3]).numel() for block in self.blocks)

    @property
    def edge_kinds(self) -> dict[str, int]:
        """Kinds of edges and the number K of features of each; one encoder per kind."""
        return {block.kind: block.shape[3] for block in self.blocks}

    def weights(self) -> dict[str, list[EdgeSlot]]:
        """The home addresses of every weight."""
        homes: dict[str, list[EdgeSlot]] = defaultdict(list)
        for slot in self.edge_slots:
            if slot.home:
                homes[slot.param].append(slot)
        return dict(homes)

    def made_by(self, slots: list[EdgeSlot]) -> Tensor:
        """[G * O]: the node of every output channel of a weight, from its addresses."""
        return self._nodes(slots, output=True)

    def read_by(self, slots: list[EdgeSlot]) -> Tensor:
        """[G * I]: the node of every input channel of a weight, from its addresses."""
        return self._nodes(slots, output=False)

    def _nodes(self, slots: list[EdgeSlot], *, output: bool) -> Tensor:
        pieces, out, into, _ = slots[0].canonical_shape
        nodes = torch.full((pieces, out if output else into), -1)
        for slot in slots:
            block = self.blocks[slot.block]
            start, count = block.dst if output else block.src
            own = torch.arange(start, start + count).view(slot.pieces[1], -1)
            rows = torch.arange(slot.pieces[0], sum(slot.pieces))[:, None]
            nodes[rows, positions(slot.outputs if output else slot.inputs)] = own
        return nodes.flatten()

    def edge_index(self) -> Tensor:
        """[2, E]: source and target of every edge, blocks in order, row-major over [G, O, I]."""
        return torch.cat([block_edges(block) for block in self.blocks], dim=1)


def block_edges(block: EdgeBlock) -> Tensor:
    """[2, G*O*I]: source and target node of each edge of a block.

    >>> block_edges(EdgeBlock("fc", src=(0, 2), dst=(2, 1), pieces=1, kernel=(1,))).tolist()
    [[0, 1], [2, 2]]
    """
    g, out, into, _ = block.shape
    src = block.src[0] + torch.arange(g * into).view(g, 1, into).expand(g, out, into)
    dst = block.dst[0] + torch.arange(g * out).view(g, out, 1).expand(g, out, into)
    return torch.stack([src.flatten(), dst.flatten()])


@dataclass(frozen=True, eq=False)
class NetworkGraph:
    """A network as a graph: a frozen `GraphSpec` and the numbers.

    Attributes:
        spec: The structure.
        node_features: [N, F].
        edge_features: One [G, O, I, K] per block.
        template: The network the graph was made from; `gmn.to_model` copies it.
    """

    spec: GraphSpec
    node_features: Tensor
    edge_features: tuple[Tensor, ...]
    template: nn.Module | None = None

    def replace(self, node_features: Tensor, edge_features: tuple[Tensor, ...]) -> NetworkGraph:
        """The same structure with other numbers."""
        return dataclasses.replace(self, node_features=node_features, edge_features=edge_features)

    def to(self, device: torch.device | str) -> NetworkGraph:
        """The graph with its numbers on a device."""
        return self.replace(self.node_features.to(device), tuple(e.to(device) for e in self.edge_features))

    def to_state_dict(self) -> dict[str, Tensor]:
        """Trainable parameters by qualified name, differentiable in the features (for `functional_call`)."""
        shapes = self.spec.shapes
        state = {name: self._weight(slots) for name, slots in self.spec.weights().items()}
        vectors: dict[str, Tensor] = {}
        for slot in self.spec.node_slots:
            if slot.trainable and slot.home:
                start, size = slot.nodes
                values = self.node_features[start : start + size, slot.column]
                numel = torch.Size(shapes[slot.param]).numel()
                if slot.rows == ((0, numel, 1),):
                    vectors[slot.param] = values
                else:
                    slot.write(vectors.setdefault(slot.param, values.new_empty(numel)), values)
        return state | {name: values.reshape(shapes[name]) for name, values in vectors.items()}

    def _weight(self, slots: list[EdgeSlot]) -> Tensor:
        """Undo `EdgeSlot.read`: a weight from the parts that the blocks hold."""
        whole: Tensor | None = None
        for slot in slots:
            features = self.edge_features[slot.block]
            exact = slot.taps == tuple(range(features.shape[3]))
            part = features if exact else features[..., slot.taps]
            if slot.whole:
                whole = part
            else:
                whole = part.new_empty(slot.canonical_shape) if whole is None else whole
                slot.write(whole, part)
        assert whole is not None
        return slots[0].restore(whole, self.spec.shapes[slots[0].param])

    def permute(self, order: Tensor) -> NetworkGraph:
        """Reorder the nodes inside their groups: node n of the result is node `order[n]` of this graph.

        Raises:
            ConversionError: if `order` moves a node out of the range of a block, or the two sides of a diagonal
                or grouped block differently, so that the result would have no block form.
        """
        edges = tuple(
            self._permute_block(b, e, order) for b, e in zip(self.spec.blocks, self.edge_features, strict=True)
        )
        return self.replace(self.node_features[order], edges)

    def _permute_block(self, block: EdgeBlock, features: Tensor, order: Tensor) -> Tensor:
        rows = order[block.dst[0] : sum(block.dst)] - block.dst[0]
        cols = order[block.src[0] : sum(block.src)] - block.src[0]
        g, out, into, _ = block.shape
        for local, size in ((rows, g * out), (cols, g * into)):
            if not torch.equal(local.sort().values, torch.arange(size)):
                raise ConversionError("a permutation must keep nodes in the range of each block", where=block.name)
        piece = rows.view(g, out)[:, 0] // out
        rows, cols = rows.view(g, out), cols.view(g, into)
        if not (
            torch.equal(rows // out, piece[:, None].expand(g, out))
            and torch.equal(cols // into, piece[:, None].expand(g, into))
        ):
            raise ConversionError("both sides of a grouped block must be permuted alike", where=block.name)
        return features[piece[:, None, None], (rows % out)[:, :, None], (cols % into)[:, None, :]]

    def to_pyg(self, *, padded: bool = True) -> Data:
        """Nodes and edges for PyTorch Geometric; see `gmn.views.to_pyg`."""
        from gmn.views import to_pyg

        return to_pyg(self, padded=padded)

    def to_networkx(self, level: Literal["layer", "neuron"] = "layer") -> MultiDiGraph:
        """Layers or neurons for networkx; see `gmn.views.to_networkx`."""
        from gmn.views import to_networkx

        return to_networkx(self, level)

    def draw(self, path: str | Path, *, title: str | None = None) -> Path:
        """A picture of the layers as PNG, SVG or PDF; see `gmn.drawing.draw`."""
        from gmn.drawing import draw

        return draw(self, path, title=title)

    def validate(self) -> NetworkGraph:
        """Check every invariant and return the graph.

        Raises:
            ConversionError: naming the field, what was expected and what was found.
        """
        spec = self.spec
        _expect("node_features", tuple(self.node_features.shape), (spec.num_nodes, len(spec.columns)))
        _expect("number of edge feature tensors", len(self.edge_features), len(spec.blocks))
        for block, features in zip(spec.blocks, self.edge_features, strict=True):
            _expect(f"edge_features of {block.name}", tuple(features.shape), block.shape)
            for side in (block.src, block.dst):
                if side[0] < 0 or sum(side) > spec.num_nodes or side[1] % block.pieces:
                    raise ConversionError("block outside the nodes", where=block.name, got=str(side))
            if not bool(torch.isfinite(features).all()):
                raise ConversionError("weights are not finite (NaN or Inf)", where=block.name)
        if not bool(torch.isfinite(self.node_features).all()):
            row, column = (~torch.isfinite(self.node_features)).nonzero()[0].tolist()
            slots = (s for s in spec.node_slots if s.column == column and s.nodes[0] <= row < sum(s.nodes))
            where = next((slot.param for slot in slots), group_of(spec, row).name)
            raise ConversionError("parameters are not finite (NaN or Inf)", where=where)
        return self

    def summary(self) -> str:
        """What the graph holds and what it only carries through, in a few lines."""
        spec = self.spec
        kinds = ", ".join(f"{kind} ({k})" for kind, k in spec.edge_kinds.items())
        held, carried = (sum(torch.Size(shape).numel() for shape in d.values()) for d in (spec.shapes, spec.carried))
        lines = [
            f"{spec.num_nodes:,} nodes in {len(spec.groups)} groups",
            f"{spec.num_edges:,} edges in {len(spec.blocks)} blocks",
            f"node features: {', '.join(spec.columns)}",
            f"edge kinds (features): {kinds}",
            f"in the graph: {held:,} of {held + carried:,} parameters ({held / max(held + carried, 1):.1%})",
            f"carried through unchanged: {carried:,} in {len(spec.carried)} tensors, and {len(spec.buffers)} buffers",
        ]
        return "\n".join([*lines, *(f"  carried: {name} {list(shape)}" for name, shape in spec.carried.items())])


def group_of(spec: GraphSpec, node: int) -> NodeGroup:
    """The group that a node belongs to."""
    return next(group for group in spec.groups if group.start <= node < group.start + group.size)


def _expect(field: str, got: object, expected: object) -> None:
    if got != expected:
        raise ConversionError(f"malformed graph: {field}", expected=str(expected), got=str(got))
