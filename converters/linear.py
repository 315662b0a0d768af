"""Linear layers and embeddings: a node per output neuron; an edge holds the weights of all positions of a channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmn.address import Shape4
from gmn.flow import Flow
from gmn.rules import Call, Converter, Parameters, register_converter, register_function


@register_converter(nn.Linear)
class LinearConverter(Converter):
    """Weight [out, channels * positions] as a block [1, out, channels, positions]."""

    def encode(self, call: Call) -> Flow | None:
        """Read the channels along the last axis."""
        assert isinstance(call.module, nn.Linear)
        return project(call, call.module.weight, call.module.bias)


@register_function("linear")
def functional(call: Call) -> Flow | None:
    """The same for a linear layer that is called as a function, on parameters of the model."""
    flow, weight, bias = call.args[0], call.argument(1, "weight"), call.argument(2, "bias")
    if not isinstance(flow, Flow) or not isinstance(weight, Parameters) or weight.origin is None:
        return None
    matrix = call.builder.tensor(weight.origin)
    shift = call.builder.tensor(bias.origin) if isinstance(bias, Parameters) and bias.origin else None
    stored = weight.shape[::-1] if weight.flipped else weight.shape
    return project(call, matrix, shift, transposed=weight.flipped) if tuple(matrix.shape) == stored else None


def project(call: Call, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> Flow | None:
    """Nodes and edges of a linear layer, [out, in] or [in, out]; None if its weight is no parameter of the model."""
    name = call.builder.name_of(weight)
    if name not in call.builder.params:
        return None
    flow = call.flows[0]
    features, mixes = call.builder.read(flow, -1, name)
    out = weight.shape[1 if transposed else 0]
    source, shape, perm, positions = _pattern(features, out)
    if transposed:  # the weight has the output channels last
        source, shape, perm, positions = features, (1, len(features), out, 1), (0, 2, 1, 3), 1
    nodes = call.nodes(name, out, "linear", source)
    call.builder.add_weight(name, source, nodes, shape=shape, kernel=(positions,), perm=perm)
    call.attach_bias(nodes, bias)
    return call.mixed(flow, nodes, -1) if mixes else call.output(call.builder.ids(nodes), -1, "raw")


def _pattern(features: Tensor, out: int) -> tuple[Tensor, Shape4, Shape4, int]:
    """Source channels, shape, permutation and positions: a flattened input repeats each channel once per position."""
    source, counts = torch.unique_consecutive(features, return_counts=True)
    inner = int(counts[0])
    if bool((counts == inner).all()) and len(source.unique()) == len(source):
        return source, (1, out, len(source), inner), (0, 1, 2, 3), inner
    repeats = (features == features[0]).sum()
    if len(features) % int(repeats) == 0:  # all channels of the first position, then of the second, ...
        table = features.view(int(repeats), -1)
        if bool((table == table[0]).all()):
            return table[0], (1, out, *table.shape), (0, 1, 3, 2), int(repeats)  # type: ignore[return-value]
    return features, (1, out, len(features), 1), (0, 1, 2, 3), 1


@register_converter(nn.Embedding, nn.EmbeddingBag)
class EmbeddingConverter(Converter):
    """Weight [entries, channels] as a block [1, channels, entries, 1]: each entry is an input node."""

    def encode(self, call: Call) -> Flow | None:
        """The entries make nodes of their own: an index picks one of them."""
        assert isinstance(call.module, (nn.Embedding, nn.EmbeddingBag))
        weight, builder = call.module.weight, call.builder
        name = builder.name_of(weight)
        if name not in builder.params:
            return None
        entries, size = weight.shape
        source = builder.layer_nodes(f"{name} rows", f"{call.name}.entries".lstrip("."), entries, "input", None)
        nodes = builder.layer_nodes(f"{name} columns", call.name, size, "linear", builder.ids(source))
        builder.freeze(builder.ids(source), f"entries of the embedding {call.name}")
        builder.add_weight(
            name, builder.ids(source), nodes, shape=(1, entries, size, 1), kernel=(1,), perm=(0, 2, 1, 3)
        )
        return call.output(builder.ids(nodes), -1, "raw")
