"""Collects what the rules say about a network: nodes, edges, addresses; `gmn.assemble` makes the graph of it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from gmn.address import Shape4
from gmn.errors import ConversionError
from gmn.flow import Flow

# layers whose sizes surgery knows; a layer with a rule of its own is converted, but stays whole
CUTTABLE = (_ConvNd, nn.Linear, nn.Embedding, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
IDENTITY_KERNEL: tuple[int, ...] = (1,)
ROLES = ("q", "k", "v")


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
        norms: where a norm's parameters go: `layer` (the layer that it alone reads; else nodes of its own) or
            `stream` (the nodes it reads, whoever else reads them: pre-norm transformers).
    """

    columns: tuple[str, ...]
    defaults: tuple[float, ...]
    kernels: Literal["per-size", "padded"] = "per-size"
    identities: Literal["diagonal", "dense"] = "diagonal"
    bias_column: str = "bias"
    norms: Literal["layer", "stream"] = "layer"


@dataclass
class Group:
    """Nodes that one module makes, while the graph grows; `slots`: column -> parameter or buffer."""

    name: str
    start: int
    size: int
    kind: str
    depth: int
    slots: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Edges:
    """Edges of one call of a layer, or of one identity: from channels `src` [G * I] to channels `dst` [G * O]."""

    name: str
    src: Tensor
    dst: Tensor
    pieces: int
    kernel: tuple[int, ...]
    param: str | None = None  # None: an identity
    shape: Shape4 = (0, 0, 0, 0)
    perm: Shape4 = (0, 1, 2, 3)
    dense: bool = False  # of an identity
    rows: Tensor | None = None  # output channels of the weight that `dst` stands for; None: all


@dataclass(frozen=True)
class Attention:
    """Query, key and value channels, in the order of the value channels: one node each in the graph."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    heads: int


class InputAxis(Exception):
    """A layer reads inputs along another axis than was assumed; `numbers` are the inputs."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(f"inputs {numbers}")
        self.numbers = numbers


class Builder:
    """Collects nodes, edges and addresses.

    Args:
        model: The network that is converted; parameters are looked up by name.
        layout: Which features nodes and edges have.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.params: dict[str, Tensor] = dict(model.named_parameters())
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        self._names = {id(t): name for name, t in [*self.buffers.items(), *self.params.items()]}
        self.groups: list[Group] = []
        self.edges: list[Edges] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.regrouped: list[tuple[Tensor, str]] = []
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.followers: list[tuple[str, int, Tensor]] = []
        self.vectors: dict[str, Group] = {}  # the nodes that a per-channel parameter lies on first
        self.merged: list[tuple[Tensor, Tensor]] = []
        self.attention: list[Attention] = []
        self.open_inputs: dict[int, int] = {}  # first node -> input whose channel axis is still a guess
        self.shared: set[str] = set()  # modules whose parameters are read by more than one call
        self._homes: dict[tuple[str, str, int], Group] = {}
        self._uses: dict[str, Edges] = {}  # first use of each weight
        self.num_nodes = 0  # so far; some may turn out to be one

    # -- nodes ---------------------------------------------------------------------------------------------------

    def add_nodes(self, name: str, size: int, kind: str, sources: Tensor | None = None) -> Group:
        """A new group of nodes, one step deeper than its sources."""
        depth = 0 if sources is None else 1 + max((g.depth for g in self.groups_of(sources)), default=0)
        group = Group(name, self.num_nodes, size, kind, depth)
        self.num_nodes += size
        self.groups.append(group)
        return group

    def layer_nodes(self, param: str, name: str, size: int, kind: str, sources: Tensor | None) -> Group:
        """The nodes of a weight: new ones, or those it made before, when its layer is called again."""
        made = self._homes.get((param, name, size))
        if made is None:
            made = self._homes[param, name, size] = self.add_nodes(name, size, kind, sources)
        return made

    def ids(self, group: Group) -> Tensor:
        """Node numbers of a group."""
        return torch.arange(group.start, group.start + group.size, dtype=torch.int32)

    def name_of(self, tensor: Tensor | None) -> str | None:
        """Qualified name of a parameter or buffer; a tied one has the name of its first place. None for others."""
        return None if tensor is None else self._names.get(id(tensor))

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name."""
        return self.params[name] if name in self.params else self.buffers[name]

    def whole_group(self, channels: Tensor) -> Group | None:
        """The group whose nodes are exactly these channels in order, if there is one."""
        group = self._group_at(int(channels[0])) if len(channels) and channels[0] >= 0 else None
        return group if group and torch.equal(channels, self.ids(group)) else None

    def group_of(self, channels: Tensor) -> Group:
        """The group of the first channel."""
        return self._group_at(int(channels[0]))

    def _group_at(self, node: int) -> Group:
        return self.groups[bisect_right(self.groups, node, key=lambda group: group.start) - 1]

    def groups_of(self, nodes: Tensor) -> list[Group]:
        """The groups that nodes belong to."""
        starts = torch.tensor([group.start for group in self.groups])
        found = torch.searchsorted(starts, nodes[nodes >= 0].long().unique(), right=True) - 1
        return [self.groups[index] for index in found.unique().tolist()]

    def read(self, flow: Flow, axis: int, name: str) -> tuple[Tensor, bool]:
        """Nodes that a weight layer reads along an axis, and whether it mixes positions instead of channels.

        What carries no node (positions, attention maps, zeros) gets nodes of its own, which must stay.
        """
        channels = flow.aligned(axis)
        if channels is not None and bool((channels >= 0).any()):
            missing = channels < 0
            if bool(missing.any()):
                channels = channels.clone()
                channels[missing] = self._stand_in(f"{name}.padding", int(missing.sum()), "a padded channel")
            return channels, False
        if channels is None:
            self.misread(flow)
        size = flow.ids.shape[axis]
        mixes = bool((flow.ids == flow.ids.narrow(axis, 0, 1)).all()) and channels is None
        if not mixes:
            self.freeze(flow.nodes, f"regrouped before {name}")
        return self._stand_in(f"{name}.{'positions' if mixes else 'input'}", size, "not a channel"), mixes

    def misread(self, flow: Flow) -> None:
        """Raise InputAxis if these channels are those of inputs whose channel axis was only a guess."""
        nodes, seen = flow.nodes, -1
        while len(nodes) > seen:  # through sums and concatenations of inputs
            seen = len(nodes)
            sources = [e.src for e in self.edges if e.param is None and bool(torch.isin(e.dst, nodes).any())]
            nodes = torch.cat([nodes, *sources]).unique()
        numbers = [number for start, number in self.open_inputs.items() if bool((nodes == start).any())]
        if numbers:
            raise InputAxis(numbers)

    def _stand_in(self, name: str, size: int, reason: str) -> Tensor:
        nodes = self.ids(self.add_nodes(name, size, "position"))
        self.freeze(nodes, f"{reason}: {name}")
        return nodes

    # -- what must stay, what goes together ----------------------------------------------------------------------

    def freeze(self, nodes: Tensor, reason: str) -> None:
        """Forbid the removal of these nodes."""
        self.frozen.append((nodes[nodes >= 0].unique(), reason))

    def regroup(self, nodes: Tensor, reason: str) -> None:
        """Forbid the removal of single nodes; if they turn out to be attention heads, whole heads can go."""
        self.regrouped.append((nodes[nodes >= 0].unique(), reason))

    def tie(self, first: Tensor, second: Tensor) -> None:
        """The k-th nodes of both go together, although no edge says so."""
        self.ties.append((first, second))

    def follow(self, name: str, axis: int, channels: Tensor) -> None:
        """A carried tensor has one entry per channel along an axis, such as a position embedding."""
        for other, other_axis, nodes in self.followers:
            if (other, other_axis) == (name, axis):
                self.tie(nodes, channels)
        self.followers.append((name, axis, channels))

    def freeze_uncuttable(self, param: str, nodes: Tensor) -> None:
        """Forbid the removal of nodes whose layer has sizes that surgery does not know of."""
        owner = param.rpartition(".")[0]
        layer = self.model.get_submodule(owner)
        if not isinstance(layer, CUTTABLE):
            self.freeze(nodes, f"no surgery for {type(layer).__name__} {owner}".rstrip())

    # -- node features -------------------------------------------------------------------------------------------

    def attach(self, group: Group, values: dict[str, str], *, own: bool = True) -> bool:
        """Put per-channel numbers (column name -> parameter name) on a group's nodes, if their columns are free.

        Numbers that are there already (a layer that is called again) are not put twice. `own`: they belong to a
        layer of a known type; a parameter that some module just multiplies with has no size beside it.
        """
        places = {self._place(group, values, column): param.lstrip(".") for column, param in values.items()}
        if places.items() <= group.slots.items():
            return True
        if not places.keys() <= set(self.layout.columns) or places.keys() & group.slots.keys():
            return False
        group.slots |= places
        for param in places.values():
            first = self.vectors.setdefault(param, group)
            if first is not group:
                self.tie(self.ids(first), self.ids(group))
        if own:
            for param in places.values():
                self.freeze_uncuttable(param, self.ids(group))
        return True

    def attach_or_fail(self, group: Group, values: dict[str, str]) -> None:
        """Like `attach`; raises if the layout has no such column. Second numbers for a column are carried through."""
        if not self.attach(group, values):
            if set(values) <= set(self.layout.columns):  # taken: a weight that is used with several biases
                self.freeze(self.ids(group), f"{group.name} has two of {', '.join(values)}")
                return
            raise ConversionError(
                "the layout has no free node feature",
                expected=f"columns for {', '.join(values)}",
                got=", ".join(self.layout.columns),
                where=group.name,
                hint="use layout='generic'",
            )

    def _place(self, group: Group, values: dict[str, str], column: str) -> str:
        bare = column == "bias" and "norm.weight" not in {*group.slots, *values}
        return self.layout.bias_column if bare and "bias" not in self.layout.columns else column

    # -- edges ---------------------------------------------------------------------------------------------------

    def add_weight(
        self,
        param: str,
        src: Tensor,
        dst: Group | Tensor,
        *,
        shape: Shape4,
        kernel: tuple[int, ...],
        perm: Shape4 = (0, 1, 2, 3),
        rows: Tensor | None = None,
    ) -> None:
        """Edges from the channels `src` to a group (or to nodes); `shape` and `perm` make the weight [G, O, I, K].

        `rows`: the output channels of the weight that the nodes stand for, if not all of them.
        """
        param = param.lstrip(".")  # the network is one layer: its name is empty
        nodes = self.ids(dst) if isinstance(dst, Group) else dst
        self.freeze_uncuttable(param, torch.cat([src, nodes]))
        edges = Edges(param, src, nodes, shape[perm[0]], kernel, param, shape, perm, rows=rows)
        self.edges.append(edges)
        first = self._uses.setdefault(param, edges)
        if first is not edges and rows is None:
            self._same_weight(first, edges)

    def _same_weight(self, first: Edges, again: Edges) -> None:
        """A weight that is used twice is cut once: its rows and columns mean the same channels in both uses."""
        if (first.shape, first.perm) == (again.shape, again.perm):
            self.tie(first.src, again.src)
            self.tie(first.dst, again.dst)
            return
        for nodes in (first.src, first.dst, again.src, again.dst):
            self.freeze(nodes, f"{first.param} is used in two ways")

    def join(self, name: str, channels: Tensor) -> Group:
        """New nodes for channels that come from several places, each joined to its source by an identity."""
        group = self.add_nodes(name, len(channels), "merge", channels)
        self.add_identity(name, channels, self.ids(group), dense=False)
        return group

    def add_identity(self, name: str, src: Tensor, dst: Tensor, *, dense: bool) -> None:
        """Residual edges of value 1 from node k of `src` to node k of `dst`; padded channels have none."""
        dense = dense and self.whole_group(src[src >= 0]) is not None
        keep = slice(None) if dense else src >= 0
        self.edges.append(
            Edges(name, src[keep], dst[keep], 1 if dense else len(src[keep]), IDENTITY_KERNEL, dense=dense)
        )

    def absorb(self, branch: Group, main: Group) -> bool:
        """Make the layer at the end of a residual branch end in the nodes of the main path (a downsample convolution).

        Its norm takes the `shortcut.` columns. Returns False, and changes nothing, if they are not free.
        """
        if any(bool(torch.isin(self.ids(branch), nodes).any()) for nodes, _ in self.frozen):
            return False
        if not self.attach(main, {f"shortcut.{column}": param for column, param in branch.slots.items()}):
            return False
        self.vectors |= dict.fromkeys(branch.slots.values(), main)
        branch.slots.clear()
        self.merged.append((self.ids(branch), self.ids(main)))
        return True
