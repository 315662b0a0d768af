"""Convolutions: a node per output channel, an edge per kernel; groups and depthwise kernels are pieces of the block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmn.flow import Flow
from gmn.rules import Call, Converter, Parameters, register_converter, register_function


@register_converter(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvConverter(Converter):
    """Weight [out, in / groups, *kernel] as a block [groups, out / groups, in / groups, kernel taps]."""

    def encode(self, call: Call) -> Flow | None:
        """Channels lie along the axis after the batch, also without a batch axis."""
        conv = call.module
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return convolve(call, conv.weight, conv.bias, conv.groups, gain=getattr(conv, "gain", None))


@register_converter(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvConverter(Converter):
    """Weight [in, out / groups, *kernel] as a block [groups, out / groups, in / groups, kernel taps]."""

    def encode(self, call: Call) -> Flow | None:
        """As for a convolution, with input and output channels the other way round in the weight."""
        conv = call.module
        assert isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        return convolve(call, conv.weight, conv.bias, conv.groups, transposed=True)


@register_function("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def functional(call: Call) -> Flow | None:
    """The same for a convolution that is called as a function, on parameters of the model."""
    flow, weight, bias = call.args[0], call.argument(1, "weight"), call.argument(2, "bias")
    transposed = "transpose" in call.op
    groups = call.argument(6, "groups", 1)  # after stride, padding, dilation or output padding
    if not isinstance(flow, Flow) or not isinstance(weight, Parameters):
        return _filter(call)
    if weight.origin is None or call.builder.tensor(weight.origin).shape != weight.shape:
        return _filter(call)
    tensors = [call.builder.tensor(p.origin) if p and p.origin else None for p in (weight, bias)]
    return convolve(call, tensors[0], tensors[1], groups, transposed=transposed)


def _filter(call: Call) -> Flow | None:
    """A fixed filter on each channel, such as a blur: the channels stay, and must stay."""
    flow = call.args[0]
    own = [name for p in call.parameters for name in p.names if name in call.builder.params]
    if own or not isinstance(flow, Flow) or len(call.shape) != flow.ids.dim() or call.shape[1] != flow.ids.shape[1]:
        return None
    call.freeze(f"meets a fixed filter in {call.name or 'the network'}")
    channels = flow.aligned(1)
    return None if channels is None else call.output(channels, 1)


def convolve(
    call: Call,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    *,
    transposed: bool = False,
    gain: Tensor | None = None,
) -> Flow | None:
    """Nodes and edges of a convolution; None if its weight is no parameter of the model.

    `gain`: one factor per output channel, as a convolution with standardised weights has.
    """
    name = call.builder.name_of(weight)
    if weight is None or name not in call.builder.params:
        return None
    flow, kernel = call.flows[0], tuple(weight.shape[2:])
    axis, taps = flow.ids.dim() - 1 - len(kernel), torch.Size(kernel).numel()
    source, mixes = call.builder.read(flow, axis, name)
    if mixes and taps > 1:
        call.builder.freeze(flow.nodes, f"convolved in their order by {call.name}")
    first, second = weight.shape[0] // groups, weight.shape[1]
    out = groups * second if transposed else weight.shape[0]
    nodes = call.nodes(name, out, "conv", source)
    perm = (0, 2, 1, 3) if transposed else (0, 1, 2, 3)
    call.builder.add_weight(name, source, nodes, shape=(groups, first, second, taps), kernel=kernel, perm=perm)
    call.attach_bias(nodes, bias)
    factor = call.builder.name_of(gain)
    if gain is not None and factor is not None and gain.numel() == out:
        call.builder.attach(nodes, {"scale": factor})
    return call.mixed(flow, nodes, axis) if mixes else call.output(call.builder.ids(nodes), axis, "raw")
