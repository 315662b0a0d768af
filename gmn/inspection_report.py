"""What `gmn inspect` prints: the tree of modules, the coupled groups, and a summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from gmn.graph import GraphSpec, NetworkGraph, group_of
from gmn.groups import couplings
from gmn.inspection import coverage, tree

MOST_LINES = 20  # of a list, before the rest is only counted
PRUNABLE = "prunable"


def report(model: nn.Module, graph: NetworkGraph, *, groups: bool = True) -> Group:
    """Everything about a network and its graph, for a rich console.

    Args:
        model: The network.
        graph: Its graph.
        groups: Whether to show the table of coupled channels.
    """
    parts: list[RenderableType] = [tree(model, graph), ""]
    if groups:
        parts += [groups_table(graph.spec), ""]
    return Group(*parts, summary(model, graph.spec))


# -- coupled channels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    name: str
    channels: str
    layers: tuple[str, ...]
    pruning: str

    @property
    def pattern(self) -> tuple[object, ...]:
        """Equal for groups that differ in the numbers of their blocks only."""
        return starred(self.name), self.channels, tuple(map(starred, self.layers)), starred(self.pruning)


def groups_table(spec: GraphSpec) -> Table:
    """Channels that must be kept or removed together; groups that differ in a block's number only share a row."""
    table = Table(title="coupled channels", title_justify="left", highlight=False)
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("together with", overflow="fold")
    table.add_column("pruning", overflow="fold")
    rows = _rows(spec)
    counts = Counter(row.pattern for row in rows)
    first = {row.pattern: row for row in reversed(rows)}
    for pattern, count in counts.items():
        row, show = first[pattern], starred if count > 1 else str
        name = f"{count} x {starred(row.name)}" if count > 1 else row.name
        style = "green" if row.pruning == PRUNABLE else "yellow"
        table.add_row(name, row.channels, shortened(map(show, row.layers)), Text(show(row.pruning), style))
    return table


def _rows(spec: GraphSpec) -> list[_Row]:
    coupled = couplings(spec)
    group_of_node = coupled.group[coupled.channel]
    layer_of_node = torch.arange(len(spec.groups)).repeat_interleave(torch.tensor([g.size for g in spec.groups]))
    members: dict[int, list[str]] = {}
    for group, layer in torch.stack([group_of_node, layer_of_node]).unique(dim=1).T.tolist():
        members.setdefault(group, []).append(spec.groups[layer].name)
    headed = {int(group_of_node[start]) for (start, _), _ in spec.heads}
    channels = [
        f"{count:,} heads" if group in headed else f"{count:,}"
        for group, count in enumerate(torch.bincount(coupled.group).tolist())
    ]
    return [
        _Row(name, channels[g], tuple(m for m in members[g] if m != name), coupled.frozen.get(g, PRUNABLE))
        for g, name in enumerate(coupled.names)
    ]


def starred(name: str) -> str:
    """A name without the numbers of its blocks.

    >>> starred("layer1.0.conv2 [64, 3]"), starred("blocks.11"), starred("0.weight")
    ('layer1.*.conv2 [64, 3]', 'blocks.*', '*.weight')
    """
    return re.sub(r"(?<=\.)\d+\b|\b\d+(?=\.\w)", "*", name)


def shortened(names: Iterable[str], most: int = 2) -> str:
    """The first of the names, and how many more there are.

    >>> shortened("abcde")
    'a, b, 3 more'
    """
    different = list(dict.fromkeys(names))
    more = len(different) - most
    return ", ".join([*different[:most], *([f"{more:,} more"] if more > 0 else [])])


# -- the summary -------------------------------------------------------------------------------------------------------


def summary(model: nn.Module, spec: GraphSpec) -> Text:
    """Nodes, edges, and which parameters are in the graph, a line each."""
    covered = coverage(model, spec)
    lines = [
        f"nodes: {spec.num_nodes:,} in {len(spec.groups):,} layers",
        f"edges: {spec.num_edges:,} in {len(spec.blocks):,} blocks",
        f"parameters: {covered.total:,}, in the graph {covered.in_graph:,} ({percent(covered.share)})",
        f"of convolutions, linear layers, norms and attention: {covered.layers:,}, "
        f"in the graph {covered.layers_in_graph:,} ({percent(covered.layer_share)})",
        *_listed("attention", _heads(spec)),
        *_listed("tied", _ties(spec)),
        *_listed("carried, of these layers", (_entry(name, spec) for name in covered.missing)),
        *_listed("carried, others", (_entry(name, spec) for name in spec.carried if name not in covered.missing)),
        *([f"carried buffers: {len(spec.buffers):,}"] if spec.buffers else []),
    ]
    return Text("\n".join(lines))


def percent(share: float) -> str:
    """Per cent, rounded down: all but one parameter is not all.

    >>> percent(1.0), percent(0.99999)
    ('100%', '99.9%')
    """
    return "100%" if share == 1 else f"{int(1000 * share) / 10:.1f}%"


def _entry(name: str, spec: GraphSpec) -> str:
    return f"{name} {list(spec.carried[name])}"


def _heads(spec: GraphSpec) -> Iterable[str]:
    for (start, size), heads in spec.heads:
        yield f"{group_of(spec, start).name}: {heads} heads of {size // heads} channels"


def _ties(spec: GraphSpec) -> Iterable[str]:
    for (one, size), (other, _) in spec.ties:
        yield f"{group_of(spec, one).name} and {group_of(spec, other).name}: {size} channels"


def _listed(title: str, entries: Iterable[str]) -> list[str]:
    """Entries, those that differ in a block's number only in one line."""
    entries = list(entries)
    counts = Counter(starred(entry) for entry in entries)
    lines = [
        entry if counts[starred(entry)] == 1 else f"{counts[starred(entry)]} x {starred(entry)}" for entry in entries
    ]
    lines = list(dict.fromkeys(lines))
    more = [f"  {len(lines) - MOST_LINES:,} more lines like these"] if len(lines) > MOST_LINES else []
    return [f"{title}:", *(f"  {line}" for line in lines[:MOST_LINES]), *more] if lines else []
