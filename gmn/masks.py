"""From nodes to numbers: which entries of every tensor belong to nodes that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gmn.address import positions
from gmn.graph import GraphSpec


def entries(spec: GraphSpec, shapes: Mapping[str, Sequence[int]], keep: Tensor) -> dict[str, Tensor]:
    """Bool of each tensor's shape: the entries whose nodes all stay; tensors that belong to no node are left out.

    Args:
        spec: The graph's structure.
        shapes: Shapes of parameters and buffers by name.
        keep: [N] bool, the nodes that stay.
    """
    stays: dict[str, Tensor] = {}
    weights = {name: slots for name, slots in spec.weights().items() if name in shapes}
    for name, slots in weights.items():
        pieces, out, into, taps = slots[0].canonical_shape
        rows = keep[spec.made_by(slots)].view(pieces, out, 1, 1)
        cols = keep[spec.read_by(slots)].view(pieces, 1, into, 1)
        stays[name] = slots[0].restore((rows & cols).expand(pieces, out, into, taps), shapes[name])
    whole = lambda name: stays.setdefault(name, torch.ones(tuple(shapes[name]), dtype=torch.bool))  # noqa: E731
    for slot in spec.node_slots:
        if slot.param in shapes and slot.param not in weights:
            slot.write(whole(slot.param).view(-1), keep[slot.nodes[0] : sum(slot.nodes)])
    for name, axis, nodes in spec.followers:
        if name in shapes and name not in weights:
            kept = whole(name)
            kept &= keep[positions(nodes)].view([-1 if d == axis else 1 for d in range(kept.dim())])
    return stays
