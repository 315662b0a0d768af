"""Convolutions: a node per output channel, an edge per kernel; groups become pieces of the block."""

from __future__ import annotations

import torch
from torch import nn

from gmn.convert import Call, Converter, Flow, register_converter


@register_converter(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvConverter(Converter):
    """Weight [out, in / groups, *kernel] as a block [groups, out / groups, in / groups, kernel taps]."""

    def encode(self, call: Call) -> Flow:
        """Channels lie along the axis after the batch, also without a batch axis."""
        conv, flow = call.module, call.flows[0]
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        axis = flow.ids.dim() - 1 - len(conv.kernel_size)
        source = flow.channels(axis)
        nodes = call.builder.add_nodes(call.name, conv.out_channels, "conv", source)
        groups, taps = conv.groups, torch.Size(conv.kernel_size).numel()
        shape = (groups, conv.out_channels // groups, conv.in_channels // groups, taps)
        call.builder.add_weight(f"{call.name}.weight", source, nodes, shape=shape, kernel=tuple(conv.kernel_size))
        if conv.bias is not None:
            call.builder.attach_or_fail(nodes, {"bias": f"{call.name}.bias"})
        return call.output(call.builder.ids(nodes), axis, "raw")
