"""Operations that keep every channel where it is: activations, pooling, dropout, means over positions."""

from __future__ import annotations

import dataclasses
import re

from gmn.flow import NO_NODE, Flow, nothing
from gmn.rules import Call, register_function, words

_ACTIVATIONS = words("""
    relu relu_ relu6 relu6_ hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu celu gelu silu silu_ mish
    hardswish hardswish_ hardsigmoid hardsigmoid_ sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid threshold
    abs exp sqrt pow __pow__ __rpow__ clamp clamp_ clip neg __neg__ square rsqrt log sin cos sign erf reciprocal
    softmax log_softmax normalize to type half bfloat16 double float type_as nan_to_num __eq__ __ne__ __lt__
    __gt__ __le__ __ge__ __invert__ logical_not bool
""")
_POOLS = words("""
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d interpolate grid_sample
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices upsample
    upsample_nearest upsample_bilinear
""")


@register_function(*_ACTIVATIONS)
def activation(call: Call) -> Flow | None:
    """A nonlinearity closes the layer: no later norm or residual can be merged into it."""
    flow = call.flows[0]
    call.freeze_beside_constants()
    casts = call.op in ("to", "type_as")  # the second only lends its type
    single = len(call.flows) == 1 or casts
    return flow.closed(call.uses) if single and tuple(flow.ids.shape) == call.shape else None


@register_function(
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
    *("contiguous", "clone", "detach", "requires_grad_", "cpu", "cuda", "stochastic_depth"),
)
def identity(call: Call) -> Flow | None:
    """Does nothing in eval mode, so the layer before stays open."""
    return dataclasses.replace(call.flows[0], uses=max(call.uses, call.flows[0].uses))


@register_function(*_POOLS)
def pool(call: Call) -> Flow | None:
    """Pooling and resizing keep the channels, which lie before the axes that are pooled."""
    flow = call.flows[0]
    for other in call.flows[1:]:
        call.builder.freeze(other.nodes, f"positions for {call.op} in {call.name}")
    axis = flow.channel_axis(1)
    digit = re.search(r"(\d)d", call.op)
    pooled = int(digit[1]) if digit else flow.ids.dim() - 2
    if axis is None or len(call.shape) != flow.ids.dim() or axis >= flow.ids.dim() - pooled:
        return None
    return call.output(flow.channels(axis), axis)


@register_function("mean", "sum", "amax", "amin", "nanmean", "var", "std", "norm", "logsumexp", "linalg_vector_norm")
def reduce(call: Call) -> Flow | None:
    """A mean over positions keeps the channels; over channels it keeps none of them."""
    flow, name = call.flows[0], call.op
    dims = call.argument(2 if name in ("norm", "linalg_vector_norm") else 1, "dim", call.kwargs.get("axis"))
    if call.parameters or not flow.ids.numel():
        return None if call.parameters else Flow(nothing(call.shape), uses=call.uses)
    dims = tuple(range(flow.ids.dim())) if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
    top = flow.ids.amax(dims, keepdim=True)
    ids = top.expand(call.shape) if len(call.shape) == top.dim() else flow.ids.amax(dims)
    if bool(((flow.ids == top) | (flow.ids == NO_NODE)).all()):
        return flow.closed(call.uses, ids)
    call.builder.misread(flow)
    call.builder.freeze(flow.nodes, f"{name} over channels in {call.name}")
    slices = flow.ids.narrow(dims[0], 0, 1).amax(dims, keepdim=len(call.shape) == top.dim())
    return Flow(slices if len(slices.unique()) > 1 else nothing(call.shape), uses=call.uses)
