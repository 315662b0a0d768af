"""Linear layers: a node per output neuron; after a flatten, an edge holds the weights of all positions of a channel."""

from __future__ import annotations

import torch
from torch import nn

from gmn.convert import Call, Converter, Flow, register_converter
from gmn.errors import ConversionError


@register_converter(nn.Linear)
class LinearConverter(Converter):
    """Weight [out, channels * positions] as a block [1, out, channels, positions]."""

    def encode(self, call: Call) -> Flow:
        """Find the channels of a flattened input: equal numbers of neighbouring positions carry the same node."""
        linear, flow = call.module, call.flows[0]
        assert isinstance(linear, nn.Linear)
        features = flow.channels(-1)
        source, counts = torch.unique_consecutive(features, return_counts=True)
        positions = int(counts[0])
        if not bool((counts == positions).all()):
            raise ConversionError("the channels of a flattened input are interleaved", where=call.name)
        nodes = call.builder.add_nodes(call.name, linear.out_features, "linear", source)
        shape = (1, linear.out_features, len(source), positions)
        call.builder.add_weight(f"{call.name}.weight", source, nodes, shape=shape, kernel=(positions,))
        if linear.bias is not None:
            call.builder.attach_or_fail(nodes, {"bias": f"{call.name}.bias"})
        return call.output(call.builder.ids(nodes), -1, "raw")
