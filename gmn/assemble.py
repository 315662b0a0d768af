"""Turns what the builder collected into a graph: numbers the nodes, cuts edges into blocks, copies the parameters.

Nodes that turned out to be one (a downsample branch and the sum it ends in; query, key and value of attention) get
one number here. Edges are cut where source or target nodes stop being contiguous; a weight whose input channels come
from several layers, or shuffled, lies in several blocks, each with its own address.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gmn.address import EdgeSlot, NodeSlot, Range, as_runs
from gmn.builder import IDENTITY_KERNEL, ROLES, Attention, Builder, Edges, Group
from gmn.graph import EdgeBlock, GraphSpec, NetworkGraph, NodeGroup
from gmn.heads import head_owner

ALL = -1  # a weight is used whole, not from some row on
MERGED_HEADS = {f"{role}.bias" for role in ROLES}


def assemble(builder: Builder, template: nn.Module) -> NetworkGraph:
    """The graph of what the rules collected, its parameters copied into the features."""
    return _Assembly(builder).graph(template)


class _Assembly:
    """`final[old]` is the number of a node in the graph; `role[old]` is 0, 1, 2 for query, key, value, else -1."""

    def __init__(self, builder: Builder) -> None:
        self.builder, self.layout = builder, builder.layout
        self.parent = torch.arange(builder.num_nodes)
        self.role = torch.full((builder.num_nodes,), -1)
        for old, new in builder.merged:
            self.parent[old.long()] = new.long()
        self.heads = [a for a in builder.attention if self._fuse(a)]
        while not torch.equal(self.parent, jumped := self.parent[self.parent]):
            self.parent = jumped
        own = self.parent == torch.arange(len(self.parent))
        self.final = (own.cumsum(0) - 1)[self.parent]
        self.groups = [g for g in builder.groups if bool(own[g.start : g.start + g.size].any())]
        self.sizes = [int(own[g.start : g.start + g.size].sum()) for g in self.groups]
        self.blocks: list[EdgeBlock] = []
        self.slots: list[EdgeSlot] = []
        self.identities: dict[int, Tensor] = {}  # block -> values
        self._parts: dict[tuple[Range, Range, int], int] = {}  # attention blocks by their ends and their call
        self._homes: set[tuple[str, int]] = set()
        self._calls: Counter[str] = Counter()
        self.pairs: list[tuple[Tensor, Tensor]] = []  # final nodes that go together
        kernels = [edges.kernel for edges in builder.edges]
        self.kernel = _largest(kernels) if kernels and self.layout.kernels == "padded" else None

    def graph(self, template: nn.Module) -> NetworkGraph:
        for edges in self.builder.edges:
            self._add(edges)
        spec = self._spec()
        return NetworkGraph(spec, self._node_features(spec), self._edge_features(), template).validate()

    # -- attention -----------------------------------------------------------------------------------------------

    def _fuse(self, attention: Attention) -> bool:
        """One node for the k-th query, key and value channel, where each comes straight out of a linear layer."""
        parts = [part.long() for part in (attention.query, attention.key, attention.value)]
        nodes = torch.cat(parts)
        plain = len({len(part) for part in parts}) == 1 and len(nodes.unique()) == len(nodes)
        if not (plain and set(self.layout.columns) >= MERGED_HEADS and self._projected(nodes)):
            self._separate(attention)
            return False
        for role, part in enumerate(parts):
            self.parent[part] = parts[2]
            self.role[part] = role
        layer = self.builder.group_of(attention.value).name
        if layer == attention.name or head_owner(self.builder.model, layer, attention.heads) is None:
            self.builder.freeze(attention.value, f"no surgery for the heads of {attention.name}")
        return True

    def _projected(self, nodes: Tensor) -> bool:
        """Whether nothing but one-tap weights ends in these nodes, and nothing but a bias lies on them."""
        if any(group.slots.keys() - {"bias"} for group in self.builder.groups_of(nodes)):
            return False
        if not bool((self.parent[nodes] == nodes).all()) or bool((self.role[nodes] >= 0).any()):
            return False
        ends = [e for e in self.builder.edges if bool(torch.isin(e.dst, nodes).any())]
        return all(e.param is not None and e.pieces == 1 and torch.Size(e.kernel).numel() == 1 for e in ends)

    def _separate(self, attention: Attention) -> None:
        """Query and key keep their own nodes: the k-th ones go together, but heads cannot be removed."""
        builder, reason = self.builder, f"attention {attention.name} with separate query, key and value channels"
        if len(attention.query) == len(attention.key):
            builder.tie(attention.query, attention.key)
        for part in (attention.query, attention.key, attention.value):
            builder.freeze(part, reason)

    # -- edges to blocks -----------------------------------------------------------------------------------------

    def _add(self, edges: Edges) -> None:
        if edges.param is None:
            self._identity(edges)
        elif edges.pieces == 1:
            self._dense(edges, (0, 1), edges.src.long(), edges.dst.long(), edges.rows)
        else:
            self._pieces(edges)
        if edges.param is not None:
            self._homes.add((edges.param, _first_row(edges)))
            self._calls[edges.param] += 1

    def _dense(self, edges: Edges, pieces: Range, src: Tensor, dst: Tensor, rows: Tensor | None) -> None:
        rows = torch.arange(len(dst)) if rows is None else rows
        into = list(_spans(self.final[src]))
        for role in self.role[dst].unique().tolist():
            own = (self.role[dst] == role).nonzero().flatten()
            for target, out in _spans(self.final[dst[own]]):
                for source, cols in into:
                    taps, index = self._block_of(edges, source, target, role)
                    self._slot(edges, index, pieces, rows[own[out]], cols, taps)

    def _block_of(self, edges: Edges, src: Range, dst: Range, role: int) -> tuple[tuple[int, ...], int]:
        """The block that one part of a weight lies in, and at which positions of its kernel."""
        if role < 0:
            return self._block(edges, src, dst, 1)
        key = (src, dst, self._calls[str(edges.param)] if edges.rows is None else 0)
        if key not in self._parts:
            self.blocks.append(EdgeBlock(edges.name, src, dst, 1, (len(ROLES),)))
            self._parts[key] = len(self.blocks) - 1
        return (role,), self._parts[key]

    def _block(self, edges: Edges, src: Range, dst: Range, pieces: int) -> tuple[tuple[int, ...], int]:
        kernel = _target(edges.kernel, self.kernel)
        self.blocks.append(EdgeBlock(edges.name, src, dst, pieces, kernel))
        return _positions(edges.kernel, kernel), len(self.blocks) - 1

    def _slot(self, edges: Edges, block: int, pieces: Range, rows: Tensor, cols: Tensor, taps: tuple[int, ...]) -> None:
        assert edges.param is not None
        home = not {(edges.param, ALL), (edges.param, _first_row(edges))} & self._homes
        self.slots.append(
            EdgeSlot(edges.param, block, edges.shape, pieces, as_runs(rows), as_runs(cols), taps, edges.perm, home)
        )

    def _pieces(self, edges: Edges) -> None:
        """Depthwise: a diagonal for each contiguous stretch. Grouped: one block, or one for each piece."""
        g = edges.pieces
        src, dst = edges.src.long().view(g, -1), edges.dst.long().view(g, -1)
        out, into = dst.shape[1], src.shape[1]
        rows, cols = torch.arange(out), torch.arange(into)
        ends = self.final[src], self.final[dst]
        if out == into == 1:
            stretches = list(_stretches(*(end.flatten() for end in ends)))
        else:
            stretches = [(0, g)] if all(_contiguous(end.flatten()) for end in ends) else []
        for start, count in stretches:
            if count == out == into == 1:  # has the form of a dense block, but couples its two sides
                self.pairs.append((ends[0][start], ends[1][start]))
            source, target = ((int(end[start, 0]), count * end.shape[1]) for end in ends)
            taps, index = self._block(edges, source, target, count)
            self._slot(edges, index, (start, count), rows, cols, taps)
        if not stretches:  # as several dense blocks it no longer shows that its pieces must stay alike
            for nodes in (edges.src, edges.dst):
                self.builder.freeze(nodes, f"grouped convolution {edges.name}")
        for piece in range(0 if stretches else g):
            self._dense(edges, (piece, 1), src[piece], dst[piece], None)

    def _identity(self, edges: Edges) -> None:
        src, dst = self.final[edges.src.long()], self.final[edges.dst.long()]
        sample = self.sample
        if edges.dense:
            valid = edges.src >= 0
            source, target = (int(src[valid].min()), int(valid.sum())), (int(dst[0]), len(dst))
            values = sample.new_zeros(1, target[1], source[1], 1)
            values[0, valid.nonzero().flatten(), src[valid] - source[0]] = 1.0
            self._valued(edges, source, target, 1, values)
            return
        for start, count in _stretches(src, dst):
            if int(src[start]) != int(dst[start]):  # a channel is never joined to itself
                source, target = (int(src[start]), count), (int(dst[start]), count)
                self._valued(edges, source, target, count, sample.new_ones(count, 1, 1, 1))

    def _valued(self, edges: Edges, src: Range, dst: Range, pieces: int, values: Tensor) -> None:
        taps, index = self._block(edges, src, dst, pieces)
        self.identities[index] = _pad(values, self.blocks[index].shape, taps)

    @functools.cached_property
    def sample(self) -> Tensor:
        """An empty tensor of the network's widest type, on its device."""
        tensors = [*self.builder.params.values(), *self.builder.buffers.values()]
        floats = [t for t in tensors if t.is_floating_point()] or [torch.zeros(())]
        kind = functools.reduce(torch.promote_types, {t.dtype for t in floats})
        return floats[0].detach().new_empty(0, dtype=kind)

    # -- the parts of the graph ----------------------------------------------------------------------------------

    def _spec(self) -> GraphSpec:
        builder = self.builder
        node_slots = tuple(slot for group in builder.groups for slot in self._node_slots(group))
        homes = {s.param for s in self.slots} | {s.param for s in node_slots}
        heads = tuple(dict.fromkeys(self._heads()))  # before what is frozen and tied: it adds to both
        carried = {n: tuple(p.shape) for n, p in builder.params.items() if n not in homes}
        starts = itertools.accumulate(self.sizes, initial=0)
        return GraphSpec(
            groups=tuple(
                NodeGroup(group.name, start, size, self._kind(group))
                for group, start, size in zip(self.groups, starts, self.sizes, strict=False)
            ),
            blocks=tuple(self.blocks),
            node_slots=node_slots,
            edge_slots=tuple(self.slots),
            columns=self.layout.columns,
            defaults=self.layout.defaults,
            shapes={name: tuple(p.shape) for name, p in builder.params.items() if name in homes},
            carried=carried,
            buffers=tuple(name for name in builder.buffers if name not in homes),
            frozen=tuple(self._frozen()),
            heads=heads,
            ties=tuple(self._ties()),
            followers=tuple((n, axis, as_runs(self.final[nodes.long()])) for n, axis, nodes in builder.followers),
        )

    def _kind(self, group: Group) -> str:
        roles = self.role[group.start : group.start + group.size]
        return "attention" if bool((roles >= 0).all()) else group.kind

    def _node_slots(self, group: Group) -> Iterator[NodeSlot]:
        nodes = torch.arange(group.start, group.start + group.size)
        columns = {name: i for i, name in enumerate(self.layout.columns)}
        for column, param in group.slots.items():
            for role in self.role[nodes].unique().tolist():
                own = (self.role[nodes] == role).nonzero().flatten()
                name = f"{ROLES[role]}.bias" if role >= 0 else column
                home = self.builder.vectors[param] is group
                for target, rows in _spans(self.final[nodes[own]]):
                    trainable = param in self.builder.params
                    yield NodeSlot(param, target, columns[name], trainable, as_runs(own[rows]), home)

    def _frozen(self) -> Iterator[tuple[Range, str]]:
        single = [(n, why) for n, why in self.builder.regrouped if not bool((self.role[n.long()] >= 0).all())]
        seen: set[tuple[Range, str]] = set()
        for nodes, reason in [*self.builder.frozen, *single]:
            for span, _ in _spans(self.final[nodes.long()].unique()):
                if (span, reason) not in seen:
                    seen.add((span, reason))
                    yield span, reason

    def _heads(self) -> Iterator[tuple[Range, int]]:
        """Heads of neighbouring nodes; where they lie apart, the nodes of each are tied."""
        for attention in self.heads:
            nodes = self.final[attention.value.long()]
            if _contiguous(nodes):
                yield (int(nodes[0]), len(nodes)), attention.heads
                continue
            table = nodes.view(attention.heads, -1)
            self.pairs.append((table[:, :1].expand(table.shape).flatten(), nodes))
            self.builder.freeze(attention.value, f"heads of {attention.name} that lie apart")

    def _ties(self) -> Iterator[tuple[Range, Range]]:
        tied = [(self.final[a.long()], self.final[b.long()]) for a, b in self.builder.ties]
        for a, b in [*tied, *self.pairs]:
            for start, count in _stretches(a, b):
                if int(a[start]) != int(b[start]):
                    yield (int(a[start]), count), (int(b[start]), count)

    def _edge_features(self) -> tuple[Tensor, ...]:
        features: list[Tensor | None] = [self.identities.get(index) for index in range(len(self.blocks))]
        for slot in self.slots:
            shape = self.blocks[slot.block].shape
            values = slot.read(self.builder.tensor(slot.param).detach())
            filled = features[slot.block]
            if filled is None:
                features[slot.block] = _pad(values, shape, slot.taps)
            else:
                filled[..., list(slot.taps)] = values
        return tuple(f for f in features if f is not None)

    def _node_features(self, spec: GraphSpec) -> Tensor:
        features = self.sample.new_tensor(spec.defaults).repeat(spec.num_nodes, 1)
        for slot in spec.node_slots:
            start, size = slot.nodes
            features[start : start + size, slot.column] = slot.read(self.builder.tensor(slot.param).detach())
        return features


def _first_row(edges: Edges) -> int:
    return ALL if edges.rows is None else int(edges.rows[0])


def _contiguous(nodes: Tensor) -> bool:
    return bool((nodes[1:] == nodes[:-1] + 1).all())


def _spans(nodes: Tensor) -> Iterator[tuple[Range, Tensor]]:
    """Contiguous ranges that nodes fill, in any order, each with the positions of its nodes in `nodes`.

    >>> [(span, index.tolist()) for span, index in _spans(torch.tensor([7, 3, 8, 4, 7]))]
    [((7, 2), [0, 2]), ((3, 2), [1, 3]), ((7, 1), [4])]
    """
    order = nodes.argsort(stable=True)
    ranks = _occurrence(nodes[order])
    order = order[ranks.argsort(stable=True)]
    spans = []
    for start, count in _stretches(nodes[order]):
        index = order[start : start + count]
        spans.append(((int(nodes[index[0]]), count), index))
    yield from sorted(spans, key=lambda span: int(span[1].min()))


def _occurrence(ordered: Tensor) -> Tensor:
    """How many equal values stand before each one in a sorted list."""
    first = torch.searchsorted(ordered, ordered)
    return torch.arange(len(ordered)) - first


def _stretches(*lists: Tensor) -> list[tuple[int, int]]:
    """(start, count) of the longest stretches on which all lists go up by one from entry to entry."""
    size = len(lists[0])
    if not size:
        return []
    breaks = torch.zeros(size - 1, dtype=torch.bool)
    for nodes in lists:
        breaks |= nodes[1:] != nodes[:-1] + 1
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist(), size]
    return [(a, b - a) for a, b in itertools.pairwise(starts)]


def _largest(kernels: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The smallest kernel that holds all of them; a linear layer's (1,) fits everywhere."""
    dims = max(len(kernel) for kernel in kernels)
    full = [kernel if len(kernel) == dims else (1,) * dims for kernel in kernels]
    return tuple(max(sizes) for sizes in zip(*full, strict=True))


def _target(kernel: tuple[int, ...], largest: tuple[int, ...] | None) -> tuple[int, ...]:
    """The kernel that one is padded to; the positions of a flattened input are not a kernel and stay as they are."""
    return largest if largest and (len(kernel) == len(largest) or kernel == IDENTITY_KERNEL) else kernel


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
