"""Which channels go together: coupled channels, groups of them, and the mask that says which nodes stay.

A *channel* here is a set of nodes that must be kept or removed together: nodes joined by an identity edge (a
residual) or by a depthwise kernel, and all nodes of an attention head. A *group* is all channels that end in the same
layers; it has one channel per prunable index k (DepGraph, Fang et al. 2023, section 3.1). Both are read from the
graph alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from gmn.errors import PruningError
from gmn.graph import EdgeBlock, GraphSpec, block_edges, group_of

MADE_ALIKE = ("input", "opaque", "position")  # kinds of nodes that no weight makes, and that come as a whole


@dataclass(frozen=True)
class Couplings:
    """Coupled channels of a network.

    Attributes:
        channel: [N], the channel that each node belongs to.
        group: [channels], the group that each channel belongs to.
        names: Name of each group: its first layer.
        frozen: Groups that must stay whole, with the reason.
    """

    channel: Tensor
    group: Tensor
    names: tuple[str, ...]
    frozen: dict[int, str]

    @property
    def num_channels(self) -> int:
        """Number of channels in all groups."""
        return len(self.group)

    @property
    def prunable(self) -> Tensor:
        """[channels] bool: channels of groups that are not frozen."""
        return ~torch.isin(self.group, torch.tensor(list(self.frozen), dtype=torch.int64))

    @property
    def first_nodes(self) -> Tensor:
        """[channels]: the first node of each channel."""
        return _first(self.channel, torch.arange(len(self.channel)))

    def left_after(self, ratio: float) -> Tensor:
        """[groups]: how many channels of each stay when this share of them goes; one at least."""
        return ((1 - ratio) * torch.bincount(self.group)).round().long().clamp(min=1)

    def nodes(self, channels: Tensor) -> Tensor:
        """[channels] bool to [N] bool."""
        return channels[self.channel]


@dataclass(frozen=True)
class KeepMask:
    """Which nodes stay: bool [N], equal for coupled nodes, never empty in a group."""

    keep: Tensor

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool or self.keep.dim() != 1:
            raise PruningError("malformed mask", expected="bool [N]", got=f"{self.keep.dtype} {tuple(self.keep.shape)}")

    def validate(self, spec: GraphSpec, coupled: Couplings) -> KeepMask:
        """Check the mask against a network and return it.

        Raises:
            PruningError: if the size differs, coupled channels differ, a frozen node goes or a layer is emptied.
        """
        if len(self.keep) != spec.num_nodes:
            raise PruningError(
                "the mask is for another network", expected=f"{spec.num_nodes} nodes", got=str(len(self.keep))
            )
        kept = torch.zeros(coupled.num_channels, dtype=torch.int64).index_add_(0, coupled.channel, self.keep.long())
        if not torch.equal(
            kept[coupled.channel][self.keep], torch.bincount(coupled.channel)[coupled.channel][self.keep]
        ):
            raise PruningError("the mask separates channels that are coupled")
        if not bool(self.keep[coupled.nodes(~coupled.prunable)].all()):
            raise PruningError("the mask removes channels that must stay")
        for group in spec.groups:
            if not bool(self.keep[group.start : group.start + group.size].any()):
                raise PruningError("the mask empties a layer", where=group.name)
        return self


def couplings(spec: GraphSpec) -> Couplings:
    """Coupled channels and their groups, by joining nodes along identity edges and depthwise kernels."""
    channel = _components(spec.num_nodes, _coupled_pairs(spec))
    first_node = _first(channel, torch.arange(spec.num_nodes))
    group = _groups(spec, channel, len(first_node))
    starts = torch.tensor([node_group.start for node_group in spec.groups])
    owner = torch.searchsorted(starts, _first(group, first_node), right=True) - 1
    names = tuple(spec.groups[index].name for index in owner.tolist())
    return Couplings(channel, group, names, _frozen(spec, channel, group))


def inside(spec: GraphSpec, coupled: Couplings) -> Couplings:
    """The couplings with every group frozen that spans several layers, so that only units inside a block are left.

    A residual joins the layers that write to it; attention heads and the nodes of an MLP are made by one layer.

    Args:
        spec: The graph's structure.
        coupled: Its couplings; what they freeze keeps its reason.
    """
    group = coupled.group[coupled.channel]
    layer = torch.cat([torch.full((node_group.size,), i) for i, node_group in enumerate(spec.groups)])
    layers = torch.bincount(torch.stack([group, layer]).unique(dim=1)[0])
    streams = dict.fromkeys((layers > 1).nonzero().flatten().tolist(), "residual stream")
    return dataclasses.replace(coupled, frozen={**streams, **coupled.frozen})


def _first(index: Tensor, nodes: Tensor) -> Tensor:
    """The lowest of the nodes that share an index, for every index."""
    return nodes.new_zeros(int(index.max()) + 1).scatter_reduce(0, index, nodes, "amin", include_self=False)


def parametric(spec: GraphSpec) -> set[int]:
    """Indices of the blocks that hold weights; the others are identities."""
    return {slot.block for slot in spec.edge_slots}


def _coupled_pairs(spec: GraphSpec) -> Tensor:
    """[2, pairs] of nodes that must be kept or removed together."""
    weights = parametric(spec)
    pairs = [torch.empty(2, 0, dtype=torch.int64)]
    for index, block in enumerate(spec.blocks):
        if block.form == "diagonal":
            pairs.append(block_edges(block))
        elif index not in weights:
            pairs.append(_dense_identity(block))
    for first, second in spec.ties:
        pairs.append(torch.stack([torch.arange(start, start + size) for start, size in (first, second)]))
    for (start, size), heads in spec.heads:
        nodes = torch.arange(start, start + size)
        pairs.append(torch.stack([nodes.view(heads, -1)[:, :1].expand(heads, size // heads).flatten(), nodes]))
    return torch.cat(pairs, dim=1)


def _dense_identity(block: EdgeBlock) -> Tensor:
    """Pairs of a dense identity block: the smaller side is centred in the larger one, as in option A shortcuts."""
    size = min(block.src[1], block.dst[1])
    steps = torch.arange(size)
    src, dst = ((side[0] + (side[1] - size) // 2 + steps) for side in (block.src, block.dst))
    return torch.stack([src, dst])


def _components(nodes: int, pairs: Tensor) -> Tensor:
    """Number of the connected component of each node, in the order of their first nodes."""
    from scipy.sparse import coo_array  # takes a while to import
    from scipy.sparse.csgraph import connected_components

    joined = coo_array((torch.ones(pairs.shape[1]).numpy(), tuple(pairs.numpy())), (nodes, nodes))
    return torch.from_numpy(connected_components(joined, directed=False)[1]).long()


def _groups(spec: GraphSpec, channel: Tensor, channels: int) -> Tensor:
    """[channels]: channels that are made by the same weight layers belong to one group."""
    weights = parametric(spec)
    made = {block.dst for index, block in enumerate(spec.blocks) if index in weights and block.form != "diagonal"}
    made |= {(group.start, group.size) for group in spec.groups if group.kind in MADE_ALIKE}
    pairs = [torch.stack([channel[start].expand(size), channel[start : start + size]]) for start, size in sorted(made)]
    return _components(channels, torch.cat(pairs, dim=1))


def _frozen(spec: GraphSpec, channel: Tensor, group: Tensor) -> dict[int, str]:
    """Groups that must stay: ends of the network, what has no rule, and what surgery cannot follow."""
    weights = parametric(spec)
    ranges = list(spec.frozen)
    for index, block in enumerate(spec.blocks):
        if block.form == "grouped":
            ranges += [(side, f"grouped convolution {block.name}") for side in (block.src, block.dst)]
        if index not in weights and _is_padded(spec, block):
            ranges += [(side, f"zero-padded shortcut {block.name}") for side in (block.src, block.dst)]
    frozen: dict[int, str] = {}
    for (start, size), reason in ranges:
        for g in group[channel[start : start + size]].unique().tolist():
            frozen.setdefault(g, reason)
    return frozen


def _is_padded(spec: GraphSpec, block: EdgeBlock) -> bool:
    """An identity into only some channels of a sum: the code pads with zeros, by a number that no weight tells."""
    target = group_of(spec, block.dst[0])
    covered = sum(
        b.dst[1] for b in spec.blocks if b.name == block.name and target.start <= b.dst[0] < target.start + target.size
    )
    return block.src[1] != block.dst[1] or covered < target.size
