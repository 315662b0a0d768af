"""Weights that a network uses twice: a graph has a block for each use, a graph file keeps one of them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gmn.address import EdgeSlot
from gmn.errors import CheckpointError
from gmn.graph import GraphSpec, NetworkGraph
from gmn.graph_header import Header

MOST_COPIES = 100  # times the numbers of the file: a small file must not ask for all memory


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit: -0.0 is not 0.0, and NaN is itself.

    >>> same_bits(torch.zeros(2), -torch.zeros(2)), same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
    (False, True)
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def repeats(spec: GraphSpec) -> dict[int, EdgeSlot]:
    """Blocks that hold one weight and nothing else, and are not its home."""
    slots = {slot.block: slot for slot in spec.edge_slots}
    several = {slot.block for slot in spec.edge_slots if slots[slot.block] is not slot}
    return {
        index: slot
        for index, slot in slots.items()
        if not slot.home and index not in several and len(slot.taps) == torch.Size(spec.blocks[index].kernel).numel()
    }


def _copied(slot: EdgeSlot, state: Mapping[str, Tensor]) -> Tensor:
    part = slot.read(state[slot.param])
    return torch.empty_like(part, memory_format=torch.contiguous_format).index_copy_(3, torch.tensor(slot.taps), part)


def is_copy(graph: NetworkGraph, slot: EdgeSlot, state: Mapping[str, Tensor]) -> bool:
    """Whether a block says nothing that the home of its weight, in the state dict of the graph, does not say."""
    return same_bits(_copied(slot, state), graph.edge_features[slot.block])


def check_copies(header: Header, path: Path) -> None:
    """Blocks without a tensor are such as follow from another one; CheckpointError otherwise."""
    homes = {slot.block for slot in header.spec.edge_slots if slot.home}
    used = {slot.block for slot in header.spec.edge_slots} - homes
    if not set(header.copies) <= used or len(set(header.copies)) != len(header.copies):
        raise CheckpointError(
            "malformed graph file: copies",
            expected="different blocks, each with a weight from another block",
            got=reprlib.repr(header.copies),
            where=str(path),
        )


def with_copies(graph: NetworkGraph, header: Header, path: Path) -> NetworkGraph:
    """The graph with the blocks that are not in the file; CheckpointError if they do not follow from others."""
    if not header.copies:
        return graph
    known, stored = repeats(graph.spec), sum(features.numel() for features in graph.edge_features)
    asked = sum(torch.Size(graph.spec.blocks[index].shape).numel() for index in header.copies)
    if not set(header.copies) <= known.keys() or asked > MOST_COPIES * stored:
        expected = f"blocks of one whole weight, at most {MOST_COPIES} times the file"
        raise CheckpointError("malformed graph file: copies", expected=expected, where=str(path))
    state, edges = graph.to_state_dict(), list(graph.edge_features)
    for index in header.copies:
        edges[index] = _copied(known[index], state)
    return graph.replace(graph.node_features, tuple(edges))
