"""Batch norms: features of the channels they follow, or nodes of their own where several norms read one channel."""

from __future__ import annotations

from torch import nn

from gmn.convert import Call, Converter, Flow, register_converter


@register_converter(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormConverter(Converter):
    """Weight, bias, running mean and variance as four node features."""

    def encode(self, call: Call) -> Flow:
        """Merge into the layer before, if nothing else reads that layer's output; else join by identity edges."""
        norm, flow, builder = call.module, call.flows[0], call.builder
        assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        axis = 1
        channels = flow.channels(axis)
        tensors = {
            "weight": norm.weight,
            "bias": norm.bias,
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
        }
        values = {f"norm.{key}": f"{call.name}.{key}" for key, value in tensors.items() if value is not None}
        layer = builder.whole_group(channels) if flow.stage == "raw" and flow.uses == 1 else None
        if layer is None or not builder.attach(layer, values):
            layer = builder.group_of(builder.join(call.name, channels, "norm"))
            builder.attach_or_fail(layer, values)
        return call.output(builder.ids(layer), axis, "normed")
