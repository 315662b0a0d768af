"""What a trace is: an ordered list of operations on numbered values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Ref:
    """Stands for a value of the trace: a tensor that depends on the inputs or on a parameter."""

    value: int


@dataclass(frozen=True)
class Op:
    """One recorded operation.

    Attributes:
        name: `module` for a leaf module, else the name of the torch function, such as `conv2d` or `add`.
        func: The torch function itself; None for a leaf module.
        module: Qualified name of the leaf module, or of the innermost module that called the function.
        args, kwargs: As called, tensors that depend on the inputs or parameters replaced by `Ref`.
        outputs: Structure of the result, tensors replaced by `Ref`.
    """

    name: str
    func: Callable[..., Any] | None
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any

    def inputs(self) -> list[int]:
        """Numbers of the values read."""
        leaves, _ = tree_flatten((self.args, self.kwargs))
        return [leaf.value for leaf in leaves if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Trace:
    """What a network does on its example inputs.

    Attributes:
        ops: Operations in order.
        shapes: Of all values.
        inputs, outputs: Numbers of the values that go in and come out.
        params: Numbers of the parameters and buffers.
        integers: Inputs that are indices, not activations.
        traced_by: A watched run, or `torch.export`.
        blind: Some of it ran out of sight, and `torch.export` could not help.
    """

    ops: tuple[Op, ...]
    shapes: dict[int, tuple[int, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: dict[int, str]
    integers: frozenset[int] = frozenset()
    traced_by: Literal["run", "export"] = "run"
    blind: bool = False
