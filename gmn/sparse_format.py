"""Hand 2:4 weights over to kernels that skip zeros: torch's semi-structured sparse tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.sparse import to_sparse_semi_structured

from gmn.errors import GmnError, PruningError, one_line
from gmn.limits import meant
from gmn.progress import say
from gmn.trace import clone
from gmn.weight_masks import reasons


def semi_structured(model: nn.Module, *, keep: Sequence[str] = ()) -> nn.Module:
    """A copy, for inference, whose linear layers hold only the two weights of every four that may differ from zero.

    The format is for matrices: every convolution and the projections of `nn.MultiheadAttention` stay dense, zeros and
    all. A line says which layers are in the format and which are not, with the reason.

    Args:
        model: Pruned to 2:4; in float16 or bfloat16, on a CUDA device of compute capability 8.0 or more. It is not
            changed.
        keep: Patterns of `fnmatch` over the names of linear layers that stay dense, such as a classifier.

    Raises:
        PruningError: if a linear layer is not 2:4, there is none, or a pattern matches none.
        GmnError: if the device, the number format or torch lacks what is needed; it says which. Torch also refuses
            layers whose sizes are not multiples of what its kernels take, by name: leave them dense with `keep`.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    kept = {name: f"keep={p!r}" for p in keep for name in meant(p, layers, f"keep={p!r}", "linear layers")}
    dense = {**_not_matrices(model), **kept}
    names = [name for name in layers if name not in dense]
    if not names:
        raise PruningError("no linear layer to convert", got=f"{len(kept)} that are kept dense")
    for name in names:
        _refuse_dense(layers[name].weight, name)
    _refuse_hardware(layers[names[0]].weight)
    converted = clone(model).eval()
    for name in names:
        layer = converted.get_submodule(name)
        layer.weight = nn.Parameter(_compressed(layer.weight, name), requires_grad=False)  # type: ignore[arg-type]
    say(f"semi-structured: {', '.join(names)}; dense: {reasons(dense) or 'no layer'}")
    return converted


def _not_matrices(model: nn.Module) -> dict[str, str]:
    """The layers with weights that the format is not for, and why."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            found[name] = "convolution"
        elif isinstance(module, nn.MultiheadAttention):
            found[name] = "nn.MultiheadAttention"
    return found


def _refuse_dense(weight: Tensor, name: str) -> None:
    """Raise PruningError unless two of every four numbers in a row are zero."""
    hint = "prune with pattern 2:4, or leave the layer dense with keep="
    if weight.shape[1] % 4:
        raise PruningError("a row has no groups of 4", got=f"{weight.shape[1]} inputs", where=name, hint=hint)
    most = int((weight != 0).unflatten(1, (-1, 4)).sum(dim=2).max())
    if most > 2:
        got = f"{most} of 4 that are not zero"
        raise PruningError("the weights are not 2:4", expected="at most 2 of 4", got=got, where=name, hint=hint)


def _refuse_hardware(weight: Tensor) -> None:
    what = "semi-structured weights need other hardware"
    capable = "a CUDA device of compute capability 8.0 or more"
    if weight.device.type != "cuda":
        hint = "model.cuda()" if torch.cuda.is_available() else "there is no CUDA device here; zeros stay zeros"
        raise GmnError(what, expected=capable, got=str(weight.device), hint=hint)
    if (capability := torch.cuda.get_device_capability(weight.device)) < (8, 0):
        raise GmnError(what, expected=capable, got=f"{capability[0]}.{capability[1]}")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        expected, hint = "float16 or bfloat16", "model.half()"
        raise GmnError(
            "semi-structured weights need another number format", expected=expected, got=str(weight.dtype), hint=hint
        )


def _compressed(weight: Tensor, name: str) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the format a prototype
            return to_sparse_semi_structured(weight.detach().contiguous())
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        got, hint = one_line(error), "leave the layer dense with keep="
        raise GmnError("torch cannot compress the layer", got=got, where=name, hint=hint) from error
