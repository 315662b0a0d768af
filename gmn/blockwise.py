"""The arithmetic of message passing on one chunk of an edge block, forward and backward, without an edge list.

Channels come first, so that every sum over a block's rows or columns is one pass over contiguous memory:
e [b, O, I] holds the states of a chunk's edges, b = H hidden x G pieces, O targets, I sources. A vector of the targets
is [b, O], one of the sources [b, I]; i counts targets, j sources.

    along    m_ij  = B_j e_ij        reduced over j        against  m'_ij = B'_i e_ij      reduced over i
    advance  e_ij <- e_ij (1 + c_i d_j + d_i c_j)

Gradients, with G the gradient of what the layer makes of e, and g of the moments of m (of m' likewise):

    ds = G e         dc_i = sum_j ds d_j,  dd_i = sum_j ds c_j,  dd_j = sum_i ds c_i,  dc_j = sum_i ds d_i
    de = G (1 + c_i d_j + d_i c_j) + dm B_j + dm' B'_i
    dm = g_total_i + 2 m g_squares_i + [m is the maximum] g_high_i / ties + [m is the minimum] g_low_i / ties
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALL = 256  # entries of a matrix below which a broadcast product beats a batched one


class Moments(NamedTuple):
    """Of the messages that nodes get, before the receiver's factor; ties count the messages that are the extremes."""

    total: Tensor
    squares: Tensor
    high: Tensor
    low: Tensor
    high_ties: Tensor
    low_ties: Tensor


class Extremes(NamedTuple):
    """The part of the moments that the backward pass asks for."""

    high: Tensor
    low: Tensor
    high_ties: Tensor
    low_ties: Tensor


class Upstream(NamedTuple):
    """Gradients of moments, those of the extremes divided by their ties; and the extremes."""

    total: Tensor
    squares: Tensor
    high: Tensor
    low: Tensor
    highest: Tensor
    lowest: Tensor


class Ends(NamedTuple):
    """What a layer knows of a chunk's nodes: B_j, B'_i, and (c, d) of the targets and (d, c) of the sources."""

    sent: Tensor  # [b, I]
    against: Tensor  # [b, O]
    dst: Tensor  # [b, O, 2]
    src: Tensor  # [b, 2, I]


def _broadcast(entries: int) -> bool:
    return torch.compiler.is_compiling() or entries < SMALL


def _equal(x: Tensor, y: Tensor, scratch: Tensor) -> Tensor:
    """1 where equal, else 0, in the type of x: twenty times as fast as a comparison that makes booleans."""
    return (x == y).to(x.dtype) if torch.compiler.is_compiling() else torch.eq(x, y, out=scratch)


def product(t: Tensor, s: Tensor) -> Tensor:
    """[b, O, I]: t_0 s_0 + t_1 s_1, of t [b, O, 2] and s [b, 2, I]."""
    if _broadcast(t.shape[1] * s.shape[2]):
        return (t[:, :, :1] * s[:, :1]).addcmul_(t[:, :, 1:], s[:, 1:])
    return torch.bmm(t, s)


def over_targets(x: Tensor, v: Tensor) -> Tensor:
    """[b, 2, I]: sum_i v_ki x_ij, of x [b, O, I] and v [b, 2, O]."""
    if _broadcast(x.shape[1] * x.shape[2]):
        return (v[:, :, :, None] * x[:, None]).sum(2)
    return torch.bmm(v, x)


def over_sources(x: Tensor, v: Tensor) -> Tensor:
    """[b, 2, O]: sum_j v_kj x_ij."""
    return over_targets(x.transpose(1, 2), v)


def advance(e: Tensor, ends: Ends) -> None:
    """The edges' step, in place: e (1 + c_i d_j + d_i c_j)."""
    e.addcmul_(e, product(ends.dst, ends.src))


def moments(e: Tensor, sent: Tensor, axis: int, *, ties: bool) -> Moments:
    """Moments of sent * e over an axis, 2: over sources, 1: over targets; ties are counted if they will be needed."""
    m = e * sent.unsqueeze(3 - axis)
    scratch = torch.mul(m, m)
    total, squares, high, low = m.sum(axis), scratch.sum(axis), m.amax(axis), m.amin(axis)
    if not ties:
        return Moments(total, squares, high, low, high, low)
    at_high = _equal(m, high.unsqueeze(axis), scratch).sum(axis)
    at_low = _equal(m, low.unsqueeze(axis), scratch).sum(axis)
    return Moments(total, squares, high, low, at_high, at_low)


def both(e: Tensor, ends: Ends, *, ties: bool) -> tuple[Moments, Moments]:
    """Moments along the edges, at their targets, and against them, at their sources."""
    return moments(e, ends.sent, 2, ties=ties), moments(e, ends.against, 1, ties=ties)


def joined(old: Moments, new: Moments) -> Moments:
    """Moments of a node over the messages of both; `old` may be of no messages, with high -inf and low inf."""
    high, low = torch.maximum(old.high, new.high), torch.minimum(old.low, new.low)
    high_ties = old.high_ties * (old.high == high) + new.high_ties * (new.high == high)
    low_ties = old.low_ties * (old.low == low) + new.low_ties * (new.low == low)
    return Moments(old.total + new.total, old.squares + new.squares, high, low, high_ties, low_ties)


def backward(e: Tensor, grad: Tensor, ends: Ends, along: Upstream, against: Upstream) -> Ends:
    """Gradients of the vectors of a chunk's nodes; `grad` [b, O, I], of the layer's e, becomes that of e before it.

    In what is returned, `dst` is [b, 2, O] for c_i, d_i, and `src` [b, 2, I] for d_j, c_j.

    Args:
        e: The states before the layer.
        along, against: What comes back to the moments at the targets and at the sources.
    """
    ds = grad * e
    dst = over_sources(ds, ends.src)
    src = over_targets(ds, ends.dst.transpose(1, 2))
    advance(grad, ends)
    sent = _received(e, grad, ends.sent[:, None, :], along, 2, ds)
    back = _received(e, grad, ends.against[:, :, None], against, 1, ds)
    return Ends(sent, back, dst, src)


def _received(e: Tensor, grad: Tensor, factor: Tensor, upstream: Upstream, axis: int, scratch: Tensor) -> Tensor:
    """The part of the messages m = factor * e: added to `grad`; returns that of the sender's factor."""
    total, squares, high, low, highest, lowest = (value.unsqueeze(axis) for value in upstream)
    m = e * factor
    dm = (m * (2 * squares)).add_(total)
    dm.addcmul_(_equal(m, highest, scratch), high)
    dm.addcmul_(_equal(m, lowest, scratch), low)
    grad.addcmul_(dm, factor)
    return dm.mul_(e).sum(3 - axis)


class Kernels(NamedTuple):
    """What is done to a chunk, as it stands here or as `torch.compile` fuses it."""

    both: Callable[..., tuple[Moments, Moments]]
    advance: Callable[[Tensor, Ends], None]
    backward: Callable[[Tensor, Tensor, Ends, Upstream, Upstream], Ends]


PLAIN = Kernels(both, advance, backward)


@functools.cache
def compiled() -> Kernels:
    """The kernels fused, for chunks of any shape; the first call takes a minute and, on a CPU, a C++ compiler."""
    fused: list[Any] = [torch.compile(kernel, dynamic=True) for kernel in PLAIN]
    return Kernels(*fused)
