"""Attention: one node per head channel, its query, key and value weights three numbers on an edge (GMN, appendix G.1).

No module needs to be known by name: attention is recognised by what is computed. The channels of two activations are
multiplied (`converters.products`), the result weighs those of a third, and if all three come straight out of linear
layers, fused or separate, `gmn.assemble` makes one node of the k-th channels of the three.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmn.builder import Attention
from gmn.flow import Flow
from gmn.rules import Call, Converter, register_converter, register_function

from .products import multiply


@register_converter(nn.MultiheadAttention)
class MultiheadAttentionConverter(Converter):
    """`in_proj_weight` [3 d, d], or three weights of their own, and `out_proj`."""

    def encode(self, call: Call) -> Flow | None:
        """Channels along the last axis; the attention weights beside the output carry no channel."""
        module, builder, name = call.module, call.builder, call.name
        assert isinstance(module, nn.MultiheadAttention)
        inputs = [call.argument(i, key) for i, key in enumerate(("query", "key", "value"))]
        if not all(isinstance(flow, Flow) for flow in inputs):
            return None
        size = module.embed_dim
        sources = [builder.read(flow, -1, name)[0] for flow in inputs]
        group = builder.layer_nodes(f"{name} heads", name, 3 * size, "linear", torch.cat(sources))
        parts = builder.ids(group).view(3, size)
        _project(call, module, sources, parts)
        builder.attention.append(Attention(name, parts[0], parts[1], parts[2], module.num_heads))
        out = call.nodes(f"{name}.out_proj.weight".lstrip("."), size, "linear", parts[2])
        _matrix(call, module.out_proj.weight, parts[2], builder.ids(out))
        call.attach_bias(out, module.out_proj.bias)
        if module.in_proj_bias is not None:
            builder.attach_or_fail(group, {"bias": f"{name}.in_proj_bias"})
        return call.output(builder.ids(out), -1, "raw")


def _project(call: Call, module: nn.MultiheadAttention, sources: list[Tensor], parts: Tensor) -> None:
    """Edges into the head channels: of one packed weight if all three read the same."""
    size, packed = parts.shape[1], module.in_proj_weight
    if packed is not None and all(torch.equal(source, sources[0]) for source in sources):
        _matrix(call, packed, sources[0], parts.flatten())
        return
    own = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    for index, (source, part) in enumerate(zip(sources, parts, strict=True)):
        rows = None if packed is None else torch.arange(index * size, (index + 1) * size)
        _matrix(call, own[index] if packed is None else packed, source, part, rows)


def _matrix(call: Call, weight: Tensor | None, src: Tensor, dst: Tensor, rows: Tensor | None = None) -> None:
    name = call.builder.name_of(weight)
    assert weight is not None
    assert name is not None
    call.builder.add_weight(name, src, dst, shape=(1, weight.shape[0], weight.shape[1], 1), kernel=(1,), rows=rows)


@register_function("scaled_dot_product_attention")
def attend(call: Call) -> Flow | None:
    """softmax(q k^T) v, over [..., heads, positions, channels]."""
    query, key, value = (call.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    if not all(isinstance(flow, Flow) for flow in (query, key, value)):
        return None
    mask = call.argument(3, "attn_mask")
    if isinstance(mask, Flow):
        call.builder.freeze(mask.nodes, f"added to attention scores in {call.name}")
    batch = "abcdefgh"[: query.ids.dim() - 2]
    shape = (*query.ids.shape[:-1], key.ids.shape[-2])
    scores = multiply(call, (query, batch + "xz"), (key, batch + "yz"), batch + "xy", shape)
    return multiply(call, (scores, batch + "xy"), (value, batch + "yz"), batch + "xz", call.shape)
