"""Operations that bring two activations together: residual additions, gates, and per-channel parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gmn.builder import Builder
from gmn.flow import Flow
from gmn.rules import Call, Converter, Parameters, register_converter, register_function

from .pointwise import reduce


@register_function("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__")
def add(call: Call) -> Flow | None:
    """A residual is an edge into the layer it is added to; adding a constant adds no edge."""
    return _combine(call, "shift")


@register_function(
    *("mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__rtruediv__", "__itruediv__"),
    *("maximum", "minimum", "max", "min", "where", "lerp", "atan2"),
)
def gate(call: Call) -> Flow | None:
    """Channel times channel, such as a squeeze-and-excitation gate: they go together, as in a residual."""
    if call.op in ("max", "min") and len(call.flows) == 1:
        return reduce(call)  # along an axis, not of two activations
    return _combine(call, "scale")


@register_function("addcmul", "addcmul_")
def affine(call: Call) -> Flow | None:
    """shift + scale * x with parameters of one number per channel."""
    shift, scale, flow = call.args[0], call.argument(1, "tensor1"), call.argument(2, "tensor2")
    if not (isinstance(flow, Flow) and isinstance(scale, Parameters) and isinstance(shift, Parameters)):
        return None
    nodes = _per_channel(call, flow, {"scale": scale, "shift": shift})
    return nodes or _constant(call, flow)


@register_converter(nn.PReLU)
class PReLUConverter(Converter):
    """One slope per channel as a node feature; a single slope for all has no place and is carried through."""

    def encode(self, call: Call) -> Flow | None:
        """Channels along the axis after the batch."""
        assert isinstance(call.module, nn.PReLU)
        flow, weight = call.flows[0], call.module.weight
        name = call.builder.name_of(weight)
        if len(weight) == 1 or name is None:
            return flow.closed(call.uses)
        return _on_channels(call, flow, flow.channel_axis(1, size=len(weight)), {"slope": name}, own=True)


def _combine(call: Call, column: str) -> Flow | None:
    if not all(_broadcasts(tuple(flow.ids.shape), call.shape) for flow in call.flows):
        return None
    flows = [flow.closed(call.uses, flow.ids.expand(call.shape)) for flow in call.flows]
    if len(flows) == 1:
        others = call.parameters
        return (_per_channel(call, flows[0], {column: others[0]}) if others else None) or _constant(call, flows[0])
    if len(flows) != 2:
        return None
    call.freeze_beside_constants()
    first, second = flows
    if torch.equal(first.ids, second.ids):  # x + x, or x times its own sigmoid
        return first if first.scores else second
    if not len(first.nodes) or not len(second.nodes):  # an attention map, a position bias
        return _weaker(call, first, second)
    axis = _common_axis(first, second)
    if axis is None:
        return _unequal(call, first, second)
    nodes = _merge(call, axis, additive=column == "shift")
    return call.output(nodes, axis, "summed" if column == "shift" else "closed")


def _weaker(call: Call, first: Flow, second: Flow) -> Flow:
    """One side carries no channel: the other's stay, but scores with a learnt bias are scores still."""
    empty, full = (second, first) if len(first.nodes) else (first, second)
    if empty.scores is None:
        return full
    call.builder.freeze(full.nodes, f"added to attention scores in {call.name}")
    return empty


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))


def _constant(call: Call, flow: Flow) -> Flow:
    """An activation beside something of fixed size."""
    call.freeze_beside_constants()
    return flow.closed(call.uses, flow.ids.expand(call.shape))


def _unequal(call: Call, first: Flow, second: Flow) -> Flow:
    """Channels of the two sides do not meet one to one: a gate of a single channel, or rotated pairs."""
    single = [flow for flow in (first, second) if len(flow.nodes) == 1]
    if single:
        call.builder.freeze(single[0].nodes, f"meets all channels in {call.name}")
        return second if single[0] is first else first
    for flow in (first, second):
        call.builder.regroup(flow.nodes, f"meets other channels in {call.name}")
    return first


def _common_axis(first: Flow, second: Flow) -> int | None:
    """The axis along which both activations carry their channels."""
    for axis in range(first.ids.dim()):
        channels = [flow.aligned(axis) for flow in (first, second)]
        if all(c is not None and (len(c[c >= 0].unique()) > 1 or len(c) == 1) for c in channels):
            return axis
    return None


# -- parameters with one number per channel --------------------------------------------------------------------------


def _per_channel(call: Call, flow: Flow, values: dict[str, Parameters]) -> Flow | None:
    """A layer scale: node features; None if the parameters are not one number per channel."""
    axis = flow.channel_axis(1, -1)
    if axis is None or tuple(flow.ids.shape) != call.shape:
        return None
    size, dims, names = call.shape[axis], len(call.shape), {}
    for column, value in values.items():
        shape = (1,) * (dims - len(value.shape)) + tuple(value.shape)
        if value.origin not in call.builder.params or shape != tuple(size if d == axis else 1 for d in range(dims)):
            return None
        names[column] = value.origin
    return _on_channels(call, flow, axis, names) if names else None


def _on_channels(call: Call, flow: Flow, axis: int | None, names: dict[str, str], *, own: bool = False) -> Flow | None:
    if axis is None or not set(names) <= set(call.builder.layout.columns):
        return None
    channels, builder = flow.channels(axis), call.builder
    layer = builder.whole_group(channels) if call.flows[0].uses == 1 else None
    if layer is None or not builder.attach(layer, names, own=own):
        name = next(iter(names.values()))
        layer = builder.layer_nodes(f"{name} channels", name, len(channels), "scale", channels)
        builder.add_identity(name, channels, builder.ids(layer), dense=False)
        builder.attach(layer, names, own=own)
    return call.output(builder.ids(layer), axis)


# -- sums and gates ---------------------------------------------------------------------------------------------------


def _merge(call: Call, axis: int, *, additive: bool) -> Tensor:
    """Nodes of a sum: those of the deeper weight layer, if one side is a layer that nothing else reads."""
    builder, flows = call.builder, call.flows
    expanded = [Flow(flow.ids.expand(call.shape)).channels(axis) for flow in flows]
    open_ = [flow.uses == 1 and (flow.stage != "closed" or not additive) for flow in flows]
    layers = [builder.whole_group(c) if o else None for c, o in zip(expanded, open_, strict=True)]
    depths = [layer.depth if layer else -math.inf for layer in layers]
    main = depths.index(max(depths))  # the first operand where both are equally deep
    layer, branch, other = layers[main], layers[1 - main], expanded[1 - main]
    if layer is None:
        layer = builder.join(f"{call.name}.{'add' if additive else 'gate'}", expanded[0])
        builder.add_identity(f"{call.name}.residual", expanded[1], builder.ids(layer), dense=False)
        return builder.ids(layer)
    absorbable = additive and branch is not None and flows[1 - main].stage in ("raw", "normed")
    if absorbable and branch is not None and builder.absorb(branch, layer):
        return builder.ids(layer)
    _residual(builder, call.name, other, builder.ids(layer), additive=additive)
    return builder.ids(layer)


def _residual(builder: Builder, name: str, src: Tensor, dst: Tensor, *, additive: bool) -> None:
    dense = additive and builder.layout.identities == "dense"
    builder.add_identity(f"{name}.{'residual' if additive else 'gate'}", src, dst, dense=dense)
