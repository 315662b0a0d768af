"""Operations that keep every channel where it is: activations, pooling, dropout, means over positions."""

from __future__ import annotations

from gmn.builder import NO_NODE
from gmn.convert import Call, Flow, register_function
from gmn.errors import ConversionError


@register_function(
    *(
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "selu",
        "celu",
    ),
    *(
        "gelu",
        "silu",
        "silu_",
        "mish",
        "hardswish",
        "hardswish_",
        "hardsigmoid",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
    ),
    *(
        "softplus",
        "logsigmoid",
        "abs",
        "exp",
        "sqrt",
        "pow",
        "__pow__",
        "clamp",
        "clamp_",
        "neg",
        "__neg__",
        "float",
    ),
    *(
        "square",
        "to",
        "type",
        "half",
        "bfloat16",
        "double",
        "type_as",
        "threshold",
        "rsqrt",
        "log",
        "relu6_",
        "softmax",
        "log_softmax",
    ),
)
def activation(call: Call) -> Flow | None:
    """A nonlinearity closes the layer: no later norm or residual can be merged into it."""
    return None if call.parameters or len(call.flows) != 1 else Flow(call.flows[0].ids, "closed", call.uses)


@register_function("mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__itruediv__")
def scale(call: Call) -> Flow | None:
    """Multiplication with a constant; products of activations or with parameters need a rule of their own."""
    if call.parameters or len(call.flows) != 1 or tuple(call.flows[0].ids.shape) != call.shape:
        return None
    call.freeze_beside_constants()
    return Flow(call.flows[0].ids, "closed", call.uses)


@register_function(
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
    *("contiguous", "clone", "detach", "requires_grad_", "cpu", "cuda", "stochastic_depth"),
)
def identity(call: Call) -> Flow | None:
    """Does nothing in eval mode, so the layer before stays open."""
    return None if call.parameters else Flow(call.flows[0].ids, call.flows[0].stage, max(call.uses, call.flows[0].uses))


@register_function(
    *(
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "interpolate",
        "lp_pool2d",
    ),
    *(
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
    ),
    *("upsample", "upsample_nearest", "upsample_bilinear"),
)
def pool(call: Call) -> Flow:
    """Pooling and resizing keep the channels of axis 1 (after the batch)."""
    return call.output(call.flows[0].channels(1), 1)


@register_function("mean", "sum", "amax", "amin", "nanmean")
def reduce(call: Call) -> Flow | None:
    """A mean over positions keeps the channels; a mean over channels is refused."""
    flow = call.flows[0]
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", call.kwargs.get("axis"))
    if dims is None or call.parameters:
        return None
    keep = bool(call.args[2] if len(call.args) > 2 else call.kwargs.get("keepdim", False))
    top = flow.ids.amax(dims, keepdim=True)
    if not bool(((flow.ids == top) | (flow.ids == NO_NODE)).all()):
        raise ConversionError(f"{call.func.__name__ if call.func else 'mean'} mixes channels", where=call.name)
    return Flow(top if keep else flow.ids.amax(dims), "closed", call.uses)
