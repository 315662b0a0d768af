"""What belongs to each channel: the slices of weights and norms that are kept or removed with it.

    W, [G, O, I, K]     row (g, o) makes a channel (axis 0), column (g, i) reads one (axis 1)
    norm, [n]           entry n scales a channel (axis None)

A *member* is one way in which one parameter belongs to channels; a *slice* is its part of a single node. A channel has
as many slices as it has nodes that a member touches: two for a residual that two layers write to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gmn.address import EdgeSlot
from gmn.graph import GraphSpec
from gmn.groups import Couplings

Reads = Literal["all", "weights", "norms"]


@dataclass(frozen=True)
class Member:
    """Slices of one parameter.

    Attributes:
        param: Name of the parameter.
        axis: 0: by output channel, 1: by input channel, None: a per-channel vector.
        slot: Address of a weight; None for a vector.
        channel: [slices], the channel that each slice belongs to.
        first: [slices] bool: the slice is of the layer that makes the channel.
    """

    param: str
    axis: int | None
    slot: EdgeSlot | None
    channel: Tensor
    first: Tensor

    def edges(self, tensor: Tensor) -> Tensor:
        """[G, O, I]: numbers of the parameter's shape, summed over the taps of each kernel; a vector as it is."""
        return tensor if self.slot is None else self.slot.canonical(tensor).sum(dim=3)

    def sums(self, edges: Tensor) -> Tensor:
        """[slices]: the sum over each slice of what `edges` gave."""
        return edges if self.axis is None else edges.sum(dim=2 - self.axis).flatten()

    def rows(self, tensor: Tensor) -> Tensor:
        """[slices, numbers]: the numbers of each slice in a row."""
        if self.slot is None or self.axis is None:
            return tensor.reshape(-1, 1)
        return self.slot.canonical(tensor).transpose(1, 1 + self.axis).flatten(2).flatten(0, 1)

    def silence(self, edges: Tensor, keep: Tensor) -> None:
        """Set the slices of removed channels to zero, in place; `keep`: [channels] bool."""
        drop = ~keep[self.channel]
        if self.axis is not None:
            drop = drop.view(edges.shape[0], -1, 1) if self.axis == 0 else drop.view(edges.shape[0], 1, -1)
        edges.masked_fill_(drop.to(edges.device), 0.0)


class Members:
    """The members of all channels of a network, and how their values become one number per channel.

    Args:
        spec: The graph's structure.
        coupled: Its coupled channels.
        reads: Parameters that count: weights of layers, weights of norms, or both.
        reduce: `mean` over all slices of a channel; `first`: those of the layer (or norm) that makes it.
    """

    def __init__(
        self,
        spec: GraphSpec,
        coupled: Couplings,
        reads: Reads = "all",
        reduce: Literal["mean", "first"] = "mean",
    ) -> None:
        self.spec, self.coupled, self.reduce_by = spec, coupled, reduce
        self._members = _members(spec, coupled, reads)
        counts = torch.zeros(coupled.num_channels)
        for member in self._members:
            counts.index_add_(0, member.channel, self._weights(member))
        self.seen = counts > 0
        self.counts = counts.clamp(min=1.0)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def add(self, values: Iterable[Tensor]) -> Tensor:
        """[channels]: the sum over the slices that count, from [slices] for each member in turn."""
        total: Tensor | None = None
        for member, value in zip(self._members, values, strict=True):
            total = value.new_zeros(self.coupled.num_channels) if total is None else total
            total = total.index_add(
                0, member.channel.to(total.device), (value * self._weights(member).to(value)).to(total)
            )
        return torch.zeros(self.coupled.num_channels) if total is None else total

    def reduce(self, values: Iterable[Tensor]) -> Tensor:
        """[channels]: REDUCE over the slices of each channel, from [slices] for each member in turn."""
        total = self.add(values)
        return total / self.counts.to(total)

    def sums(self, edges: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """[slices] for each member in turn, from what `Member.edges` gave for each parameter."""
        return (member.sums(edges[member.param]) for member in self._members)

    def silence(self, edges: Mapping[str, Tensor], keep: Tensor) -> None:
        """Set the slices of removed channels to zero, in place: then sums are those after surgery."""
        for member in self._members:
            member.silence(edges[member.param], keep)

    def _weights(self, member: Member) -> Tensor:
        return member.first.float() if self.reduce_by == "first" else torch.ones(len(member.channel))


def _members(spec: GraphSpec, coupled: Couplings, reads: Reads) -> list[Member]:
    """Every parameter slice that counts: weights by output and by input channel, and norm weights."""
    members: list[Member] = []
    made = torch.zeros(coupled.num_channels, dtype=torch.bool)

    def add(param: str, axis: int | None, slot: EdgeSlot | None, channel: Tensor) -> None:
        first = ~made[channel] if axis != 1 else torch.zeros(len(channel), dtype=torch.bool)
        members.append(Member(param, axis, slot, channel, first))
        made[channel] |= axis != 1

    for param, slots in spec.weights().items() if reads != "norms" else ():
        add(param, 0, slots[0], coupled.channel[spec.made_by(slots)])
        pieces, out, into, _ = slots[0].canonical_shape
        if not (pieces > 1 and out == into == 1):  # a depthwise kernel belongs to one channel: counted once
            add(param, 1, slots[0], coupled.channel[spec.read_by(slots)])
    for node in spec.node_slots if reads != "weights" else ():
        if node.home and spec.columns[node.column].endswith("norm.weight"):
            add(node.param, None, None, coupled.channel[node.nodes[0] : sum(node.nodes)])
    return members
