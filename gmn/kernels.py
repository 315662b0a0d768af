"""The kernels of `gmn.blockwise` as they stand or fused by the compiler, and what keeps their numbers exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmn.blockwise import PLAIN, Kernels


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
