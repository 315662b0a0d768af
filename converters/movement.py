"""Operations that move data and compute nothing: replayed on the node numbers themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from gmn.builder import NO_NODE
from gmn.convert import Call, Flow, register_function
from gmn.errors import ConversionError


def _replay(call: Call, **changes: Any) -> Any:
    func = Tensor.reshape if call.func is Tensor.view else call.func  # the ids' strides differ from the activation's
    assert func is not None
    ids = lambda leaf: leaf.ids if isinstance(leaf, Flow) else leaf  # noqa: E731
    result = func(*tree_map(ids, call.args), **{**tree_map(ids, call.kwargs), **changes})
    return tree_map(lambda leaf: Flow(leaf, "closed", call.uses) if isinstance(leaf, Tensor) else leaf, result)


@register_function(
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "repeat",
        "repeat_interleave",
    ),
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "flip", "roll", "ravel"),
    *(
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "narrow",
        "select",
        "__getitem__",
        "__get__",
        "index_select",
    ),
    *("expand_as", "view_as", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
)
def move(call: Call) -> Any:
    """Reshape, permute, split: the same call on the node numbers."""
    if call.parameters:
        return None
    result = _replay(call)
    for flow in tree_flatten(result)[0]:
        if isinstance(flow, Flow) and not _keeps_channels(call.flows[0], flow):
            # the sizes of the parts are written in the code: they would not follow a pruned network
            call.builder.freeze(call.flows[0].ids.flatten(), f"split or regrouped by {call.name}")
    return result


def _keeps_channels(before: Flow, after: Flow) -> bool:
    """Whether some axis still carries all channels in their order (perhaps flattened with the positions)."""
    channels = _aligned(before)
    if not channels:
        return True  # regrouped earlier, and frozen there
    return any(torch.equal(channels[0].unique_consecutive(), c.unique_consecutive()) for c in _aligned(after))


def _aligned(flow: Flow) -> list[Tensor]:
    """The channels along each axis that carries them."""
    found = []
    for axis in range(flow.ids.dim()):
        try:
            found.append(flow.channels(axis))
        except ConversionError:
            continue
    return sorted((c for c in found if len(c) > 1), key=len, reverse=True)


@register_function("cat", "concat", "concatenate", "stack")
def cat(call: Call) -> Any:
    """Concatenation keeps the nodes of its parts; a part made of parameters alone carries no node."""
    return None if call.parameters else _replay(call)


@register_function("pad", "constant_pad_nd")
def pad(call: Call) -> Any:
    """Padding with zeros adds positions that carry no node."""
    flow, widths = call.args[0], call.args[1] if len(call.args) > 1 else call.kwargs["pad"]
    mode = call.args[2] if len(call.args) > 2 else call.kwargs.get("mode", "constant")
    if mode != "constant":
        return Flow(F.pad(flow.ids.float(), widths, mode=mode).to(flow.ids.dtype), "closed", call.uses)
    return Flow(F.pad(flow.ids, widths, value=NO_NODE), "closed", call.uses)
