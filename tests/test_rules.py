"""Contract of the rules for convolutions, linear layers, embeddings and norms (`gmn.converters`).

* A weight is a block [G, O, I, K]: groups, output and input channels of a group, kernel taps; its numbers lie there.
* Biases and norms are node features; a norm whose channels others read too has nodes of its own.
* What mixes positions, or normalises parts of the channels, is in the graph, and must stay.
* What has no place is carried; network to graph to network is exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reading import Made, blocks, check, column, features, free, groups, learnt, reasons, scrambled, sizes, together
from torch import Tensor, nn

from gmn.convert import to_graph
from gmn.errors import ConversionError

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(5))


def line(*layers: nn.Module) -> nn.Sequential:
    """Layers in a row, with numbers that are nowhere trivial."""
    return scrambled(nn.Sequential(*layers))  # type: ignore[return-value]


# Convolutions


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kind", "dims"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_a_convolution(kind: Any, dims: int, groups: int) -> None:
    kernel = (3, 2, 1)[:dims]
    model = line(kind(4, 6, kernel, groups=groups), nn.ReLU(), kind(6, 2, 1))
    graph = check(model, torch.randn(2, 4, *[4] * dims))
    taps = torch.Size(kernel).numel()
    assert sizes(graph) == {"input": 4, "0": 6, "2": 2}
    assert blocks(graph) == [
        ("0.weight", "input", "0", (groups, 6 // groups, 4 // groups, taps)),
        ("2.weight", "0", "2", (1, 2, 6, 1)),
    ]
    assert graph.spec.blocks[0].kernel == kernel
    assert torch.equal(features(graph, "0.weight"), model[0].weight.view(groups, 6 // groups, 4 // groups, taps))
    assert torch.equal(column(graph, "0", "bias"), model[0].bias)
    assert free(graph) == ({"0"} if groups == 1 else set())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("kind", "dims"), [(nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)])
def test_a_transposed_convolution(kind: Any, dims: int, groups: int) -> None:
    kernel = (3, 2, 1)[:dims]
    model = line(kind(4, 8, kernel, groups=groups, stride=2), nn.ReLU())
    graph = check(model, torch.randn(2, 4, *[3] * dims))
    taps, out, into = torch.Size(kernel).numel(), 8 // groups, 4 // groups
    assert blocks(graph) == [("0.weight", "input", "0", (groups, out, into, taps))]
    found = features(graph, "0.weight")
    weight = model[0].weight.flatten(2)
    for source in range(4):
        for target in range(out):
            assert torch.equal(found[source // into, target, source % into], weight[source, target])
    assert torch.equal(column(graph, "0", "bias"), model[0].bias)
    assert together(graph, "0") == ({"input"} if groups == 4 and out == 1 else set())


def test_a_depthwise_convolution_couples_channel_by_channel() -> None:
    model = line(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    graph = check(model, IMAGES)
    assert torch.equal(features(graph, "1.weight"), model[1].weight.view(6, 1, 1, 9))
    assert together(graph, "0") == {"1"}
    assert free(graph) == {"0"}


@pytest.mark.parametrize("per", [1, 2])
def test_functional_convolutions_of_raw_parameters(per: int) -> None:
    model = scrambled(
        Made(
            lambda m, x: F.conv_transpose2d(F.conv2d(x, m.weight, m.bias, 1, 0, 1, per), m.back, groups=per),
            weight=learnt(6, 4 // per, 3, 3),
            bias=learnt(6),
            back=learnt(6, 2, 2, 2),
        )
    )
    graph = check(model, torch.randn(2, 4, 6, 6))
    assert [(name, shape) for name, _, _, shape in blocks(graph)] == [
        ("weight", (per, 6 // per, 4 // per, 9)),
        ("back", (per, 2, 6 // per, 4)),
    ]
    assert torch.equal(features(graph, "weight").flatten(), model.weight.flatten())
    assert torch.equal(graph.node_features[4:10, graph.spec.columns.index("bias")], model.bias)
    assert torch.equal(features(graph, "back")[per - 1, :, 0], model.back.flatten(2)[6 - 6 // per])
    assert free(graph) == set()


def test_a_computed_kernel_is_carried() -> None:
    model = scrambled(Made(lambda m, x: m.out(F.conv2d(x, m.w * 2)), w=learnt(6, 3, 1, 1), out=nn.Conv2d(6, 2, 1)))
    graph = check(model, IMAGES, carried=("w",))
    assert free(graph) == set()
    with pytest.raises(ConversionError, match=r"calls conv2d with the parameters w"):
        check(model, IMAGES, carried=("w",), on_unknown="error")


# Linear layers


def test_a_linear_layer_over_the_last_axis() -> None:
    model = line(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3, bias=False))
    graph = check(model, TOKENS)
    assert blocks(graph) == [("0.weight", "input", "0", (1, 6, 4, 1)), ("2.weight", "0", "2", (1, 3, 6, 1))]
    assert torch.equal(features(graph, "0.weight")[0, :, :, 0], model[0].weight)
    assert torch.equal(column(graph, "0", "bias"), model[0].bias)
    assert column(graph, "2", "bias").tolist() == [0.0] * 3
    assert free(graph) == {"0"}


def test_flattened_images_have_positions_last_and_flattened_tokens_first() -> None:
    images = line(nn.Conv2d(3, 5, 1), nn.Flatten(), nn.Linear(5 * 64, 4))
    graph = check(images, IMAGES)
    assert torch.equal(features(graph, "2.weight")[0], images[2].weight.view(4, 5, 64))
    tokens = line(nn.Linear(4, 6), nn.Flatten(), nn.Linear(6 * 5, 3))
    graph = check(tokens, TOKENS)
    assert torch.equal(features(graph, "2.weight")[0], tokens[2].weight.view(3, 5, 6).mT)
    assert blocks(graph)[1] == ("2.weight", "0", "2", (1, 3, 6, 5))


def test_flattened_tokens_may_be_pruned() -> None:
    assert free(check(line(nn.Linear(4, 6), nn.Flatten(), nn.Linear(6 * 5, 3)), TOKENS)) == {"0"}


def merged_patches(model: nn.Module, x: Tensor) -> Tensor:
    y = model.a(x)
    return model.b(torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1))


def test_patch_merging_is_one_block_of_four_positions() -> None:
    model = scrambled(Made(merged_patches, a=nn.Linear(3, 6), b=nn.Linear(24, 5)))
    graph = check(model, torch.randn(2, 4, 4, 3))
    assert blocks(graph)[1] == ("b.weight", "a", "b", (1, 5, 6, 4))
    assert torch.equal(features(graph, "b.weight")[0], model.b.weight.view(5, 4, 6).mT)
    assert free(graph) == {"a"}


@pytest.mark.parametrize(
    ("call", "shape", "flipped"),
    [
        (lambda m, x: m.b(F.relu(x @ m.w)), (4, 6), True),
        (lambda m, x: m.b(F.relu(torch.matmul(x, m.w.T))), (6, 4), False),
        (lambda m, x: m.b(F.relu(x @ m.w.transpose(0, 1))), (6, 4), False),
        (lambda m, x: m.b(F.relu(x @ m.w.t())), (6, 4), False),
        (lambda m, x: m.b(F.relu(F.linear(x, m.w))), (6, 4), False),
        (lambda m, x: m.b(F.relu(F.linear(x, m.w.mT))), (4, 6), True),
    ],
)
def test_products_with_a_matrix(call: Any, shape: tuple[int, int], flipped: bool) -> None:
    model = scrambled(Made(call, w=learnt(*shape), b=nn.Linear(6, 2)))
    graph = check(model, TOKENS)
    assert [shape for _, _, _, shape in blocks(graph)] == [(1, 6, 4, 1), (1, 2, 6, 1)]
    assert torch.equal(features(graph, "w")[0, :, :, 0], model.w.T if flipped else model.w)
    assert any("no surgery for Made" in why for _, why in graph.spec.frozen)


def mixed_tokens(model: nn.Module, x: Tensor) -> Tensor:
    y = model.a(x)
    return model.out(y + model.down(F.gelu(model.up(y.transpose(1, 2)))).transpose(1, 2))


def test_a_linear_layer_over_positions_leaves_the_channels_alone() -> None:
    model = scrambled(
        Made(mixed_tokens, a=nn.Linear(4, 6), up=nn.Linear(5, 7), down=nn.Linear(7, 5), out=nn.Linear(6, 3))
    )
    graph = check(model, TOKENS)
    found = {name: (source, target, shape) for name, source, target, shape in blocks(graph)}
    assert found["up.weight"] == ("up.weight.positions", "up", (1, 7, 5, 1))
    assert found["out.weight"] == ("a", "out", (1, 3, 6, 1))
    assert torch.equal(features(graph, "up.weight")[0, :, :, 0], model.up.weight)
    assert free(graph) == {"a"}
    for name in ("up", "down"):
        assert f"{name} mixes positions, not channels" in reasons(graph, name)


# Embeddings


def test_embeddings_have_a_node_per_entry() -> None:
    model = scrambled(
        Made(
            lambda m, x: m.out(m.words(x) + m.places(m.index)),
            words=nn.Embedding(7, 6),
            places=nn.Embedding(5, 6),
            out=nn.Linear(6, 2),
        )
    )
    model.register_buffer("index", torch.arange(5))
    graph = check(model, torch.tensor([[0, 1, 2, 3, 6]]))
    assert sizes(graph) == {"words.entries": 7, "words": 6, "places.entries": 5, "out": 2}
    assert blocks(graph) == [
        ("words.weight", "words.entries", "words", (1, 6, 7, 1)),
        ("places.weight", "places.entries", "words", (1, 6, 5, 1)),  # both end in the sum
        ("out.weight", "words", "out", (1, 2, 6, 1)),
    ]
    assert torch.equal(features(graph, "words.weight")[0, :, :, 0], model.words.weight.T)
    assert torch.equal(features(graph, "places.weight")[0, :, :, 0], model.places.weight.T)
    assert reasons(graph, "words.entries") >= {"entries of the embedding words"}
    assert graph.spec.buffers == ("index",)


def test_a_bag_of_embeddings() -> None:
    model = line(nn.EmbeddingBag(7, 6), nn.Linear(6, 2))
    graph = check(model, torch.tensor([[0, 1, 6], [2, 2, 3]]))
    assert torch.equal(features(graph, "0.weight")[0, :, :, 0], model[0].weight.T)
    assert blocks(graph)[1] == ("1.weight", "0", "1", (1, 2, 6, 1))


@pytest.mark.parametrize("first", ["embedding", "decoder"])
def test_a_decoder_with_the_weight_of_the_embedding(first: str) -> None:
    parts = {"embedding": nn.Embedding(7, 6), "decoder": nn.Linear(6, 7)}
    names = [first, *({"embedding", "decoder"} - {first})]
    model = Made(lambda m, x: m.decoder(F.relu(m.embedding(x))), **{name: parts[name] for name in names})
    model.decoder.weight = model.embedding.weight
    graph = check(scrambled(model), torch.tensor([[0, 1, 6]]))
    slots = [slot for slot in graph.spec.edge_slots if slot.param == f"{first}.weight"]
    assert [slot.home for slot in slots] == [True, False]
    assert [block[1:] for block in blocks(graph)] == [
        ("embedding.entries", "embedding", (1, 6, 7, 1)),
        ("embedding", "decoder", (1, 7, 6, 1)),
    ]
    assert torch.equal(graph.edge_features[0][0, :, :, 0].T, graph.edge_features[1][0, :, :, 0])
    assert torch.equal(column(graph, "decoder", "bias"), model.decoder.bias)
    assert free(graph) == set()
    assert f"{first}.weight is used in two ways" in reasons(graph, "decoder")


# Norms


class ImageLayerNorm(nn.LayerNorm):
    """Over the channels of images, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BatchNormAct(nn.BatchNorm2d):
    """With an activation inside."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def conv(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 1)


@pytest.mark.parametrize(
    ("model", "x", "stays"),
    [
        (line(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), TOKENS, None),
        (line(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2)), TOKENS, None),
        (line(conv(3, 6), ImageLayerNorm(6), conv(6, 2)), IMAGES, None),
        (line(conv(3, 6), nn.GroupNorm(1, 6), conv(6, 2)), IMAGES, None),
        (line(conv(3, 6), nn.GroupNorm(3, 6), conv(6, 2)), IMAGES, "group norm 1"),
        (line(conv(3, 6), nn.InstanceNorm2d(6, affine=True), conv(6, 2)), IMAGES, None),
        (
            line(conv(3, 6), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), conv(6, 2)),
            IMAGES,
            None,
        ),
        (line(conv(3, 6), nn.BatchNorm2d(6), conv(6, 2)), IMAGES, None),
        (line(conv(3, 6), BatchNormAct(6), conv(6, 2)), IMAGES, None),
        (line(nn.Conv1d(5, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 2, 1)), TOKENS, None),
        (line(conv(3, 6), nn.BatchNorm2d(6, affine=False), conv(6, 2)), IMAGES, None),
    ],
    ids=lambda value: type(value[1]).__name__ if isinstance(value, nn.Sequential) else "",
)
def test_a_norm_lies_on_the_layer_before_it(model: nn.Sequential, x: Tensor, stays: str | None) -> None:
    graph = check(model, x)
    assert sizes(graph) == {"input": len(groups(graph)["input"]), "0": 6, "2": 2}
    norm = model[1]
    for key in ("weight", "bias", "running_mean", "running_var"):
        if (value := getattr(norm, key, None)) is not None:
            assert torch.equal(column(graph, "0", f"norm.{key}"), value), key
    assert torch.equal(column(graph, "0", "bias"), model[0].bias)
    assert free(graph) == ({"0"} if stays is None else set())
    assert stays is None or stays in reasons(graph, "0")


@pytest.mark.parametrize(("norm", "merged"), [(nn.BatchNorm2d(6), True), (BatchNormAct(6), False)])
def test_a_norm_with_an_activation_inside_closes_its_layer(norm: nn.Module, merged: bool) -> None:
    parts = {"a": conv(3, 6), "norm": norm, "b": nn.Conv2d(3, 6, 1, bias=False), "out": conv(6, 2)}
    graph = check(scrambled(Made(lambda m, x: m.out(m.norm(m.a(x)) + m.b(x)), **parts)), IMAGES)
    assert sizes(graph) == {"input": 3, "a": 6, **({} if merged else {"b": 6}), "out": 2}
    assert [name for name, _, target, _ in blocks(graph) if target == "a"] == (
        ["a.weight", "b.weight"] if merged else ["a.weight"]
    )
    assert together(graph, "a") == (set() if merged else {"b"})
    assert free(graph) == {"a"}


def pre_norm(model: nn.Module, x: Tensor) -> Tensor:
    y = model.a(x)
    return model.out(y + model.b(model.norm(y)))


@pytest.mark.parametrize("layout", ["generic", "vit"])
def test_a_norm_of_channels_that_others_read_has_nodes_of_its_own(layout: str) -> None:
    model = scrambled(Made(pre_norm, a=nn.Linear(4, 6), norm=nn.LayerNorm(6), b=nn.Linear(6, 6), out=nn.Linear(6, 2)))
    graph = check(model, TOKENS, layout=layout)
    own = "norm" if layout == "generic" else "a"
    assert set(sizes(graph)) == {"input", "a", own, "b", "out"}
    assert torch.equal(column(graph, own, "norm.weight"), model.norm.weight)
    assert torch.equal(column(graph, own, "norm.bias"), model.norm.bias)
    assert together(graph, "a") == ({"norm", "b"} if layout == "generic" else {"b"})


def test_a_norm_over_several_axes_is_carried() -> None:
    model = line(conv(3, 6), nn.LayerNorm((6, 8, 8)), conv(6, 2))
    graph = check(model, IMAGES, carried=("1.weight", "1.bias"))
    assert free(graph) == set()
    assert "  carried: 1.weight [6, 8, 8]" in graph.summary()


def test_a_norm_over_several_axes_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"no rule for LayerNorm '1'"):
        to_graph(line(conv(3, 6), nn.LayerNorm((6, 8, 8)), conv(6, 2)), IMAGES, on_unknown="error")


def functional_norms(model: nn.Module, x: Tensor) -> Tensor:
    y = F.layer_norm(model.a(x), (6,), model.w, model.b)
    return model.out(F.rms_norm(y, (6,), model.v))


@pytest.mark.parametrize(
    "shared",
    [
        False,
        True,
    ],
)
def test_functional_norms_of_raw_parameters(shared: bool) -> None:
    model = Made(functional_norms, a=nn.Linear(4, 6), out=nn.Linear(6, 2), w=learnt(6), b=learnt(6))
    model.v = model.w if shared else learnt(6)
    graph = check(scrambled(model), TOKENS)
    assert torch.equal(column(graph, "a", "norm.weight"), model.w)
    assert torch.equal(column(graph, "a", "norm.bias"), model.b)
    assert free(graph) == set()


def test_functional_batch_norm_of_raw_parameters() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = F.batch_norm(m.a(x), m.running_mean, m.running_var, m.w, m.b)
        return m.out(F.group_norm(y, 2, m.v, m.c))

    model = Made(run, a=conv(3, 6), out=conv(6, 2), w=learnt(6), b=learnt(6), v=learnt(6), c=learnt(6))
    model.register_buffer("running_mean", torch.zeros(6))
    model.register_buffer("running_var", torch.ones(6))
    graph = check(scrambled(model), IMAGES)
    for key, value in (("weight", "w"), ("bias", "b"), ("running_mean",) * 2, ("running_var",) * 2):
        assert torch.equal(column(graph, "a", f"norm.{key}"), getattr(model, value))
    (own,) = set(sizes(graph)) - {"input", "a", "out"}
    assert torch.equal(column(graph, own, "norm.weight"), model.v)
    assert together(graph, "a") == {own}
    assert free(graph) == set()


def test_two_norms_in_a_row() -> None:
    model = line(conv(3, 6), nn.BatchNorm2d(6), nn.BatchNorm2d(6), conv(6, 2))
    graph = check(model, IMAGES)
    assert sizes(graph) == {"input": 3, "0": 6, "2": 6, "3": 2}
    assert torch.equal(column(graph, "0", "norm.weight"), model[1].weight)
    assert torch.equal(column(graph, "2", "norm.running_var"), model[2].running_var)
    assert together(graph, "0") == {"2"}
    assert free(graph) == {"0"}
