"""Where a parameter lives in a graph: addresses that are read in both directions.

A weight is seen as [G, O, I, K] (pieces, output channels, input channels, kernel taps). An address names the part of
it that one edge block holds, so network to graph is `read` and graph to network is `write` of the same address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]  # first, count
Runs = tuple[tuple[int, int, int], ...]  # (first, count, step): an index as a few arithmetic runs
Shape4 = tuple[int, int, int, int]


def as_runs(index: Tensor) -> Runs:
    """An index as runs of constant positive step.

    >>> as_runs(torch.tensor([4, 5, 6, 0, 2, 4]))
    ((4, 3, 1), (0, 3, 2))
    """
    if not len(index):
        return ()
    steps = index[1:] - index[:-1]
    changes = (steps[1:] != steps[:-1]).nonzero().flatten() + 1  # steps[c] is the first of another size
    runs, start, last = [], 0, len(index)
    while start < last:
        step = int(steps[start]) if start + 1 < last else 1
        after = changes[torch.searchsorted(changes, start, right=True) :]
        count = 1 if step <= 0 else (int(after[0]) if len(after) else last - 1) - start + 1
        runs.append((int(index[start]), count, step if count > 1 else 1))
        start += count
    return tuple(runs)


def positions(runs: Runs) -> Tensor:
    """The index that the runs stand for.

    >>> positions(((4, 3, 1), (0, 3, 2))).tolist()
    [4, 5, 6, 0, 2, 4]
    """
    return torch.cat([torch.arange(first, first + count * step, step) for first, count, step in runs])


def _at(runs: Runs) -> slice | Tensor:
    if len(runs) != 1:
        return positions(runs)
    ((first, count, step),) = runs
    return slice(first, first + count * step, step)


@dataclass(frozen=True)
class EdgeSlot:
    """The address of a weight, or of a part of it, in one block.

    `weight.reshape(shape).permute(perm)` is the weight as [G, O, I, K]. The block holds its pieces `pieces`, output
    channels `outputs` and input channels `inputs`, with tap t of the weight at position `taps[t]` of its own K axis.
    `home`: whether the weight is written back from here; a weight that is used twice has one home and several slots.
    """

    param: str
    block: int
    shape: Shape4
    pieces: Range
    outputs: Runs
    inputs: Runs
    taps: tuple[int, ...]
    perm: Shape4 = (0, 1, 2, 3)
    home: bool = True

    @property
    def canonical_shape(self) -> Shape4:
        """[G, O, I, K] of the whole weight."""
        g, o, i, k = (self.shape[axis] for axis in self.perm)
        return g, o, i, k

    def canonical(self, weight: Tensor) -> Tensor:
        """The whole weight as [G, O, I, K]."""
        return weight.reshape(self.shape).permute(self.perm)

    def restore(self, canonical: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `canonical`: the weight in its own shape."""
        inverse = [self.perm.index(axis) for axis in range(4)]
        return canonical.permute(inverse).reshape(tuple(shape))

    def read(self, weight: Tensor) -> Tensor:
        """The part of the weight that the block holds: [pieces, outputs, inputs, K]."""
        start, size = self.pieces
        return self.canonical(weight)[start : start + size][:, _at(self.outputs)][:, :, _at(self.inputs)]

    def write(self, canonical: Tensor, part: Tensor) -> None:
        """Undo `read`: put the part into the whole, in place."""
        start, size = self.pieces
        rows, cols = _at(self.outputs), _at(self.inputs)
        if isinstance(rows, Tensor) and isinstance(cols, Tensor):
            rows = rows[:, None]
        canonical[start : start + size, rows, cols] = part

    @property
    def whole(self) -> bool:
        """Whether the block holds all of the weight, in its order."""
        g, o, i, _ = self.canonical_shape
        return (self.pieces, self.outputs, self.inputs) == ((0, g), ((0, o, 1),), ((0, i, 1),))


@dataclass(frozen=True)
class NodeSlot:
    """The address of per-channel numbers: entries `rows` of the flattened tensor in column `column` of the nodes."""

    param: str
    nodes: Range
    column: int
    trainable: bool
    rows: Runs
    home: bool = True

    def read(self, tensor: Tensor) -> Tensor:
        """[nodes]: the numbers of the nodes."""
        return tensor.flatten()[_at(self.rows)]

    def write(self, flat: Tensor, values: Tensor) -> None:
        """Undo `read`, in place."""
        flat[_at(self.rows)] = values
