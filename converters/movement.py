"""Operations that move data and compute nothing: replayed on the node numbers themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from gmn.flow import NO_NODE, Flow, nothing
from gmn.rules import Call, Parameters, register_function, words


def _replay(call: Call) -> Any:
    assert call.func is not None
    ids = lambda leaf: _index(call, leaf) if isinstance(leaf, Parameters) else _ids(leaf)  # noqa: E731
    result = call.func(*tree_map(ids, call.args), **tree_map(ids, call.kwargs))
    scores = call.flows[0].scores
    return tree_map(lambda x: Flow(x, uses=call.uses, scores=scores) if isinstance(x, Tensor) else x, result)


def _index(call: Call, leaf: Parameters) -> Any:
    """A buffer of indices is itself; any other parameter carries no node."""
    if leaf.origin is not None and not call.builder.tensor(leaf.origin).is_floating_point():
        return call.builder.tensor(leaf.origin).reshape(leaf.shape)
    return nothing(leaf.shape)


def _ids(leaf: Any) -> Any:
    """The node numbers of an activation; a parameter carries none."""
    if isinstance(leaf, Parameters):
        return nothing(leaf.shape)
    return leaf.ids if isinstance(leaf, Flow) else leaf


_RESHAPES = words("""
    _unsafe_view view reshape view_as reshape_as flatten unflatten ravel
""")
_EXPANSIONS = words("""
    expand expand_as broadcast_to
""")
_MOVEMENTS = words("""
    squeeze unsqueeze repeat repeat_interleave tile permute transpose swapaxes swapdims movedim moveaxis t flip
    fliplr roll rot90 diagonal __get__ chunk split tensor_split unsafe_chunk hsplit vsplit dsplit unbind narrow
    select index_select __getitem__ slice split_with_sizes alias lift_fresh_copy pixel_shuffle pixel_unshuffle
    channel_shuffle
""")


@register_function(*_RESHAPES, *_EXPANSIONS, *_MOVEMENTS)
def move(call: Call) -> Any:
    """Reshape, permute, split: the same call on the node numbers."""
    if call.op in _RESHAPES:
        result: Any = call.flows[0].closed(call.uses, call.flows[0].ids.reshape(call.shape))
    elif call.op in _EXPANSIONS:
        result = call.flows[0].closed(call.uses, call.args[0].ids.expand(call.shape))
    elif len(call.flows) > 1 or any(p.origin is None for p in call.parameters):
        return None  # an index that is computed
    else:
        result = _replay(call)
    for flow in tree_flatten(result)[0]:
        if isinstance(flow, Flow) and not _keeps_channels(call.flows[0], flow):
            # the sizes of the parts are written in the code: they would not follow a pruned network
            call.builder.regroup(call.flows[0].nodes, f"split or regrouped by {call.name}")
    return result


def _keeps_channels(before: Flow, after: Flow) -> bool:
    """Whether some axis still carries all channels in their order (perhaps flattened with the positions)."""
    axis = before.channel_axis()
    if axis is None:
        return True  # regrouped earlier, and noted there; or nothing to lose
    channels = before.channels(axis).unique_consecutive()
    found = [after.aligned(a) for a in range(after.ids.dim())]
    return any(c is not None and _repeats(c.unique_consecutive(), channels) for c in found)


def _repeats(channels: Tensor, pattern: Tensor) -> bool:
    """Whether a list is a pattern, or the pattern several times over (positions before channels)."""
    times, rest = divmod(len(channels), len(pattern))
    return not rest and times > 0 and bool((channels.view(times, -1) == pattern).all())


@register_function("cat", "concat", "concatenate", "stack")
def cat(call: Call) -> Any:
    """Concatenation keeps the nodes of its parts; a part made of parameters carries none, such as a class token."""
    parts, dim = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    if call.op != "stack" and call.flows[0].channel_axis(-1) != dim % len(call.shape):
        call.freeze_beside_constants()
    assert call.func is not None
    ids = [nothing(tuple(part.shape)) if isinstance(part, Tensor) else _ids(part) for part in parts]
    joined = torch.stack(ids, dim) if call.op == "stack" else torch.cat(ids, dim)
    return call.flows[0].closed(call.uses, joined)


@register_function("__setitem__", "copy_", "masked_fill", "masked_fill_", "fill_", "zero_", "triu", "tril")
def write(call: Call) -> Flow | None:
    """Writing a part of an activation: what is written carries its own nodes, a constant none."""
    first = call.args[0]
    name = call.op
    if name not in ("__setitem__", "copy_"):
        return first.closed(call.uses) if isinstance(first, Flow) else None
    ids = _ids(first) if isinstance(first, (Flow, Parameters)) else nothing(tuple(first.shape))
    ids = ids.clone(memory_format=torch.contiguous_format)
    value = call.args[-1] if name == "__setitem__" else call.args[1]
    if name == "__setitem__" and any(isinstance(leaf, Flow) for leaf in tree_flatten(call.args[1])[0]):
        masked = isinstance(first, Flow) and not isinstance(value, Flow)
        return first.closed(call.uses) if masked and isinstance(first, Flow) else None  # where a mask says
    part = _ids(value) if isinstance(value, (Flow, Parameters)) else NO_NODE
    ids[call.args[1] if name == "__setitem__" else ...] = part
    call.freeze_beside_constants()
    return Flow(ids, uses=call.uses)


@register_function("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
@register_function("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
def fresh(call: Call) -> Flow:
    """A new tensor of an activation's shape, or only of its type, carries nothing of it."""
    return Flow(nothing(call.shape), uses=call.uses)


@register_function("pad", "constant_pad_nd")
def pad(call: Call) -> Any:
    """Padding with zeros adds positions that carry no node."""
    flow, widths = call.args[0], call.argument(1, "pad")
    if call.argument(2, "mode", "constant") != "constant":
        return flow.closed(call.uses, F.pad(flow.ids.float(), widths, mode=call.argument(2, "mode")).to(torch.int32))
    return flow.closed(call.uses, F.pad(flow.ids, widths, value=NO_NODE))
