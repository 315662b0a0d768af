"""Is the structure of a graph sound? For a `GraphSpec` that comes from outside, such as a file.

No number is trusted before it is compared with the tensors that are really there: a hostile structure can neither ask
for memory, nor leave a part of a weight undefined, nor give two parameters the same place.
"""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from gmn.address import EdgeSlot, NodeSlot, Range, Runs
from gmn.errors import ConversionError
from gmn.graph import EdgeBlock, GraphSpec

Shape = Sequence[int]
MOST_TAPS = 2**31


def check_spec(spec: GraphSpec, nodes: Shape, edges: Sequence[Shape | None], buffers: Mapping[str, Shape]) -> None:
    """Check every number of a structure.

    Args:
        spec: The structure; its types are right, its numbers may be anything.
        nodes: Shape of the node features.
        edges: Shape of the edge features of every block; None for one that is not there yet and holds no home.
        buffers: Shapes of the network's buffers, those with a place in the graph among them.

    Raises:
        ConversionError: naming the field, what was expected and what was found.
    """
    _check_nodes(spec, nodes)
    if len(edges) != len(spec.blocks):
        _fail("blocks", f"{len(edges)}, as many as tensors", len(spec.blocks))
    for index, block in enumerate(spec.blocks):
        _check_block(f"blocks[{index}]", block, spec.num_nodes, edges[index])
    for name, shape in (spec.shapes | spec.carried).items():
        if min(shape, default=0) < 0:
            _fail(f"shape of {name}", "no negative size", shape)
    if both := spec.shapes.keys() & spec.carried.keys():
        _fail("carried", "parameters without a place in the graph", sorted(both))
    for index, slot in enumerate(spec.edge_slots):
        _check_edge_slot(f"edge_slots[{index}]", slot, spec)
    for index, slot in enumerate(spec.node_slots):
        _check_node_slot(f"node_slots[{index}]", slot, spec, buffers)
    _check_places(spec)
    _check_homes(spec)
    _check_marks(spec)
    _check_followers(spec, buffers)


def _fail(field: str, expected: str, got: object) -> NoReturn:
    raise ConversionError(f"malformed graph: {field}", expected=expected, got=reprlib.repr(got))


def _check_nodes(spec: GraphSpec, nodes: Shape) -> None:
    first = 0
    for index, group in enumerate(spec.groups):
        if group.start != first or group.size < 0:
            _fail(f"groups[{index}]", f"a group of nodes that starts at {first}", (group.start, group.size))
        first += group.size
    if tuple(nodes) != (first, len(spec.columns)):
        _fail("node_features", str((first, len(spec.columns))), tuple(nodes))
    if not spec.columns or len(set(spec.columns)) != len(spec.columns):
        _fail("columns", "different names", spec.columns)
    if len(set(spec.buffers)) != len(spec.buffers):
        _fail("buffers", "different names", spec.buffers)
    if len(spec.defaults) != len(spec.columns) or not all(map(math.isfinite, spec.defaults)):
        _fail("defaults", f"{len(spec.columns)} finite numbers", spec.defaults)


def _check_range(field: str, nodes: Range, total: int) -> None:
    if nodes[0] < 0 or nodes[1] < 0 or sum(nodes) > total:
        _fail(field, f"first and count inside {total} nodes", nodes)


def _check_block(field: str, block: EdgeBlock, nodes: int, shape: Shape | None) -> None:
    _check_range(f"{field}.src", block.src, nodes)
    _check_range(f"{field}.dst", block.dst, nodes)
    if block.pieces < 1 or block.src[1] % block.pieces or block.dst[1] % block.pieces:
        _fail(f"{field}.pieces", f"a divisor of {block.src[1]} and {block.dst[1]}", block.pieces)
    if min(block.kernel, default=0) < 1:
        _fail(f"{field}.kernel", "sizes of at least 1", block.kernel)
    if (taps := math.prod(block.kernel)) > MOST_TAPS:
        _fail(f"{field}.kernel", f"at most {MOST_TAPS} taps", block.kernel)
    expected = (block.pieces, block.dst[1] // block.pieces, block.src[1] // block.pieces, taps)
    if shape is not None and tuple(shape) != expected:
        _fail(f"edge_features of {field} ({block.name})", str(expected), tuple(shape))


def _check_runs(field: str, runs: Runs, size: int, count: int) -> None:
    """Runs that stand for `count` positions below `size`."""
    for first, length, step in runs:
        if first < 0 or length < 1 or step < 1 or first + (length - 1) * step >= size:
            _fail(field, f"runs (first, count, step) below {size}", (first, length, step))
    if not runs or sum(length for _, length, _ in runs) != count:
        _fail(field, f"{count} positions", runs)


def _check_edge_slot(field: str, slot: EdgeSlot, spec: GraphSpec) -> None:
    if slot.param not in spec.shapes:
        _fail(f"{field}.param", "a parameter of the graph", slot.param)
    if not 0 <= slot.block < len(spec.blocks):
        _fail(f"{field}.block", f"one of {len(spec.blocks)} blocks", slot.block)
    if min(slot.shape) < 1 or math.prod(slot.shape) != math.prod(spec.shapes[slot.param]):
        _fail(f"{field}.shape", f"as many numbers as {slot.param} of {spec.shapes[slot.param]}", slot.shape)
    if sorted(slot.perm) != [0, 1, 2, 3]:
        _fail(f"{field}.perm", "a permutation of 0, 1, 2, 3", slot.perm)
    pieces, out, into, taps = spec.blocks[slot.block].shape
    g, o, i, k = slot.canonical_shape
    if slot.pieces[0] < 0 or slot.pieces[1] != pieces or sum(slot.pieces) > g:
        _fail(f"{field}.pieces", f"{pieces} of {g} pieces", slot.pieces)
    _check_runs(f"{field}.outputs", slot.outputs, o, out)
    _check_runs(f"{field}.inputs", slot.inputs, i, into)
    if len(slot.taps) != k or len(set(slot.taps)) != k or min(slot.taps) < 0 or max(slot.taps) >= taps:
        _fail(f"{field}.taps", f"{k} different positions below {taps}", slot.taps)


def _check_node_slot(field: str, slot: NodeSlot, spec: GraphSpec, buffers: Mapping[str, Shape]) -> None:
    known = spec.shapes if slot.trainable else buffers
    if slot.param not in known:
        _fail(f"{field}.param", "a parameter of the graph" if slot.trainable else "a buffer", slot.param)
    _check_range(f"{field}.nodes", slot.nodes, spec.num_nodes)
    if not 0 <= slot.column < len(spec.columns):
        _fail(f"{field}.column", f"one of {len(spec.columns)} columns", slot.column)
    _check_runs(f"{field}.rows", slot.rows, math.prod(known[slot.param]), slot.nodes[1])


def _check_places(spec: GraphSpec) -> None:
    """No two homes in the same place."""
    taken: set[tuple[int, int]] = set()
    for slot in spec.edge_slots:
        own = {(slot.block, tap) for tap in slot.taps} if slot.home else set()
        if taken & own:
            _fail("edge_slots", "one weight per place", f"{slot.param} in block {slot.block}, which is taken")
        taken |= own
    features = torch.zeros(spec.num_nodes, len(spec.columns), dtype=torch.bool)
    for slot in spec.node_slots:
        place = features[slot.nodes[0] : sum(slot.nodes), slot.column]
        if slot.home and bool(place.any()):
            _fail("node_slots", "one parameter per place", f"{slot.param} at {slot.nodes}, which is taken")
        place |= slot.home


def _check_homes(spec: GraphSpec) -> None:
    """Every parameter of the graph is written back whole, and once."""
    weights = spec.weights()
    vectors: dict[str, list[NodeSlot]] = defaultdict(list)
    for slot in spec.node_slots:
        if slot.trainable and slot.home:
            vectors[slot.param].append(slot)
    for name, shape in spec.shapes.items():
        if (name in weights) == (name in vectors):
            _fail(f"home of {name}", "edges or nodes", "both" if name in weights else "neither")
        if name in weights:
            _check_weight(name, weights[name])
        else:
            _check_vector(name, vectors[name], math.prod(shape))


def _check_weight(name: str, slots: list[EdgeSlot]) -> None:
    if len({(slot.shape, slot.perm) for slot in slots}) > 1:
        _fail(f"home of {name}", "one shape and perm", [(slot.shape, slot.perm) for slot in slots])
    g, o, i, _ = slots[0].canonical_shape
    _check_count(name, g * o * i, (s.pieces[1] * _count(s.outputs) * _count(s.inputs) for s in slots))
    if not slots[0].whole:
        written = torch.zeros(g, o, i, dtype=torch.bool)  # no larger than the tensors: the counts agree
        for slot in slots:
            slot.write(written, torch.tensor(True))
        _check_all(name, written)


def _check_vector(name: str, slots: list[NodeSlot], size: int) -> None:
    _check_count(name, size, (slot.nodes[1] for slot in slots))
    written = torch.zeros(size, dtype=torch.bool)
    for slot in slots:
        slot.write(written, torch.tensor(True))
    _check_all(name, written)


def _count(runs: Runs) -> int:
    return sum(length for _, length, _ in runs)


def _check_count(name: str, size: int, parts: Iterator[int]) -> None:
    if (found := sum(parts)) != size:
        _fail(f"home of {name}", f"{size} channel pairs or channels", found)


def _check_all(name: str, written: Tensor) -> None:
    if not bool(written.all()):
        _fail(f"home of {name}", "every number once", f"{int((~written).sum())} numbers without a place")


def _check_marks(spec: GraphSpec) -> None:
    """What is said about ranges of nodes: frozen, heads, ties."""
    for index, (nodes, _) in enumerate(spec.frozen):
        _check_range(f"frozen[{index}]", nodes, spec.num_nodes)
    for index, (nodes, count) in enumerate(spec.heads):
        _check_range(f"heads[{index}]", nodes, spec.num_nodes)
        if count < 1 or nodes[1] % count:
            _fail(f"heads[{index}]", f"a number of heads that divides {nodes[1]}", count)
    for index, (one, other) in enumerate(spec.ties):
        _check_range(f"ties[{index}]", one, spec.num_nodes)
        _check_range(f"ties[{index}]", other, spec.num_nodes)
        if one[1] != other[1]:
            _fail(f"ties[{index}]", "two ranges of one length", (one, other))


def _check_followers(spec: GraphSpec, buffers: Mapping[str, Shape]) -> None:
    """Carried tensors that follow channels have an axis for it."""
    for index, (name, axis, followed) in enumerate(spec.followers):
        shape = spec.carried.get(name, buffers.get(name, ()))
        if not 0 <= axis < len(shape):
            _fail(f"followers[{index}]", "a carried tensor and one of its axes", (name, axis))
        _check_runs(f"followers[{index}]", followed, spec.num_nodes, shape[axis])
