"""Importance scores and the sparsity loss (GMN, appendix B.2), for all groups of a network at once.

    I_t,k  = sum |w_t[k]|^p                        for each parameter slice t of channel k
    I_k    = mean over t of I_t,k                  reduce="mean"; "first" takes the layer that makes the channel
    I^_k   = I_k / max over the group of I         normalize="max"; "mean" or "none"
    R      = sum_k gamma_k I^_k
    gamma_k = 2 ** (alpha (sqrt I_max - sqrt I_k) / (sqrt I_max - sqrt I_min))

gamma is a constant for the gradient. So is the normaliser in the paper, and then most of the gradient shrinks all
channels alike. With `scale_invariant` the loss is R = sum_k gamma_k I_k / mean I with the mean differentiated: scaling
a whole group changes nothing, only differences between its channels count. (Differentiating the maximum instead
would reward a single channel for growing.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gmn.address import EdgeSlot
from gmn.graph import GraphSpec
from gmn.groups import Couplings
from gmn.settings import Criterion


@dataclass(frozen=True)
class _Member:
    """Slices of one parameter: axis 0 by output channel, axis 1 by input channel, None for a per-channel vector."""

    param: str
    axis: int | None
    slot: EdgeSlot | None
    channel: Tensor
    first: Tensor  # [slices] bool: the slice counts under reduce="first"


class Importance:
    """Scores of all channels of a network; built once, evaluated on any values of its parameters.

    Args:
        spec: The graph's structure.
        coupled: Its coupled channels.
        criterion: How to score.
    """

    def __init__(self, spec: GraphSpec, coupled: Couplings, criterion: Criterion | None = None) -> None:
        self.criterion = criterion or Criterion()
        self.coupled = coupled
        self.members = _members(spec, coupled)
        channels = coupled.num_channels
        counts = torch.zeros(channels)
        for member in self.members:
            counts.index_add_(0, member.channel, self._weights(member))
        self.counts = counts.clamp(min=1.0)

    def _weights(self, member: _Member) -> Tensor:
        return member.first.float() if self.criterion.reduce == "first" else torch.ones(len(member.channel))

    def energies(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """|w|^p by parameter: [G, O, inputs] summed over the taps of each kernel, or [channels] for a norm."""
        return {m.param: _energy(state[m.param], m.slot, self.criterion.p) for m in self.members}

    def raw(self, energies: Mapping[str, Tensor]) -> Tensor:
        """[channels]: I_k, before normalisation; differentiable in the energies."""
        sample = energies[self.members[0].param]
        total = sample.new_zeros(self.coupled.num_channels)
        for member in self.members:
            energy = energies[member.param]
            norms = energy if member.axis is None else energy.sum(dim=2 - member.axis).flatten()
            total = total.index_add(0, member.channel.to(sample.device), norms * self._weights(member).to(sample))
        return total / self.counts.to(sample)

    def normalizer(self, raw: Tensor, keep: Tensor | None = None, how: str | None = None) -> Tensor:
        """[channels]: NORM of the group that each channel belongs to, over the channels kept so far."""
        group = self.coupled.group.to(raw.device)
        kept = torch.ones_like(raw) if keep is None else keep.to(raw)
        size, how = int(group.max()) + 1, how or self.criterion.normalize
        if how == "none":
            return torch.ones_like(raw)
        if how == "max":
            return _reduce(raw * kept, group, "amax")[group]
        total, count = (raw.new_zeros(size).index_add(0, group, x) for x in (raw * kept, kept))
        return (total / count.clamp(min=1.0))[group]

    def scores(self, energies: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        """[channels]: normalised scores, comparable over groups; the lowest go first. `keep`: [channels] bool."""
        raw = self.raw(energies)
        return raw / self.normalizer(raw, keep).clamp(min=torch.finfo(raw.dtype).tiny)

    def sparsity_loss(self, state: Mapping[str, Tensor], *, scale_invariant: bool = False) -> Tensor:
        """R summed over the groups that can be pruned; a scalar, differentiable in the parameters."""
        raw = self.raw(self.energies(state))
        norm = self.normalizer(raw, how="mean") if scale_invariant else self.normalizer(raw).detach()
        terms = self.gamma(raw.detach()) * raw / norm.clamp(min=torch.finfo(raw.dtype).tiny)
        return terms[self.coupled.prunable.to(raw.device)].sum()

    def gamma(self, raw: Tensor) -> Tensor:
        """[channels]: 2^0 for the strongest channel of a group to 2^alpha for the weakest; 1 where all are equal."""
        group, root = self.coupled.group.to(raw.device), raw.sqrt()
        high, low = _reduce(root, group, "amax")[group], _reduce(root, group, "amin")[group]
        spread = torch.where(high > low, high - low, torch.ones_like(high))
        return 2.0 ** (self.criterion.alpha * (high - root) / spread)


def _reduce(values: Tensor, group: Tensor, how: Literal["amax", "amin"]) -> Tensor:
    size = int(group.max()) + 1
    return values.new_zeros(size).scatter_reduce(0, group, values, how, include_self=False)


def _energy(weight: Tensor, slot: EdgeSlot | None, p: float) -> Tensor:
    powered = weight * weight if p == 2 else weight.abs() ** p
    return powered if slot is None else slot.canonical(powered).sum(dim=3)


def _members(spec: GraphSpec, coupled: Couplings) -> list[_Member]:
    """Every parameter slice that counts: weights by output and by input channel, and norm weights."""
    members: list[_Member] = []
    makers: set[int] = set()
    for param, slots in spec.weights().items():
        made = coupled.channel[spec.made_by(slots)]
        first = torch.tensor([int(c) not in makers for c in made])
        makers.update(made.tolist())
        members.append(_Member(param, 0, slots[0], made, first))
        pieces, out, into, _ = slots[0].canonical_shape
        if pieces > 1 and out == into == 1:
            continue  # a depthwise kernel belongs to one channel: counted once
        read = coupled.channel[spec.read_by(slots)]
        members.append(_Member(param, 1, slots[0], read, torch.zeros(len(read), dtype=torch.bool)))
    for node in spec.node_slots:
        if node.home and spec.columns[node.column].endswith("norm.weight"):
            channel = coupled.channel[node.nodes[0] : sum(node.nodes)]
            members.append(_Member(node.param, None, None, channel, torch.zeros(len(channel), dtype=torch.bool)))
    return members
