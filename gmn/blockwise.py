"""The arithmetic of message passing on one chunk of an edge block, forward and backward, without an edge list.

Channels come first, so that every sum over a block's rows or columns is one pass over contiguous memory:
e [b, O, I] holds the states of a chunk's edges, b = H hidden x G pieces, O targets, I sources. A vector of the targets
is [b, O, 1], one of the sources [b, 1, I]; i counts targets, j sources.

    along    m_ij  = B_j e_ij        reduced over j        against  m'_ij = B'_i e_ij      reduced over i
    advance  e_ij <- e_ij (1 + c_i d_j + d_i c_j)

Gradients, with G the gradient of what the layer makes of e, and g of the moments of m (of m' likewise):

    ds = G e         dc_i = sum_j ds d_j,  dd_i = sum_j ds c_j,  dd_j = sum_i ds c_i,  dc_j = sum_i ds d_i
    de = G (1 + c_i d_j + d_i c_j) + dm B_j + dm' B'_i
    dm = g_total_i + 2 m g_squares_i + [m is the maximum] g_high_i / ties + [m is the minimum] g_low_i / ties

Messages that tie for an extreme share its gradient evenly, as in PyTorch Geometric without torch-scatter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALL = 256  # entries of a matrix below which a broadcast product beats a batched one


class Moments(NamedTuple):
    """Of the messages that nodes get, before the receiver's factor."""

    total: Tensor
    squares: Tensor
    high: Tensor
    low: Tensor


class Upstream(NamedTuple):
    """Gradients of moments, and the extremes."""

    total: Tensor
    twice_squares: Tensor
    high: Tensor
    low: Tensor
    highest: Tensor
    lowest: Tensor


class Ends(NamedTuple):
    """What a layer knows of a chunk's nodes: B_j, B'_i, and (c, d) of the targets and (d, c) of the sources."""

    sent: Tensor  # [b, 1, I]
    against: Tensor  # [b, O, 1]
    dst: Tensor  # [b, 2, O]
    src: Tensor  # [b, 2, I]


def _broadcast(entries: int) -> bool:
    return torch.compiler.is_compiling() or entries < SMALL


def _equal(x: Tensor, y: Tensor, scratch: Tensor) -> Tensor:
    """1 where equal, else 0, in the type of x: twenty times as fast as a comparison that makes booleans."""
    return (x == y).to(x.dtype) if torch.compiler.is_compiling() else torch.eq(x, y, out=scratch)


def product(t: Tensor, s: Tensor) -> Tensor:
    """[b, O, I]: t_0 s_0 + t_1 s_1, of t [b, 2, O] and s [b, 2, I]."""
    t = t.transpose(1, 2)
    if _broadcast(t.shape[1] * s.shape[2]):
        return (t[:, :, :1] * s[:, :1]).addcmul_(t[:, :, 1:], s[:, 1:])
    return torch.bmm(t, s)


def over_targets(x: Tensor, v: Tensor) -> Tensor:
    """[b, 2, I]: sum_i v_ki x_ij, of x [b, O, I] and v [b, 2, O]."""
    if _broadcast(x.shape[1] * x.shape[2]):
        return (v[:, :, :, None] * x[:, None]).sum(2)
    return torch.bmm(v, x)


def over_sources(x: Tensor, v: Tensor) -> Tensor:
    """[b, 2, O]: sum_j v_kj x_ij, of v [b, 2, I]."""
    return over_targets(x.transpose(1, 2), v)


def advance(e: Tensor, dst: Tensor, src: Tensor) -> None:
    """The edges' step, in place: e (1 + c_i d_j + d_i c_j)."""
    e.addcmul_(e, product(dst, src))


def moments(e: Tensor, sent: Tensor, axis: int) -> Moments:
    """Moments of sent * e over an axis, 2: over sources, 1: over targets."""
    m = e * sent
    total, high, low = m.sum(axis), m.amax(axis), m.amin(axis)
    return Moments(total, m.mul_(m).sum(axis), high, low)


def both(e: Tensor, ends: Ends) -> tuple[Moments, Moments]:
    """Moments along the edges, at their targets, and against them, at their sources."""
    return moments(e, ends.sent, 2), moments(e, ends.against, 1)


def ties(e: Tensor, sent: Tensor, extreme: Tensor, axis: int) -> Tensor:
    """How many of a node's messages are the extreme."""
    return ((e * sent) == extreme).sum(axis).to(e.dtype)


def backward(e: Tensor, grad: Tensor, ends: Ends, along: Upstream, against: Upstream, *, shared: bool) -> Ends:
    """Gradients of the vectors of a chunk's nodes; `grad` [b, O, I], of the layer's e, becomes that of e before it.

    Args:
        e: The states before the layer.
        along, against: What comes back to the moments at the targets and at the sources.
        shared: Gradients of extremes are divided by their ties already; else those of a node lie in one row or column.
    """
    ds = grad * e
    dst = over_sources(ds, ends.src)
    src = over_targets(ds, ends.dst)
    advance(grad, ends.dst, ends.src)
    sent = _received(e, grad, ends.sent, along, 2, ds, shared)
    back = _received(e, grad, ends.against, against, 1, ds, shared)
    return Ends(sent, back, dst, src)


def _received(
    e: Tensor, grad: Tensor, factor: Tensor, upstream: Upstream, axis: int, scratch: Tensor, shared: bool
) -> Tensor:
    """The part of the messages m = factor * e: added to `grad`; returns that of the sender's factor."""
    total, twice_squares, high, low, highest, lowest = upstream
    m = e * factor
    dm = (m * twice_squares).add_(total)  # addcmul takes five times as long on such broadcasts
    for extreme, share in ((highest, high), (lowest, low)):
        at = _equal(m, extreme, scratch)
        dm.addcmul_(at, share if shared else share / at.sum(axis, keepdim=True).clamp_(min=1))
    grad.addcmul_(dm, factor)
    return dm.mul_(e).sum(3 - axis)


class Kernels(NamedTuple):
    """What is done to a chunk, as it stands here or as `torch.compile` fuses it."""

    both: Callable[[Tensor, Ends], tuple[Moments, Moments]]
    advance: Callable[[Tensor, Tensor, Tensor], None]
    backward: Callable[..., Ends]


PLAIN = Kernels(both, advance, backward)


@functools.cache
def compiled() -> Kernels:
    """The kernels fused, for chunks of any shape; the first call takes a minute and, on a CPU, a C++ compiler."""
    fused: list[Any] = [torch.compile(kernel, dynamic=True) for kernel in PLAIN]
    return Kernels(*fused)


def exact(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass outside of the caller's autocast: what it computes again must be what was, to the last bit."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return run
