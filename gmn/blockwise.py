"""The arithmetic of message passing on one chunk of an edge block, forward and backward, without an edge list.

Channels come first, so that every sum over a block's rows or columns is one pass over contiguous memory:
e [b, O, I] holds the states of a chunk's edges, b = H hidden x G pieces, O targets, I sources. A vector of the targets
is [b, O], one of the sources [b, I]; i counts targets, j sources.

    along    m_ij  = B_j e_ij        reduced over j        against  m'_ij = B'_i e_ij      reduced over i
    scale    e_ij <- e_ij (1 + c_i d_j + d_i c_j)

Gradients, with G the gradient of what the layer makes of e, and g of the moments of m (of m' likewise):

    ds = G e         dc_i = sum_j ds d_j,  dd_i = sum_j ds c_j,  dd_j = sum_i ds c_i,  dc_j = sum_i ds d_i
    de = G (1 + c_i d_j + d_i c_j) + dm B_j + dm' B'_i
    dm = g_total_i + 2 m g_squares_i + [m is the maximum] g_high_i / ties + [m is the minimum] g_low_i / ties
"""

from __future__ import annotations

from typing import NamedTuple

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


def product(t: Tensor, s: Tensor, *, plus: float = 0.0) -> Tensor:
    """[b, O, I]: plus + t s, of t [b, O, k] and s [b, k, I]."""
    if t.shape[1] * s.shape[2] < SMALL:
        return (t[:, :, None, :] * s.transpose(1, 2)[:, None, :, :]).sum(3) + plus
    return torch.baddbmm(t.new_full((1,), plus), t, s) if plus else torch.bmm(t, s)


def over_targets(x: Tensor, v: Tensor) -> Tensor:
    """[b, k, I]: sum_i v_ki x_ij, of x [b, O, I] and v [b, k, O]."""
    small = x.shape[1] * x.shape[2] < SMALL
    return (v[:, :, :, None] * x[:, None]).sum(2) if small else torch.bmm(v, x)


def over_sources(x: Tensor, v: Tensor) -> Tensor:
    """[b, k, O]: sum_j v_kj x_ij."""
    return over_targets(x.transpose(1, 2), v)


def scale(ends: Ends) -> Tensor:
    """[b, O, I]: 1 + c_i d_j + d_i c_j."""
    return product(ends.dst, ends.src, plus=1.0)


def moments(e: Tensor, sent: Tensor, axis: int, *, ties: bool) -> Moments:
    """Moments of sent * e over an axis, 2: over sources, 1: over targets; ties are counted if they will be needed."""
    m = e * sent.unsqueeze(3 - axis)
    scratch = torch.mul(m, m)
    total, squares, high, low = m.sum(axis), scratch.sum(axis), m.amax(axis), m.amin(axis)
    if not ties:
        return Moments(total, squares, high, low, high, low)
    at_high = torch.eq(m, high.unsqueeze(axis), out=scratch).sum(axis)
    at_low = torch.eq(m, low.unsqueeze(axis), out=scratch).sum(axis)
    return Moments(total, squares, high, low, at_high, at_low)


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
    grad.mul_(scale(ends))
    b, a = ends.sent, ends.against
    grad += product(torch.stack((along.total, a), 2), torch.stack((b, against.total), 1))
    grad.addcmul_(product(torch.stack((2 * along.squares, 2 * a * a), 2), torch.stack((b * b, against.squares), 1)), e)
    squares = torch.mul(e, e, out=ds)
    sent = over_targets(e, along.total[:, None])[:, 0] + 2 * b * over_targets(squares, along.squares[:, None])[:, 0]
    back = over_sources(e, against.total[:, None])[:, 0] + 2 * a * over_sources(squares, against.squares[:, None])[:, 0]
    sent += _extreme(e, grad, b[:, None, :], along, 2, ds)
    back += _extreme(e, grad, a[:, :, None], against, 1, ds)
    return Ends(sent, back, dst, src)


def _extreme(e: Tensor, grad: Tensor, factor: Tensor, upstream: Upstream, axis: int, scratch: Tensor) -> Tensor:
    """The part of the extremes: added to `grad`; returns that of the sender's factor."""
    m = e * factor
    part = torch.empty_like(m)
    torch.eq(m, upstream.highest.unsqueeze(axis), out=part).mul_(upstream.high.unsqueeze(axis))
    torch.eq(m, upstream.lowest.unsqueeze(axis), out=scratch)
    part.addcmul_(scratch, upstream.low.unsqueeze(axis))
    grad.addcmul_(part, factor)
    return part.mul_(e).sum(3 - axis)
