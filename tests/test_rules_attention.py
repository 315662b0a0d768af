"""Contract of the rules for attention.

* However attention is written, the k-th query, key and value channels are one node, and their weights one edge of three
  numbers: query, key, value. The output layer reads that node.
* The channels of a head go together, and `spec.heads` says how many heads there are.
* Where the three are not all straight out of linear layers, or of unequal number, each keeps its own nodes.
* Network to graph to network is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reading import Made, blocks, check, column, free, groups, learnt, reasons, scrambled, sizes, together
from torch import Tensor, nn

from gmn.graph import NetworkGraph
from gmn.groups import couplings

HEADS, WIDTH = 4, 2  # of the networks below: four heads of two channels
SIZE = HEADS * WIDTH
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(5))
Y = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(6))
Three = tuple[Tensor, Tensor, Tensor]


def merged(graph: NetworkGraph, name: str = "qkv") -> Tensor:
    """[SIZE, inputs, 3] of the attention block, after checking that its channels are one per head and frozen."""
    nodes = groups(graph)[name]
    assert len(nodes) == SIZE
    assert graph.spec.heads == (((nodes.start, SIZE), HEADS),)
    channel = couplings(graph.spec).channel[nodes.start : nodes.stop].view(HEADS, WIDTH)
    assert torch.equal(channel, channel[:, :1].expand(HEADS, WIDTH))
    assert len(channel[:, 0].unique()) == HEADS
    assert any(why.startswith("no surgery for the heads of") for why in reasons(graph, name))
    (found,) = [e for b, e in zip(graph.spec.blocks, graph.edge_features, strict=True) if b.dst[0] == nodes.start]
    assert next(b.kernel for b in graph.spec.blocks if b.dst[0] == nodes.start) == (3,)
    assert next(group.kind for group in graph.spec.groups if group.start == nodes.start) == "attention"
    return found[0]


def biases(graph: NetworkGraph, name: str = "qkv") -> Tensor:
    """[3, SIZE]."""
    return torch.stack([column(graph, name, f"{role}.bias") for role in "qkv"])


# nn.MultiheadAttention


def attended(module: nn.MultiheadAttention, *inputs: int, need: bool = True) -> nn.Module:
    """The attention alone, reading these of its inputs as query, key and value, then a linear layer."""
    return scrambled(
        Made(
            lambda m, *x: m.out(m.mha(*(x[i] for i in inputs), need_weights=need)[0]),
            mha=module,
            out=nn.Linear(module.embed_dim, 2),
        )
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need", [True, False])
def test_packed_self_attention(bias: bool, batch_first: bool, need: bool) -> None:
    model = attended(nn.MultiheadAttention(SIZE, HEADS, bias=bias, batch_first=batch_first), 0, 0, 0, need=need)
    graph = check(model, torch.randn(2, 5, SIZE))
    assert sizes(graph) == {"input": SIZE, "mha": SIZE, "mha#2": SIZE, "out": 2}
    assert blocks(graph) == [
        ("mha.in_proj_weight", "input", "mha", (1, SIZE, SIZE, 3)),
        ("mha.out_proj.weight", "mha", "mha#2", (1, SIZE, SIZE, 1)),
        ("out.weight", "mha#2", "out", (1, 2, SIZE, 1)),
    ]
    assert torch.equal(merged(graph, "mha").permute(2, 0, 1), model.mha.in_proj_weight.view(3, SIZE, SIZE))
    if bias:
        assert torch.equal(biases(graph, "mha"), model.mha.in_proj_bias.view(3, SIZE))
        assert torch.equal(column(graph, "mha#2", "bias"), model.mha.out_proj.bias)
    else:
        assert not biases(graph, "mha").any()


def test_packed_cross_attention() -> None:
    graph = check(model := attended(nn.MultiheadAttention(4, 2, batch_first=True), 0, 1, 1), (X, Y))
    assert blocks(graph)[:2] == [
        ("mha.in_proj_weight", "input", "mha", (1, 4, 4, 3)),
        ("mha.in_proj_weight", "input#2", "mha", (1, 4, 4, 3)),
    ]
    weight = model.mha.in_proj_weight.view(3, 4, 4)
    query, rest = graph.edge_features[0][0], graph.edge_features[1][0]
    assert torch.equal(query[..., 0], weight[0])
    assert not query[..., 1:].any()
    assert torch.equal(rest[..., 1:], weight[1:].permute(1, 2, 0))
    assert not rest[..., 0].any()


def test_keys_and_values_of_other_widths() -> None:
    module = nn.MultiheadAttention(SIZE, HEADS, kdim=4, vdim=5, batch_first=True)
    model = attended(module, 0, 1, 2)
    graph = check(model, (torch.randn(2, 3, SIZE), X, torch.randn(2, 5, 5)))
    found = {name: (source, target, shape) for name, source, target, shape in blocks(graph)}
    assert found["mha.q_proj_weight"] == ("input", "mha", (1, SIZE, SIZE, 3))
    assert found["mha.k_proj_weight"] == ("input#2", "mha", (1, SIZE, 4, 3))
    assert found["mha.v_proj_weight"] == ("input#3", "mha", (1, SIZE, 5, 3))
    for tap, role in enumerate("qkv"):
        block = graph.edge_features[tap][0]
        assert torch.equal(block[..., tap], getattr(module, f"{role}_proj_weight"))
        assert int(block.count_nonzero()) == block[..., tap].numel()
    assert graph.spec.heads == (((groups(graph)["mha"].start, SIZE), HEADS),)


def test_extra_keys_are_carried() -> None:
    model = attended(nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), 0, 0, 0)
    graph = check(model, X, carried=("mha.bias_k", "mha.bias_v"))
    assert "  carried: mha.bias_k [1, 1, 4]" in graph.summary()
    assert {"no surgery for MultiheadAttention mha"} <= reasons(graph, "mha")


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=norm_first)
    graph = check(scrambled(nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))), X)
    assert free(graph) == {"1.linear1"}
    assert graph.spec.edge_kinds == {"1": 1, "3": 3}
    stream = {"0", "1.self_attn#2", "1.linear2", "1.norm1", "1.norm2"}
    assert {"0", *together(graph, "0")} == stream - ({"1.norm2"} if norm_first else set()) | (
        {"1.norm2"} if norm_first else stream & {"1.norm2"}
    )


def test_a_decoder_layer_reads_two_streams() -> None:
    layer = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)
    graph = check(scrambled(Made(lambda m, x, y: m.out(m.layer(x, y)), layer=layer, out=nn.Linear(4, 2))), (X, Y))
    assert [heads for _, heads in graph.spec.heads] == [2, 2]
    assert free(graph) == {"layer.linear1"}


# Written by hand


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjd->bhid", F.softmax(scores, dim=-1), v)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    scores = torch.softmax(torch.bmm(flat[0], flat[1].mT), dim=-1)
    return torch.bmm(scores, flat[2]).view(q.shape)


def roles_first(y: Tensor) -> Three:
    return y.view(2, -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


def heads_first(y: Tensor) -> Three:
    return y.view(2, -1, HEADS, 3, WIDTH).permute(3, 0, 2, 1, 4).unbind(0)  # type: ignore[return-value]


def heads_first_chunked(y: Tensor) -> Three:
    return y.view(2, -1, HEADS, 3 * WIDTH).transpose(1, 2).chunk(3, -1)  # type: ignore[return-value]


def split(y: Tensor) -> Tensor:
    return y.view(2, -1, HEADS, WIDTH).transpose(1, 2)


def chunked(y: Tensor) -> Three:
    return tuple(split(part) for part in y.chunk(3, -1))  # type: ignore[return-value]


def gather(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(2, -1, SIZE)


@pytest.mark.parametrize("attend", [flash, plain, letters, batched])
@pytest.mark.parametrize(
    ("parts", "view"),
    [
        (roles_first, (3, HEADS, WIDTH)),
        (heads_first, (HEADS, 3, WIDTH)),
        (heads_first_chunked, (HEADS, 3, WIDTH)),
        (chunked, (3, HEADS, WIDTH)),
    ],
)
def test_a_fused_projection(attend: Callable[..., Tensor], parts: Callable[..., Three], view: tuple[int, ...]) -> None:
    model = Made(
        lambda m, x: m.out(gather(attend(*parts(m.qkv(x))))), qkv=nn.Linear(4, 3 * SIZE), out=nn.Linear(SIZE, 2)
    )
    graph = check(scrambled(model), X)
    assert blocks(graph) == [
        ("qkv.weight", "input", "qkv", (1, SIZE, 4, 3)),
        ("out.weight", "qkv", "out", (1, 2, SIZE, 1)),
    ]
    axis = view.index(3)
    assert torch.equal(
        merged(graph).permute(2, 0, 1), model.qkv.weight.view(*view, 4).movedim(axis, 0).reshape(3, SIZE, 4)
    )
    assert torch.equal(biases(graph), model.qkv.bias.view(view).movedim(axis, 0).reshape(3, SIZE))


@pytest.mark.parametrize("attend", [flash, plain])
@pytest.mark.parametrize("bias", [True, False])
def test_separate_projections(attend: Callable[..., Tensor], bias: bool) -> None:
    layers = {role: nn.Linear(4, SIZE, bias=bias) for role in "qkv"}
    model = Made(
        lambda m, x: m.out(gather(attend(split(m.q(x)), split(m.k(x)), split(m.v(x))))),
        **layers,
        out=nn.Linear(SIZE, 2),
    )
    graph = check(scrambled(model), X)
    assert sizes(graph) == {"input": 4, "v": SIZE, "out": 2}
    assert torch.equal(merged(graph, "v").permute(2, 0, 1), torch.stack([layers[role].weight for role in "qkv"]))
    if bias:
        assert torch.equal(biases(graph, "v"), torch.stack([layers[role].bias for role in "qkv"]))


def test_a_learnt_bias_on_the_scores_is_carried() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = chunked(m.qkv(x))
        return m.out(gather((q @ k.mT + m.table).softmax(-1) @ v))

    model = scrambled(Made(run, qkv=nn.Linear(4, 3 * SIZE), out=nn.Linear(SIZE, 2), table=learnt(HEADS, 5, 5)))
    graph = check(model, X, carried=("table",))
    assert torch.equal(merged(graph).permute(2, 0, 1).flatten(0, 1), model.qkv.weight)


def test_cross_attention_with_a_fused_key_and_value() -> None:
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        q = split(m.q(x))
        k, v = (split(part) for part in m.kv(y).chunk(2, -1))
        return m.out(gather(flash(q, k, v)))

    model = scrambled(Made(run, q=nn.Linear(4, SIZE), kv=nn.Linear(4, 2 * SIZE), out=nn.Linear(SIZE, 2)))
    graph = check(model, (X, Y))
    assert blocks(graph) == [
        ("q.weight", "input", "kv", (1, SIZE, 4, 3)),
        ("kv.weight", "input#2", "kv", (1, SIZE, 4, 3)),
        ("out.weight", "kv", "out", (1, 2, SIZE, 1)),
    ]
    assert torch.equal(graph.edge_features[0][0, ..., 0], model.q.weight)
    assert torch.equal(graph.edge_features[1][0, ..., 1:].permute(2, 0, 1).flatten(0, 1), model.kv.weight)


def test_norms_of_each_head_stand_beside_it() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = roles_first(m.qkv(x))
        return m.out(gather(flash(m.q_norm(q), m.k_norm(k), v)))

    norms = {"q_norm": nn.LayerNorm(WIDTH), "k_norm": nn.RMSNorm(WIDTH)}
    model = scrambled(Made(run, qkv=nn.Linear(4, 3 * SIZE), out=nn.Linear(SIZE, 2), **norms))
    graph = check(model, X)
    assert torch.equal(merged(graph).permute(2, 0, 1).flatten(0, 1), model.qkv.weight)
    for name, norm in norms.items():
        assert torch.equal(column(graph, name, "norm.weight"), norm.weight)
        assert f"{name} normalises parts of the channels alike" in reasons(graph, name)


def test_fewer_key_and_value_heads_keep_their_own_nodes() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        k, v = (m_(x).view(2, -1, 2, WIDTH).transpose(1, 2).repeat_interleave(2, 1) for m_ in (m.k, m.v))
        q = m.q(x).view(2, -1, 4, WIDTH).transpose(1, 2)
        return m.out(flash(q, k, v).transpose(1, 2).flatten(2))

    layers = {"q": nn.Linear(4, 8), "k": nn.Linear(4, 4), "v": nn.Linear(4, 4)}
    model = scrambled(Made(run, **layers, out=nn.Linear(8, 2)))
    graph = check(model, X)
    assert sizes(graph) == {"input": 4, "q": 8, "k": 4, "v": 4, "out": 2}
    for name, layer in layers.items():
        (found,) = [
            e for b, e in zip(graph.spec.blocks, graph.edge_features, strict=True) if b.name == f"{name}.weight"
        ]
        assert torch.equal(found[0, :, :, 0], layer.weight)
    assert graph.spec.heads == ()
    assert free(graph) == set()


@pytest.mark.parametrize("columns", ["cnn", "resnet50"])
def test_a_layout_without_places_for_three_biases_keeps_the_three_apart(columns: str) -> None:
    model = Made(
        lambda m, x: m.out(gather(flash(*chunked(m.qkv(x))))), qkv=nn.Linear(4, 3 * SIZE), out=nn.Linear(SIZE, 2)
    )
    graph = check(scrambled(model), X, layout=columns)
    assert sizes(graph) == {"input": 4, "qkv": 3 * SIZE, "out": 2}
    assert graph.spec.heads == ()
    assert free(graph) == set()
    channel = couplings(graph.spec).channel[4 : 4 + 3 * SIZE].view(3, SIZE)
    assert torch.equal(channel[0], channel[1])
    assert not torch.isin(channel[0], channel[2]).any()


# Attention over channels


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)


def normalised_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.softmax(-1), k.softmax(-2)
    return torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))


def cross_covariance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.mT, k.mT, v.mT
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (scores.softmax(-1) @ v).mT


@pytest.mark.parametrize("attend", [linear_attention, normalised_linear_attention, cross_covariance])
def test_attention_over_channels(attend: Callable[..., Tensor]) -> None:
    model = Made(
        lambda m, x: m.out(gather(attend(*chunked(m.qkv(x))))), qkv=nn.Linear(4, 3 * SIZE), out=nn.Linear(SIZE, 2)
    )
    graph = check(scrambled(model), X)
    assert torch.equal(merged(graph).permute(2, 0, 1).flatten(0, 1), model.qkv.weight)
    assert torch.equal(biases(graph).flatten(), model.qkv.bias)
    assert blocks(graph)[-1] == ("out.weight", "qkv", "out", (1, 2, SIZE, 1))


# Where it is easily wrong


def test_heads_may_lie_apart() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (part.view(2, -1, WIDTH, HEADS).permute(0, 3, 1, 2) for part in m.qkv(x).chunk(3, -1))
        return m.out(flash(q, k, v).permute(0, 2, 3, 1).flatten(2))

    graph = check(scrambled(Made(run, qkv=nn.Linear(4, 3 * SIZE), out=nn.Linear(SIZE, 2))), X)
    start = groups(graph)["qkv"].start
    channel = couplings(graph.spec).channel[start : start + SIZE].view(WIDTH, HEADS)
    assert torch.equal(channel, channel[:1].expand(WIDTH, HEADS))


def twice(*inputs: Any) -> Any:
    return lambda m, x, y=None: m.out(m.mha(m.mha(x, *[x if y is None else y] * 2)[0], *[x if y is None else y] * 2)[0])


def test_cross_attention_called_twice() -> None:
    model = Made(twice(), mha=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 2))
    check(scrambled(model), (X, Y))


def test_self_attention_called_twice() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        for _ in range(2):
            x = m.mha(x, x, x)[0]
        return m.out(x)

    model = scrambled(Made(run, mha=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 2)))
    graph = check(model, X)
    assert [name for name, *_ in blocks(graph)].count("mha.in_proj_weight") == 2
