"""Grows a graph while a trace is read: nodes, edge blocks and the addresses of parameters.

While a trace is read every activation is shadowed by a `Flow`: an integer tensor of the activation's own shape that
says which node each position carries (-1: none, a padded zero). Operations that only move data (reshape, permute,
concatenate, split, pad) are replayed on the shadow, so channel order is followed without a rule for each of them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gmn.errors import ConversionError
from gmn.graph import EdgeBlock, EdgeSlot, GraphSpec, NetworkGraph, NodeGroup, NodeSlot, Range

NO_NODE = -1
# what torch-pruning is asked to cut; a layer with a rule of its own is converted, but stays whole
CUTTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IDENTITY_KERNEL: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Layout:
    """Which features nodes and edges have.

    Attributes:
        columns: Names of the node features. A name that starts with `shortcut.` belongs to the layer of the
            residual branch that ends in the node.
        defaults: The value of each where a channel has no such parameter.
        kernels: `per-size` (each kernel size has its own features) or `padded` (all zero-padded to the largest).
        identities: residual edges without parameters, `diagonal` or `dense` (with a zero for each pair i != j).
        bias_column: where a bias goes if its layer has no norm and there is no column `bias`.
    """

    columns: tuple[str, ...]
    defaults: tuple[float, ...]
    kernels: str = "per-size"
    identities: str = "diagonal"
    bias_column: str = "bias"


@dataclass(frozen=True)
class Flow:
    """What an activation carries: the node at every position, and what may still be merged into those nodes.

    `stage`: `raw` (straight out of a weight layer), `normed`, `summed` (a residual was added) or `closed`
    (anything else). `uses` is the number of operations that read the activation.
    """

    ids: Tensor
    stage: str = "closed"
    uses: int = 1

    def channels(self, axis: int) -> Tensor:
        """Node of every channel along `axis`; raises if the other axes do not share one channel order."""
        axis %= self.ids.dim()
        others = [d for d in range(self.ids.dim()) if d != axis and self.ids.shape[d] > 1 and self.ids.stride(d) != 0]
        if not others:
            return _first(self.ids, axis)
        top = self.ids.amax(dim=[d for d in range(self.ids.dim()) if d != axis], keepdim=True)
        if not bool(((self.ids == top) | (self.ids == NO_NODE)).all()):
            raise ConversionError(
                "the channels are not aligned along one axis", got=f"axis {axis} of {tuple(self.ids.shape)}"
            )
        return top.flatten()


def _first(ids: Tensor, axis: int) -> Tensor:
    for dim in range(ids.dim()):
        if dim != axis:
            ids = ids.narrow(dim, 0, 1)
    return ids.flatten()


def spread(channels: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The shadow of an activation of `shape` whose axis `axis` carries `channels` (a view, no memory)."""
    view = [1] * len(shape)
    view[axis % len(shape)] = -1
    return channels.view(view).expand(shape)


def runs(nodes: Tensor) -> list[tuple[int, int, int]]:
    """Split node numbers into runs of consecutive ones: (offset, first node, length); padded zeros are left out.

    >>> runs(torch.tensor([-1, 4, 5, 6, 0, 1, -1]))
    [(1, 4, 3), (4, 0, 2)]
    """
    breaks = ((nodes[1:] != nodes[:-1] + 1) | (nodes[:-1] == NO_NODE)).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    stops = [*starts[1:], len(nodes)]
    return [(a, int(nodes[a]), b - a) for a, b in zip(starts, stops, strict=True) if nodes[a] != NO_NODE]


@dataclass
class _Group:
    name: str
    start: int
    size: int
    kind: str
    depth: int
    slots: dict[str, str] = field(default_factory=dict)  # column -> parameter


@dataclass
class _Block:
    name: str
    src: Range
    group: _Group
    offset: int  # of the target range in its group
    size: int
    pieces: int
    kernel: tuple[int, ...]
    slot: tuple[str, tuple[int, int, int, int], tuple[int, int, int, int], Range] | None = None
    values: Tensor | None = None  # of an identity


class Builder:
    """Collects nodes, blocks and addresses; `finish` makes the graph.

    Args:
        model: The network that is converted; parameters are looked up by name.
        layout: Which features nodes and edges have.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.params: dict[str, Tensor] = dict(model.named_parameters())
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        self.groups: list[_Group] = []
        self.blocks: list[_Block] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self._next = 0

    # -- nodes ---------------------------------------------------------------------------------------------------

    def add_nodes(self, name: str, size: int, kind: str, sources: Tensor | None = None) -> _Group:
        """A new group of nodes, one step deeper than its sources."""
        depth = 0 if sources is None else 1 + max((g.depth for g in self._groups_of(sources)), default=0)
        group = _Group(name, self._next, size, kind, depth)
        self._next += size
        self.groups.append(group)
        return group

    def ids(self, group: _Group) -> Tensor:
        """Node numbers of a group."""
        return torch.arange(group.start, group.start + group.size, dtype=torch.int32)

    def whole_group(self, channels: Tensor) -> _Group | None:
        """The group whose nodes are exactly these channels in order, if there is one."""
        group = self._group_at(int(channels[0])) if len(channels) else None
        return group if group and torch.equal(channels, self.ids(group)) else None

    def group_of(self, channels: Tensor) -> _Group:
        """The group of the first channel."""
        return self._group_at(int(channels[0]))

    def _group_at(self, node: int) -> _Group:
        index = bisect_right(self.groups, node, key=lambda group: group.start)
        return self.groups[index - 1]

    def _groups_of(self, nodes: Tensor) -> list[_Group]:
        return [self._group_at(first) for _, first, _ in runs(nodes)]

    def freeze(self, nodes: Tensor, reason: str) -> None:
        """Forbid the removal of these nodes."""
        self.frozen.append((nodes[nodes >= 0].unique(), reason))

    def _freeze_uncuttable(self, param: str, nodes: Tensor) -> None:
        layer = self.model.get_submodule(param.rpartition(".")[0])
        if not isinstance(layer, CUTTABLE):
            self.freeze(nodes, f"no surgery for {type(layer).__name__} {param.rpartition('.')[0]}")

    def attach(self, group: _Group, values: dict[str, str]) -> bool:
        """Put parameters (column name -> parameter name) on a group's nodes, if all their columns are free."""
        places = {self._place(group, values, column): param.lstrip(".") for column, param in values.items()}
        if not places.keys() <= set(self.layout.columns) or places.keys() & group.slots.keys():
            return False
        group.slots |= places
        for param in places.values():
            self._freeze_uncuttable(param, self.ids(group))
        return True

    def attach_or_fail(self, group: _Group, values: dict[str, str]) -> None:
        """Like `attach`; raises if the layout has no free column."""
        if not self.attach(group, values):
            raise ConversionError(
                "the layout has no free node feature",
                expected=f"columns for {', '.join(values)}",
                got=", ".join(self.layout.columns),
                where=group.name,
                hint="use layout='generic'",
            )

    def _place(self, group: _Group, values: dict[str, str], column: str) -> str:
        bare = column == "bias" and "norm.weight" not in {*group.slots, *values}
        return self.layout.bias_column if bare and "bias" not in self.layout.columns else column

    # -- edges ---------------------------------------------------------------------------------------------------

    def add_weight(
        self,
        param: str,
        src: Tensor,
        dst: _Group,
        *,
        shape: tuple[int, int, int, int],
        kernel: tuple[int, ...],
        perm: tuple[int, int, int, int] = (0, 1, 2, 3),
    ) -> None:
        """Edges from the channels `src` to a group; `shape` and `perm` make the weight [G, O, I, K]: see `EdgeSlot`."""
        if bool((src == NO_NODE).any()):
            raise ConversionError("a layer reads padded channels, which have no node", where=param)
        param = param.lstrip(".")  # the network is one layer: its name is empty
        self._freeze_uncuttable(param, torch.cat([src, self.ids(dst)]))
        pieces = shape[perm[0]]
        parts = runs(src)
        if pieces > 1 and len(parts) > 1:
            src = self.join(f"{param}.input", src)
            parts = runs(src)
        for offset, first, length in parts:
            inputs = (offset, length) if pieces == 1 else (0, length // pieces)
            self.blocks.append(
                _Block(param, (first, length), dst, 0, dst.size, pieces, kernel, (param, shape, perm, inputs))
            )

    def join(self, name: str, channels: Tensor, kind: str = "merge") -> Tensor:
        """New nodes for channels that come from several places, each joined to its source by an identity."""
        group = self.add_nodes(name, len(channels), kind, channels)
        self.add_identity(name, channels, group, dense=False)
        return self.ids(group)

    def add_identity(self, name: str, src: Tensor, dst: _Group, *, dense: bool) -> None:
        """Residual edges of value 1 from channel k of `src` to node k of a group; padded channels have none."""
        source = self.whole_group(src[src >= 0]) if dense else None
        if source is not None:
            values = torch.zeros(1, dst.size, source.size, 1)
            values[0, (src >= 0).nonzero().flatten(), src[src >= 0].long() - source.start] = 1.0
            block = _Block(name, (source.start, source.size), dst, 0, dst.size, 1, IDENTITY_KERNEL, values=values)
            self.blocks.append(block)
            return
        for offset, first, length in runs(src):
            values = torch.ones(length, 1, 1, 1)
            block = _Block(name, (first, length), dst, offset, length, length, IDENTITY_KERNEL, values=values)
            self.blocks.append(block)

    def absorb(self, branch: _Group, main: _Group) -> bool:
        """Make the layer at the end of a residual branch end in the nodes of the main path (a downsample convolution).

        Its norm takes the `shortcut.` columns. Returns False, and changes nothing, if they are not free.
        """
        if any(bool(torch.isin(self.ids(branch), nodes).any()) for nodes, _ in self.frozen):
            return False
        if not self.attach(main, {f"shortcut.{column}": param for column, param in branch.slots.items()}):
            return False
        for block in self.blocks:
            if block.group is branch:
                block.group = main
        self.groups.remove(branch)
        return True

    # -- the graph -----------------------------------------------------------------------------------------------

    def finish(self, template: nn.Module) -> NetworkGraph:
        """Number the nodes without gaps and copy the parameters into the features."""
        starts, groups = _number(self.groups)
        kernel = _largest([b.kernel for b in self.blocks]) if self.layout.kernels == "padded" else None
        sample = next(iter(self.params.values()))  # of the network's type, on its device
        blocks, slots, edges = [], [], []
        for index, raw in enumerate(self.blocks):
            src = (self._moved(raw.src[0], starts), raw.src[1])
            dst = (starts[id(raw.group)] + raw.offset, raw.size)
            block = EdgeBlock(raw.name, src, dst, raw.pieces, _target(raw.kernel, kernel))
            taps = _positions(raw.kernel, block.kernel)
            if raw.slot is not None:
                param, shape, perm, inputs = raw.slot
                slots.append(EdgeSlot(param, index, shape, inputs, taps, perm))
                values = slots[-1].read(self.params[param].detach())
            else:
                assert raw.values is not None
                values = raw.values.to(sample)
            blocks.append(block)
            edges.append(_pad(values, block.shape, taps))
        spec = self._spec(groups, starts, blocks, slots)
        return NetworkGraph(spec, self._node_features(spec), tuple(edges), template).validate()

    def _spec(
        self,
        groups: list[NodeGroup],
        starts: dict[int, int],
        blocks: list[EdgeBlock],
        edge_slots: list[EdgeSlot],
    ) -> GraphSpec:
        columns = {name: i for i, name in enumerate(self.layout.columns)}
        node_slots = [
            NodeSlot(param, (starts[id(group)], group.size), columns[column], param in self.params)
            for group in self.groups
            for column, param in group.slots.items()
        ]
        homes = {s.param for s in edge_slots} | {s.param for s in node_slots}
        frozen = [
            ((self._moved(first, starts), length), reason)
            for nodes, reason in self.frozen
            for _, first, length in runs(nodes)
        ]
        return GraphSpec(
            groups=tuple(groups),
            blocks=tuple(blocks),
            node_slots=tuple(node_slots),
            edge_slots=tuple(edge_slots),
            columns=self.layout.columns,
            defaults=self.layout.defaults,
            shapes={name: tuple(p.shape) for name, p in self.params.items() if name in homes},
            carried=tuple(name for name in [*self.params, *self.buffers] if name not in homes),
            frozen=tuple(frozen),
        )

    def _moved(self, node: int, starts: dict[int, int]) -> int:
        group = self._group_at(node)
        return node - group.start + starts[id(group)]

    def _node_features(self, spec: GraphSpec) -> Tensor:
        sample = next(iter(self.params.values()))
        features = sample.new_tensor(spec.defaults).repeat(spec.num_nodes, 1)
        for slot in spec.node_slots:
            start, size = slot.nodes
            source = self.params if slot.trainable else self.buffers
            features[start : start + size, slot.column] = source[slot.param].detach()
        return features


def _number(groups: list[_Group]) -> tuple[dict[int, int], list[NodeGroup]]:
    starts, result, position = {}, [], 0
    for group in groups:
        starts[id(group)] = position
        result.append(NodeGroup(group.name, position, group.size, group.kind))
        position += group.size
    return starts, result


def _largest(kernels: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The smallest kernel that holds all of them; a linear layer's (1,) fits everywhere."""
    dims = max(len(kernel) for kernel in kernels)
    full = [kernel if len(kernel) == dims else (1,) * dims for kernel in kernels]
    return tuple(max(sizes) for sizes in zip(*full, strict=True))


def _target(kernel: tuple[int, ...], largest: tuple[int, ...] | None) -> tuple[int, ...]:
    """The kernel that one is padded to; the positions of a flattened input are not a kernel and stay as they are."""
    return largest if largest and (len(kernel) == len(largest) or kernel == (1,)) else kernel


def _positions(kernel: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """Where the taps of a kernel lie in a larger one, centred.

    >>> _positions((1,), (3, 3)), _positions((2, 2), (2, 2))
    ((4,), (0, 1, 2, 3))
    """
    if len(kernel) != len(target):
        kernel = (1,) * len(target)
    grid = torch.arange(torch.Size(target).numel()).view(target)
    for dim, (small, large) in enumerate(zip(kernel, target, strict=True)):
        grid = grid.narrow(dim, (large - small) // 2, small)
    return tuple(grid.flatten().tolist())


def _pad(values: Tensor, shape: tuple[int, int, int, int], taps: tuple[int, ...]) -> Tensor:
    if len(taps) == shape[3]:
        return values.expand(shape).clone(memory_format=torch.contiguous_format)
    padded = values.new_zeros(shape)
    padded[..., list(taps)] = values.expand(*shape[:3], len(taps))
    return padded
