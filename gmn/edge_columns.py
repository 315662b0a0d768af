"""Encoders and decoders of edges on columns, [features, edges], and the gradients of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from gmn.errors import ConversionError


def columns(module: nn.Module, x: Tensor) -> Tensor:
    """An encoder or decoder on columns: [features, edges] to [features, edges]."""
    if isinstance(module, nn.Sequential):
        for part in module:
            x = columns(part, x)
        return x
    if isinstance(module, nn.Linear):
        return torch.addmm(module.bias[:, None], module.weight, x)
    if isinstance(module, nn.LayerNorm) and not module.elementwise_affine:
        return _Normed.apply(x, module.eps)  # type: ignore[no-any-return]
    if isinstance(module, nn.SiLU):
        return F.silu(x)
    raise TypeError(f"no rule for {module} on columns")


class _Normed(Function):
    """LayerNorm of every column, y = (x - mean) scale:  dx = scale (dy - mean(dy) - y mean(y dy)).

    In half the passes of torch's own over rows that are strided, and of autograd's over the formula.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y = x - x.mean(0, keepdim=True)
        scale = torch.rsqrt((y * y).mean(0, keepdim=True) + eps)
        y.mul_(scale)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (y, scale) = grads, ctx.saved_tensors
        work = y * grad
        work = torch.sub(grad, y * work.mean(0, keepdim=True), out=work)
        return work.sub_(grad.mean(0, keepdim=True)).mul_(scale), None


def parameters_of(modules: Sequence[nn.Module | None]) -> list[Tensor]:
    """Each parameter once: blocks of one kind share their encoder."""
    return list({id(p): p for module in modules if module is not None for p in module.parameters()}.values())


class Gradients:
    """Sums of the gradients of some modules' parameters, in the order of `parameters_of`.

    What the forward pass read is given too: the backward pass computes again, and must find the same.
    """

    def __init__(self, modules: Sequence[nn.Module | None], read: Sequence[Tensor]) -> None:
        parameters = parameters_of(modules)
        if any(now is not then for now, then in zip(parameters, read, strict=True)):
            hint = "call backward inside of what exchanges them, or use backend: pyg"
            raise ConversionError("the metanetwork has other parameters than in the forward pass", hint=hint)
        self.places = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.of_all: list[Tensor | None] = [None] * len(self.places)

    def add(self, module: nn.Module, output: Tensor, grad: Tensor, wanted: Tensor | None = None) -> Tensor | None:
        """Add what an output's gradient means for a module's parameters; returns that for `wanted`."""
        own = [p for p in module.parameters() if p.requires_grad]
        inputs = own if wanted is None else [*own, wanted]
        found: Sequence[Tensor] = torch.autograd.grad(output, inputs, grad) if inputs else ()
        for parameter, value in zip(own, found, strict=False):
            index = self.places[id(parameter)]
            old = self.of_all[index]
            self.of_all[index] = value if old is None else old.add_(value)
        return None if wanted is None else found[len(own)]
