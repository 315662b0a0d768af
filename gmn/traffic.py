"""How many bytes the operations inside a block read and write, from memory or from a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OVERWRITING = ("copy_", "zero_", "fill_", "new_zeros", "zeros_like", "full_like", "empty_like", "new_empty")
"""What they get first they write to, or ask only for its shape."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that every operation reads and writes; views move none.

    >>> import torch
    >>> with Traffic() as traffic:
    ...     x = torch.zeros(1000)
    ...     y = (x.view(10, 100) + 1).mul_(2)
    >>> traffic.bytes  # written by zeros, read and written by +, read and written by mul_
    20000
    >>> with Traffic() as traffic:
    ...     y = torch.empty_like(x).copy_(x)  # x is read, y is written
    ...     y = torch.eq(x, x, out=y)  # the same
    >>> traffic.bytes
    16000
    >>> with Traffic() as traffic:
    ...     y = x.index_select(0, torch.tensor([7, 5]))  # two numbers of x and two of the index are read, two written
    >>> traffic.bytes
    32
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its bytes."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view":  # a view that says it is none
            given = args[1:] if name in OVERWRITING else args
            options = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            read = {x.data_ptr(): x for x in tree_leaves((given, options)) if isinstance(x, Tensor)}
            written = [] if name.startswith("empty") else [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            most = _touched(name, args, result)
            self.bytes += sum(min(_size(x), most.get(x.data_ptr(), _size(x))) for x in (*read.values(), *written))
        return result


def _touched(name: str, args: Any, result: Any) -> dict[int, int]:
    """By address, how many bytes of what it gets first an operation reads or changes at most, as an index says."""
    if name == "index_select":
        return {args[0].data_ptr(): _size(result)}
    return {args[0].data_ptr(): _size(args[3])} if name in ("index_add_", "scatter_reduce_") else {}


def _size(x: Tensor) -> int:
    """A broadcast tensor is as large as what it repeats."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
