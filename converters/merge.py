"""Operations that bring activations together: residual additions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmn.builder import Builder
from gmn.convert import Call, Flow, register_function
from gmn.errors import ConversionError


@register_function("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__")
def add(call: Call) -> Flow | None:
    """A residual is an edge into the layer it is added to; adding a constant adds no edge."""
    flows = call.flows
    if len(flows) == 1:
        call.freeze_beside_constants()
        return Flow(flows[0].ids.expand(call.shape), "closed", call.uses)
    if tuple(flows[0].ids.shape) != tuple(flows[1].ids.shape):
        return None
    if torch.equal(flows[0].ids, flows[1].ids):  # x + x
        return Flow(flows[0].ids, "closed", call.uses)
    axis = _common_axis(flows)
    nodes = _add(call.builder, call.name, flows, [flow.channels(axis) for flow in flows])
    return call.output(nodes, axis, "summed")


def _common_axis(flows: list[Flow]) -> int:
    """The axis along which both activations carry their channels."""
    for axis in range(flows[0].ids.dim()):
        try:
            if all(len(flow.channels(axis).unique()) > 1 or flow.ids.shape[axis] == 1 for flow in flows):
                return axis
        except ConversionError:
            continue
    raise ConversionError("the two sides of an addition carry their channels along different axes")


def _add(builder: Builder, name: str, flows: list[Flow], channels: list[Tensor]) -> Tensor:
    """Nodes of a sum: those of the deeper weight layer, if one side is a layer that nothing else reads."""
    layers = [
        builder.whole_group(nodes) if flow.stage != "closed" and flow.uses == 1 else None
        for flow, nodes in zip(flows, channels, strict=True)
    ]
    depths = [layer.depth if layer else -math.inf for layer in layers]
    main = depths.index(max(depths))  # the first operand where both are equally deep
    layer, branch, other = layers[main], layers[1 - main], channels[1 - main]
    if layer is None:
        layer = builder.group_of(builder.join(f"{name}.add", channels[0]))
        builder.add_identity(f"{name}.residual", channels[1], layer, dense=False)
        return builder.ids(layer)
    merged = branch is not None and flows[1 - main].stage != "summed" and builder.absorb(branch, layer)
    if not merged:
        builder.add_identity(f"{name}.residual", other, layer, dense=builder.layout.identities == "dense")
    return builder.ids(layer)
