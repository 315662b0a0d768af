"""Node vectors as the chunks of a graph read them.

A chunk [b, O, I] (b = H hidden x g pieces) reads vectors of its targets as [b, O, 1] and of its sources as [b, 1, I].
One side of a section, which is many chunks, is one index into node vectors [H, N]: they are gathered for all its chunks
at once, and what all have to say of nodes is added up at once. Chunk by chunk that takes longer than the arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gmn.address import Range
from gmn.blockwise import Ends, Moments, Upstream
from gmn.edge_chunks import Chunk, grouped
from gmn.graph import EdgeBlock

SECTION = 2**17  # numbers of node vectors that both sides of a section read: those of a pass stay in a cache


class Nodes(NamedTuple):
    """What a layer knows of all nodes: B, B' [H, N] and (c, d) [H, 2, N]."""

    sent: Tensor
    against: Tensor
    pairs: Tensor


@dataclass(frozen=True, eq=False)
class Side:
    """The targets, or the sources, of some chunks.

    Attributes:
        index: Of each number that the chunks read, one after the other, the place in [H, N].
        pairs: The same in [H, 2, N]; sources read the second of the two first.
        shapes: Of a vector in each chunk.
        sizes: Of each shape.
    """

    index: Tensor
    pairs: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, ...]

    def to(self, device: torch.device) -> Side:
        """The same on a device."""
        return Side(self.index.to(device), self.pairs.to(device), self.shapes, self.sizes)

    def spread(self, vector: Tensor) -> list[Tensor]:
        """[b, O, 1] or [b, 1, I] of each chunk, from [H, N]."""
        parts = self.gathered(vector).split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def spread_pairs(self, vectors: Tensor) -> list[Tensor]:
        """[b, 2, n] of each chunk, from [H, 2, N]."""
        parts = vectors.reshape(-1).index_select(0, self.pairs).split([2 * size for size in self.sizes])
        return [part.view(shape[0], 2, -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def gathered(self, vector: Tensor) -> Tensor:
        """What the chunks read of [H, N], in a row."""
        return vector.reshape(-1).index_select(0, self.index)

    def add(self, total: Tensor, own: Sequence[Tensor]) -> None:
        """Add what each chunk has, one number for each that it reads, to [H, N]."""
        total.view(-1).index_add_(0, self.index, in_a_row(own))

    def add_of(self, position: int, total: Tensor, own: Tensor) -> None:
        """The same of one chunk."""
        total.view(-1).index_add_(0, self.index.split(self.sizes)[position], own.reshape(-1))

    def add_pairs(self, total: Tensor, own: Sequence[Tensor]) -> None:
        """Add [b, 2, n] of each chunk to [H, 2, N]."""
        total.view(-1).index_add_(0, self.pairs, in_a_row(own))

    def extend(self, high: Tensor, low: Tensor, highs: Tensor, lows: Tensor) -> None:
        """Maxima and minima of [H, N] and of numbers in a row, in place."""
        index = self.index.long()
        high.view(-1).scatter_reduce_(0, index, highs, "amax")
        low.view(-1).scatter_reduce_(0, index, lows, "amin")


class Collected:
    """Moments [H, N] of all messages that nodes get, from those that get to each chunk's.

    Args:
        like: [H, N].
        degree: [N], messages that a node gets.
        keeps: Whether somebody will ask which chunks have extremes in common.
    """

    def __init__(self, like: Tensor, degree: Tensor, *, keeps: bool) -> None:
        self.degree, self.keeps = degree, keeps
        self.of_all = Moments(*(torch.full_like(like, value) for value in (0, 0, -torch.inf, torch.inf)))
        self.rows: list[tuple[int, Side, tuple[Tensor, ...]]] = []

    def add(self, first: int, side: Side, own: Sequence[Moments]) -> None:
        """Those of the chunks of a section, the first of which has that number."""
        totals, squares, *extremes = zip(*own, strict=True)
        side.add(self.of_all.total, totals)
        side.add(self.of_all.squares, squares)
        rows = tuple(in_a_row(each) for each in extremes)
        side.extend(self.of_all.high, self.of_all.low, *rows)
        if self.keeps:
            self.rows.append((first, side, rows))

    def finished(self) -> Moments:
        """With zeros for nodes without messages."""
        for extreme in self.of_all[2:]:
            extreme.masked_fill_(self.degree == 0, 0.0)
        return self.of_all

    def crossed(self) -> set[int]:
        """The chunks in which a node finds an extreme that it finds in others too, or twice among their parts.

        Equal weights have it so, and in large graphs chance: more extremes are found than there are nodes to find one.
        """
        found: set[int] = set()
        reached = len(self.of_all.high) * (self.degree > 0).sum()
        for which, extreme in enumerate(self.of_all[2:]):
            hits = [side.gathered(extreme) == rows[which] for _, side, rows in self.rows]
            if torch.stack([hit.sum() for hit in hits]).sum() > reached:
                found |= self._several(extreme, hits)
        return found

    def _several(self, extreme: Tensor, hits: Sequence[Tensor]) -> set[int]:
        counts = torch.zeros_like(extreme)
        for (_, side, _), hit in zip(self.rows, hits, strict=True):
            side.add(counts, [hit.to(counts.dtype)])
        numbers, flags = list[int](), list[Tensor]()
        for (first, side, _), hit in zip(self.rows, hits, strict=True):
            parts = (hit & (side.gathered(counts) > 1)).split(side.sizes)
            numbers += range(first, first + len(parts))
            flags += [part.any() for part in parts]
        return {number for number, flag in zip(numbers, torch.stack(flags).tolist(), strict=True) if flag}


def in_a_row(values: Sequence[Tensor]) -> Tensor:
    """What each chunk says, one after the other."""
    return torch.cat([value.reshape(-1) for value in values])


@dataclass(frozen=True, eq=False)
class Section:
    """Consecutive chunks, the number of the first one, and their ends."""

    first: int
    chunks: tuple[Chunk, ...]
    targets: Side
    sources: Side

    @property
    def numbers(self) -> range:
        """Of its chunks, among those of all sections."""
        return range(self.first, self.first + len(self.chunks))

    def upstream(self, along: Upstream, against: Upstream) -> list[tuple[Upstream, Upstream]]:
        """Of each chunk at its targets and at its sources, from those of all nodes."""
        at_dst = zip(*(self.targets.spread(v) for v in along), strict=True)
        at_src = zip(*(self.sources.spread(v) for v in against), strict=True)
        return [(Upstream(*dst), Upstream(*src)) for dst, src in zip(at_dst, at_src, strict=True)]

    def ends(self, nodes: Nodes) -> list[Ends]:
        """Of each chunk, from those of all nodes."""
        vectors = self.sources.spread(nodes.sent), self.targets.spread(nodes.against)
        return [Ends(*own) for own in zip(*vectors, *self.pairs(nodes), strict=True)]

    def pairs(self, nodes: Nodes) -> tuple[list[Tensor], list[Tensor]]:
        """The same, without what nodes send: `dst` and `src` of each chunk."""
        return self.targets.spread_pairs(nodes.pairs), self.sources.spread_pairs(nodes.pairs)

    def add_ends(self, total: Nodes, own: Sequence[Ends]) -> None:
        """Add what each chunk has for its ends to that of all nodes."""
        sent, against, dst, src = zip(*own, strict=True)
        self.sources.add(total.sent, sent)
        self.targets.add(total.against, against)
        self.targets.add_pairs(total.pairs, dst)
        self.sources.add_pairs(total.pairs, src)


@functools.lru_cache(maxsize=4)  # the same graphs again and again; an index may have a fifth of the states' size
def sections(
    blocks: tuple[EdgeBlock, ...],
    alike: tuple[Hashable, ...],
    hidden: int,
    nodes: int,
    elements: float,
    device: torch.device,
) -> tuple[Section, ...]:
    """All edges of a graph of so many nodes, in chunks of at most so many numbers.

    Args:
        alike: Of each block, what blocks of one chunk must have in common.
    """
    made: list[Section] = []
    waiting: list[Chunk] = []
    size, first = 0, 0
    for chunk in grouped(blocks, alike, hidden, elements):
        g, rows, into = chunk.shape
        own = hidden * g * (rows + into)
        if waiting and size + own > SECTION:
            made.append(_section(first, waiting, hidden, nodes, device))
            waiting, size, first = [], 0, first + len(waiting)
        waiting.append(chunk)
        size += own
    return (*made, _section(first, waiting, hidden, nodes, device))


def _section(first: int, own: Sequence[Chunk], hidden: int, nodes: int, device: torch.device) -> Section:
    sizes = [(hidden * c.shape[0], *c.shape[1:]) for c in own]
    targets = _side([c.targets for c in own], [(b, o, 1) for b, o, _ in sizes], (0, 1), nodes)
    sources = _side([c.sources for c in own], [(b, 1, i) for b, _, i in sizes], (1, 0), nodes)
    return Section(first, tuple(own), targets.to(device), sources.to(device))


def _side(
    ranges: Sequence[Sequence[Range]], shapes: list[tuple[int, int, int]], order: tuple[int, int], nodes: int
) -> Side:
    index, pairs = [], []
    for own, shape in zip(ranges, shapes, strict=True):
        at = torch.cat([torch.arange(start, start + count) for start, count in own])
        size = math.prod(shape)
        h = torch.arange(size // len(at))[:, None, None, None]
        index.append(h * nodes + at)
        pairs.append((2 * h + torch.tensor(order)[:, None]) * nodes + at.view(-1, 1, size // shape[0]))
    kind = torch.int32 if max(int(own.max()) for own in pairs) < 2**31 else torch.int64
    sizes = tuple(math.prod(shape) for shape in shapes)
    return Side(in_a_row(index).to(kind), in_a_row(pairs).to(kind), tuple(shapes), sizes)
