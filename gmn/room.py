"""A bound on what is allocated while a network is built as a file says: what a file only claims costs nothing."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from gmn.errors import CheckpointError

SLACK = 2**28  # bytes
SHARE = 256  # a network may lose all but one of so many numbers in pruning
MOST_TENSORS = 20_000


class Room(TorchFunctionMode):
    """Inside the `with`, tensors are made only as long as there is room for them.

    Args:
        size: Bytes of the numbers that the file holds.
        where: The file, for errors.

    Raises:
        CheckpointError: before a tensor is made for which there is no room: all together may have
            `SLACK + SHARE * size` bytes, and there may be `MOST_TENSORS` of them.
    """

    def __init__(self, size: int, where: str) -> None:
        super().__init__()
        self.left, self.tensors, self.where = SLACK + SHARE * size, MOST_TENSORS, where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and "out" not in kwargs:
            own = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
            claimed = func(*args, **{**own, "device": "meta"})  # its shape alone
            self.left -= claimed.numel() * claimed.element_size()
            self.tensors -= 1
            if self.left < 0 or self.tensors < 0:
                got = f"a tensor of shape {list(claimed.shape)}"
                raise CheckpointError(
                    "the file claims a network far larger than its weights", got=got, where=self.where
                )
        return func(*args, **kwargs)
