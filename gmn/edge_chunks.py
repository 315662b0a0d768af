"""Edge blocks cut into chunks that fit a cache: which edges lie in one chunk, and which nodes are at their ends."""

from __future__ import annotations

import functools
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
    """Parts of one shape, [g, o, I] edges altogether, and the nodes at their ends; no node has two parts in it."""

    parts: tuple[Part, ...]
    shape: tuple[int, int, int]
    dst: slice | Tensor
    src: slice | Tensor

    @property
    def block(self) -> int:
        """One of its blocks; all have the same encoder and decoder."""
        return self.parts[0].block


def chunks(blocks: Sequence[EdgeBlock], hidden: int, elements: float) -> Iterator[tuple[Part, tuple[int, int, int]]]:
    """Cut blocks into parts [g, o, I] of at most so many numbers, or of one row."""
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


@functools.lru_cache(maxsize=64)  # a metanetwork meets the same graphs again and again
def grouped(
    blocks: tuple[EdgeBlock, ...], alike: tuple[Hashable, ...], hidden: int, elements: float, device: torch.device
) -> tuple[Chunk, ...]:
    """Chunks of at most so many numbers: parts of one shape lie in one, unless they share nodes.

    Args:
        alike: Of each block, what blocks of one chunk must have in common.
    """
    waiting: dict[Any, list[list[tuple[Part, Range, Range]]]] = {}
    chosen: list[tuple[tuple[int, int, int], list[tuple[Part, Range, Range]]]] = []
    for part, shape in chunks(blocks, hidden, elements):
        dst, src = _nodes(blocks[part.block], part, shape)
        groups = waiting.setdefault((shape, alike[part.block]), [])
        most = max(1, int(elements // (_width(blocks[part.block], hidden) * math.prod(shape))))
        fits = (own for own in groups if len(own) < most and not any(_meet(dst, d) or _meet(src, s) for _, d, s in own))
        group = next(fits, None)
        if group is None:
            group = []
            groups.append(group)
            chosen.append((shape, group))
        group.append((part, dst, src))
    return tuple(_chunk(shape, group, device) for shape, group in chosen)


def _width(block: EdgeBlock, hidden: int) -> int:
    """Numbers that an edge has at most: a patch embedding has more features than states have channels."""
    return max(hidden, block.shape[3])


def _nodes(block: EdgeBlock, part: Part, shape: tuple[int, int, int]) -> tuple[Range, Range]:
    _, out, into, _ = block.shape
    g, rows, _ = shape
    dst = block.dst[0] + part.pieces.start * out + part.rows.start
    return (dst, dst + g * rows), (block.src[0] + part.pieces.start * into, block.src[0] + part.pieces.stop * into)


def _meet(a: Range, b: Range) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _chunk(shape: tuple[int, int, int], group: list[tuple[Part, Range, Range]], device: torch.device) -> Chunk:
    parts, dst, src = zip(*group, strict=True)
    total = (shape[0] * len(parts), *shape[1:])
    if len(parts) == 1:
        return Chunk(parts, total, slice(*dst[0]), slice(*src[0]))
    index = [torch.cat([torch.arange(*ends) for ends in side]).to(device) for side in (dst, src)]
    return Chunk(parts, total, *index)


def columns_of(tensors: Sequence[Tensor] | Mapping[int, Tensor], chunk: Chunk) -> Tensor:
    """[K, edges] of a chunk, from [G, O, I, K] of each block."""
    own = [tensors[part.block][part.pieces, part.rows] for part in chunk.parts]
    together = own[0] if len(own) == 1 else torch.cat(own)
    return together.reshape(-1, together.shape[-1]).T


def taken(x: Tensor, axis: int, nodes: slice | Tensor) -> Tensor:
    """Some nodes of an axis; index_select takes a sixth of the time of an index in brackets."""
    if isinstance(nodes, Tensor):
        return x.index_select(axis, nodes)
    return x.narrow(axis, nodes.start, nodes.stop - nodes.start)


def placed(total: Tensor, nodes: slice | Tensor, value: Tensor) -> None:
    """[H, N]: write to some nodes."""
    if isinstance(nodes, Tensor):
        total.index_copy_(1, nodes, value)
    else:
        total[:, nodes] = value


def added(total: Tensor, nodes: slice | Tensor, value: Tensor) -> None:
    """[H, N]: add to some nodes, none of which is there twice."""
    if isinstance(nodes, Tensor):
        total.index_add_(1, nodes, value)
    else:
        total[:, nodes] += value
