"""Norms: features of the channels they follow, or nodes of their own where others read those channels too."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gmn.builder import Group
from gmn.flow import Flow
from gmn.rules import Call, Converter, Parameters, register_converter, register_function

_STATISTICS = ("running_mean", "running_var")
Values = dict[str, Tensor | None]


@register_converter(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
@register_converter(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class BatchNormConverter(Converter):
    """Weight, bias, running mean and variance as four node features, as far as the norm has them."""

    def encode(self, call: Call) -> Flow | None:
        """Channels along the axis after the batch."""
        assert isinstance(call.module, _NormBase)
        values = {key: getattr(call.module, key) for key in ("weight", "bias", *_STATISTICS)}
        return normalise(call, call.module.num_features, values, 1)


@register_converter(nn.GroupNorm)
class GroupNormConverter(Converter):
    """Weight and bias; the channels of several groups must stay, or the groups would mix others."""

    def encode(self, call: Call) -> Flow | None:
        """Channels along the axis after the batch."""
        norm = call.module
        assert isinstance(norm, nn.GroupNorm)
        if norm.num_groups > 1:
            call.freeze(f"group norm {call.name}")
        return normalise(call, norm.num_channels, {"weight": norm.weight, "bias": norm.bias}, 1)


@register_converter(nn.LayerNorm, nn.RMSNorm)
class LayerNormConverter(Converter):
    """Weight and bias over the channels, which lie last; subclasses for images may have them after the batch."""

    def encode(self, call: Call) -> Flow | None:
        """None for a norm over several axes at once: its weight has no single channel."""
        norm = call.module
        assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
        if len(norm.normalized_shape) != 1:
            return None
        if norm.weight is None:
            call.freeze(f"{call.name} has their number written in it")
        values = {"weight": norm.weight, "bias": getattr(norm, "bias", None)}
        return normalise(call, norm.normalized_shape[0], values, -1, 1)


@register_function("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
def functional(call: Call) -> Flow | None:
    """The same for a norm that is called as a function, on parameters of the model."""
    name = call.op
    schema = getattr(call.func, "_schema", None)  # an exported call has its arguments in another order
    names = tuple(argument.name for argument in schema.arguments[1:]) if schema else _SIGNATURES[name]
    given = dict(zip(names, call.args[1:], strict=False)) | call.kwargs
    values: Values = {}
    for key in ("weight", "bias", *_STATISTICS):
        value = given.get(key)
        if isinstance(value, Parameters):
            if value.origin is None:
                return None
            values[key] = call.builder.tensor(value.origin)
    axis = -1 if name in ("layer_norm", "rms_norm") else 1
    if name == "group_norm" and given.get("num_groups", 1) > 1:
        call.freeze(f"group norm in {call.name}")
    if axis == -1 and len(given["normalized_shape"]) != 1:
        return None
    return normalise(call, call.flows[0].ids.shape[axis], values, axis)


_SIGNATURES = {
    "batch_norm": ("running_mean", "running_var", "weight", "bias"),
    "instance_norm": ("running_mean", "running_var", "weight", "bias"),
    "layer_norm": ("normalized_shape", "weight", "bias"),
    "rms_norm": ("normalized_shape", "weight"),
    "group_norm": ("num_groups", "weight", "bias"),
}


def normalise(call: Call, size: int, values: Values, *axes: int) -> Flow | None:
    """Put a norm on the layer before it, if it alone reads that layer's output; else on nodes of its own."""
    flow, builder = call.flows[0], call.builder
    named = {f"norm.{key}": builder.name_of(value) for key, value in values.items() if value is not None}
    columns = {column: name for column, name in named.items() if name is not None}
    if len(columns) < len(named):
        return None  # computed numbers, not parameters of the model
    if not columns:
        return dataclasses.replace(flow, stage=_stage(call.module) if flow.stage == "raw" else "closed", uses=call.uses)
    axis = flow.channel_axis(*axes, size=size)
    if axis is None:
        return _beside(call, size, columns)
    channels = flow.channels(axis)
    if bool((channels < 0).any()):
        channels, _ = builder.read(flow, axis, call.name)
    return call.output(builder.ids(_home(call, flow, channels, columns)), axis, _stage(call.module))


def _home(call: Call, flow: Flow, channels: Tensor, columns: dict[str, str]) -> Group:
    """The nodes that take a norm's parameters."""
    builder = call.builder
    alone = flow.stage == "raw" and flow.uses == 1 and not call.shared
    layer = builder.whole_group(channels) if alone or builder.layout.norms == "stream" else None
    if layer is not None and builder.attach(layer, columns):
        return layer
    first = next(iter(columns.values()))
    layer = builder.layer_nodes(f"{first} norm", call.name, len(channels), "norm", channels)
    builder.add_identity(call.name, channels, builder.ids(layer), dense=False)
    builder.attach_or_fail(layer, columns)
    return layer


def _beside(call: Call, size: int, columns: dict[str, str]) -> Flow:
    """A norm over something else than all channels, such as each head's: nodes beside the data flow."""
    flow, builder = call.flows[0], call.builder
    nodes = builder.layer_nodes(f"{call.name} norm", call.name, size, "norm", None)
    builder.attach_or_fail(nodes, columns)
    builder.freeze(builder.ids(nodes), f"{call.name} normalises parts of the channels alike")
    builder.regroup(flow.nodes, f"normalised in parts by {call.name}")
    return flow.closed(call.uses)


def _stage(module: nn.Module) -> str:
    """`normed` right after a plain norm; a norm with an activation inside closes the layer."""
    acts = [m for m in module.children() if not isinstance(m, (nn.Identity, nn.Dropout))]
    return "closed" if acts else "normed"
