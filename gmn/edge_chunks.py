"""Edge blocks cut into chunks that fit a cache: which edges lie in one chunk, and which nodes are at their ends."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmn.address import Range
from gmn.graph import EdgeBlock


@dataclass(frozen=True)
class Part:
    """Some pieces of a block, and some of their targets."""

    block: int
    pieces: slice
    rows: slice


@dataclass(frozen=True)
class Chunk:
    """Parts of one shape, [g, o, I] edges altogether, and of each the range of targets and of sources."""

    parts: tuple[Part, ...]
    shape: tuple[int, int, int]
    targets: tuple[Range, ...]
    sources: tuple[Range, ...]

    @property
    def block(self) -> int:
        """One of its blocks; all have the same encoder and decoder."""
        return self.parts[0].block


def grouped(blocks: Sequence[EdgeBlock], alike: Sequence[Hashable], hidden: int, elements: float) -> list[Chunk]:
    """Chunks of at most so many numbers: parts of one shape and of alike blocks lie in one."""
    waiting: dict[Any, list[Part]] = {}
    chosen: list[tuple[tuple[int, int, int], list[Part]]] = []
    for part, shape in _parts(blocks, hidden, elements):
        most = max(1, int(elements // (_width(blocks[part.block], hidden) * math.prod(shape))))
        group = waiting.get((shape, alike[part.block]))
        if group is None or len(group) == most:
            group = waiting[shape, alike[part.block]] = []
            chosen.append((shape, group))
        group.append(part)
    return [_chunk(blocks, shape, group) for shape, group in chosen]


def _parts(blocks: Sequence[EdgeBlock], hidden: int, elements: float) -> Iterator[tuple[Part, tuple[int, int, int]]]:
    """Blocks cut into parts [g, o, I] of at most so many numbers, or of one row."""
    for index, block in enumerate(blocks):
        pieces, out, into, _ = block.shape
        width = _width(block, hidden)
        step_p = max(1, int(elements // (width * out * into)))
        step_o = out if step_p > 1 else max(1, int(elements // (width * into)))
        for p in range(0, pieces, step_p):
            g = min(step_p, pieces - p)
            for o in range(0, out, step_o):
                rows = min(step_o, out - o)
                yield Part(index, slice(p, p + g), slice(o, o + rows)), (g, rows, into)


def _width(block: EdgeBlock, hidden: int) -> int:
    """Numbers that an edge has at most: a patch embedding has more features than states have channels."""
    return max(hidden, block.shape[3])


def _chunk(blocks: Sequence[EdgeBlock], shape: tuple[int, int, int], parts: Sequence[Part]) -> Chunk:
    g, rows, into = shape
    targets, sources = [], []
    for part in parts:
        block = blocks[part.block]
        targets.append((block.dst[0] + part.pieces.start * block.shape[1] + part.rows.start, g * rows))
        sources.append((block.src[0] + part.pieces.start * into, g * into))
    return Chunk(tuple(parts), (g * len(parts), rows, into), tuple(targets), tuple(sources))


def columns_of(tensors: Sequence[Tensor] | Mapping[int, Tensor], chunk: Chunk) -> Tensor:
    """[K, edges] of a chunk, from [G, O, I, K] of each block."""
    own = [tensors[part.block][part.pieces, part.rows] for part in chunk.parts]
    together = own[0] if len(own) == 1 else torch.cat(own)
    return together.reshape(-1, together.shape[-1]).T
