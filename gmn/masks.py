"""From nodes to numbers: which entries of every tensor belong to nodes that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmn.address import positions
from gmn.graph import GraphSpec


def held(spec: GraphSpec) -> list[str]:
    """Every parameter and buffer of which an entry belongs to a node."""
    names = [*spec.weights(), *(slot.param for slot in spec.node_slots), *(name for name, _, _ in spec.followers)]
    return list(dict.fromkeys(names))


def entries(spec: GraphSpec, name: str, shape: Sequence[int], keep: Tensor) -> Tensor:
    """Bool of a tensor's shape: the entries whose nodes all stay.

    Args:
        spec: The graph's structure.
        name: The parameter or buffer, one of `held(spec)`.
        shape: Its shape.
        keep: [N] bool, the nodes that stay.
    """
    slots = spec.weights().get(name)
    if slots:
        pieces, out, into, taps = slots[0].canonical_shape
        rows = keep[spec.made_by(slots)].view(pieces, out, 1, 1)
        cols = keep[spec.read_by(slots)].view(pieces, 1, into, 1)
        return slots[0].restore((rows & cols).expand(pieces, out, into, taps), shape)
    stays = torch.ones(tuple(shape), dtype=torch.bool)
    for slot in spec.node_slots:
        if slot.param == name:
            slot.write(stays.view(-1), keep[slot.nodes[0] : sum(slot.nodes)])
    for follower, axis, nodes in spec.followers:
        if follower == name:
            stays &= keep[positions(nodes)].view([-1 if d == axis else 1 for d in range(len(shape))])
    return stays
