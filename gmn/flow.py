"""What an activation carries while a trace is read: the node at every position of it.

Every activation is shadowed by a `Flow`: an integer tensor of the activation's own shape that says which node each
position carries. Operations that only move data (reshape, permute, concatenate, split, pad) are replayed on the
shadow, so channel order is followed without a rule for each of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gmn.errors import ConversionError

NO_NODE = -1  # a padded zero, or a value that belongs to no channel, such as an attention probability


class Scores(NamedTuple):
    """Of attention scores: the two lists of channels that met, how many heads, and whether they were summed away."""

    query: Tensor
    key: Tensor
    heads: int
    summed: bool


@dataclass(frozen=True)
class Flow:
    """The node at every position of an activation, and what may still be merged into those nodes.

    Attributes:
        ids: Node numbers, int32, of the activation's shape; `NO_NODE` where a position carries none.
        stage: `raw` (straight out of a weight layer), `normed`, `summed` (a residual was added) or `closed`.
        uses: Number of operations that read the activation.
        scores: What met in attention scores; they carry no channel themselves.
    """

    ids: Tensor
    stage: str = "closed"
    uses: int = 1
    scores: Scores | None = None

    def closed(self, uses: int, ids: Tensor | None = None) -> Flow:
        """The same channels after an operation that nothing can be merged across."""
        return dataclasses.replace(self, ids=self.ids if ids is None else ids, stage="closed", uses=uses)

    def aligned(self, axis: int) -> Tensor | None:
        """Node of every channel along `axis`, `NO_NODE` for none; None if the other axes carry channels too."""
        axis %= self.ids.dim()
        if not self.ids.numel():
            return self.ids.new_full((self.ids.shape[axis],), NO_NODE)
        others = [d for d in range(self.ids.dim()) if d != axis]
        if all(self.ids.shape[d] == 1 or self.ids.stride(d) == 0 for d in others):
            return _first(self.ids, axis)
        top = self.ids.amax(dim=others, keepdim=True)
        return top.flatten() if bool(((self.ids == top) | (self.ids == NO_NODE)).all()) else None

    def channels(self, axis: int) -> Tensor:
        """Node of every channel along `axis`.

        Raises:
            ConversionError: if the other axes do not share one order of channels.
        """
        found = self.aligned(axis)
        if found is None:
            got = f"axis {axis} of {tuple(self.ids.shape)}"
            raise ConversionError("the channels are not aligned along one axis", got=got)
        return found

    def channel_axis(self, *preferred: int, size: int | None = None) -> int | None:
        """The axis along which the activation carries its channels (of that number); the preferred ones first."""
        dims = self.ids.dim()
        for axis in dict.fromkeys([*(p % dims for p in preferred if -dims <= p < dims), *range(dims)]):
            if size is not None and self.ids.shape[axis] != size:
                continue
            found = self.aligned(axis)
            if found is not None and bool((found >= 0).any()) and (len(found) == 1 or len(found.unique()) > 1):
                return axis
        return None

    @property
    def nodes(self) -> Tensor:
        """All nodes carried, sorted."""
        ids = self.ids if self.ids.numel() else self.ids.flatten()
        for dim in range(ids.dim()):  # a broadcast axis repeats its first entry
            if ids.stride(dim) == 0:
                ids = ids.narrow(dim, 0, 1)
        found = ids.unique()
        return found[found >= 0]


def _first(ids: Tensor, axis: int) -> Tensor:
    for dim in range(ids.dim()):
        if dim != axis:
            ids = ids.narrow(dim, 0, 1)
    return ids.flatten()


def spread(channels: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The shadow of an activation of `shape` whose axis `axis` carries `channels` (a view, no memory)."""
    view = [1] * len(shape)
    view[axis % len(shape)] = -1
    return channels.view(view).expand(shape)


def nothing(shape: tuple[int, ...]) -> Tensor:
    """The shadow of an activation that carries no channel."""
    return torch.full((), NO_NODE, dtype=torch.int32).expand(shape)
