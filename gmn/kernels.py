"""The kernels of `gmn.blockwise` made faster: in tiles of a cache's size, or fused by the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmn.blockwise import PLAIN, Ends, Kernels, Moments, Upstream

TILE = 2**16  # entries: a few buffers of that size fit into a core's cache, and a call is still worth its price

Vectors = TypeVar("Vectors", Ends, Upstream, Moments)


def kernels_for(device: torch.device, *, fused: bool) -> Kernels:
    """What works on the chunks of a graph on that device; `fused`: by the compiler."""
    if fused:
        return compiled()
    return TILED if device.type == "cpu" else PLAIN


@functools.cache
def compiled() -> Kernels:
    """The kernels fused, for chunks of any shape; the first call takes a minute and, on a CPU, a C++ compiler."""
    made: list[Any] = [torch.compile(kernel, dynamic=True) for kernel in PLAIN]
    return Kernels(*made)


def exact(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass outside of the caller's autocast: what it computes again must be what was, to the last bit."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return run


def _both(e: Tensor, ends: Ends) -> tuple[Moments, Moments]:
    size = _channels(e)
    along, against = zip(*map(PLAIN.both, e.split(size), _split(ends, size)), strict=True)
    return _joined(along), _joined(against)


def _advance(e: Tensor, ends: Ends) -> None:
    size = _channels(e)
    for part, own in zip(e.split(size), _split(ends, size), strict=True):
        PLAIN.advance(part, own)


def _backward(e: Tensor, grad: Tensor, ends: Ends, along: Upstream, against: Upstream, *, shared: bool) -> Ends:
    size = _channels(e)
    vectors = _split(ends, size), _split(along, size), _split(against, size)
    tiles = zip(e.split(size), grad.split(size), *vectors, strict=True)
    return _joined([PLAIN.backward(*tile, shared=shared) for tile in tiles])


TILED = Kernels(_both, _advance, _backward)


def _channels(e: Tensor) -> int:
    """Of a tile; channels are independent of each other."""
    return max(1, TILE // e[0].numel())


def _split(vectors: Vectors, size: int) -> Iterator[Vectors]:
    return (type(vectors)(*own) for own in zip(*(v.split(size) for v in vectors), strict=True))


def _joined(tiles: Sequence[Vectors]) -> Vectors:
    return tiles[0] if len(tiles) == 1 else type(tiles[0])(*map(torch.cat, zip(*tiles, strict=True)))
