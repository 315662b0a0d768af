"""The inputs of a network as batches: how many samples they hold, and the same inputs with another number of them.

The first dimension of the first tensor counts samples, and so does that of every other tensor that is as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gmn.errors import NetworkError


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of inputs or outputs, in the order in which torch flattens containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def moved(tree: Any, device: torch.device) -> Any:
    """The same containers with their tensors on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def batch_size(inputs: Any) -> int:
    """Number of samples in the inputs of a network; NetworkError if there are none.

    >>> batch_size({"ids": torch.zeros(3, 7), "scale": 2.0})
    3
    """
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim()), None)
    if first is None or not len(first):
        raise NetworkError("no batch in the inputs", expected="a tensor whose first dimension counts samples")
    return len(first)


def batched(inputs: Any) -> list[Tensor]:
    """The tensors of the inputs that hold a sample in each row."""
    return [tensor for tensor in tensors_in(inputs) if tensor.dim() and len(tensor) == batch_size(inputs)]


def with_batch(inputs: Any, size: int, *, shuffled: bool = False) -> Any:
    """The inputs with so many samples, repeated in turn; what has no batch stays as it is.

    Args:
        inputs: A tensor, or containers of tensors and anything else.
        size: Number of samples.
        shuffled: Put the numbers of each sample into an order of its own; not integers, which can be indices.

    Raises:
        NetworkError: if there is no batch in the inputs.

    >>> with_batch((torch.tensor([1, 2]), "mean"), 3)
    (tensor([1, 2, 1]), 'mean')
    """
    own = {id(tensor) for tensor in batched(inputs)}
    generator = torch.Generator().manual_seed(size)

    def resized(leaf: Any) -> Any:
        if id(leaf) not in own:
            return leaf
        rows = leaf[torch.arange(size, device=leaf.device) % len(leaf)]
        if not (shuffled and leaf.is_floating_point() and leaf.dim() > 1):
            return rows
        order = torch.stack([torch.randperm(rows[0].numel(), generator=generator) for _ in range(size)])
        return rows.flatten(1).gather(1, order.to(rows.device)).view_as(rows)

    return tree_map(resized, inputs)
