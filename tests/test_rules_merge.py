"""Contract of the rules for what brings activations together, takes them apart, or shifts them about.

* A number per channel that is multiplied, added or a slope is a node feature; one number for all is carried.
* A gate joins channel k of both sides, as a residual does.
* What the code splits by written sizes must stay; what it concatenates is read where it is.
* A layer that is called twice has one set of nodes and weights with one home.
* What has no place is carried, counted and listed. Network to graph to network is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reading import Made, blocks, check, column, features, free, groups, learnt, reasons, scrambled, sizes, together
from torch import Tensor, nn

from gmn.convert import to_graph
from gmn.errors import ConversionError
from gmn.graph import NetworkGraph
from gmn.groups import couplings

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(5))


def conv(into: int, out: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def made(run: Callable[..., Any], **parts: Any) -> nn.Module:
    return scrambled(Made(run, **parts))


def block_between(graph: NetworkGraph, source: str, target: str) -> Tensor:
    """[G, O, I, K] of the only block between two groups."""
    (found,) = [
        e for e, (_, a, b, _) in zip(graph.edge_features, blocks(graph), strict=True) if (a, b) == (source, target)
    ]
    return found


# A number per channel


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda m, x: m.out(m.a(x) * m.g), "scale"),
        (lambda m, x: m.out(m.g * m.a(x)), "scale"),
        (lambda m, x: m.out(m.a(x).mul(m.g)), "scale"),
        (lambda m, x: m.out(m.a(x) / m.g), "scale"),
        (lambda m, x: m.out(m.a(x) + m.g), "shift"),
        (lambda m, x: m.out(m.a(x) - m.g), "shift"),
    ],
)
def test_a_scale_or_shift_of_images(run: Callable[..., Tensor], name: str, shape: tuple[int, ...]) -> None:
    model = made(run, a=conv(3, 6), g=learnt(*shape), out=conv(6, 2))
    graph = check(model, IMAGES)
    assert sizes(graph) == {"input": 3, "a": 6, "out": 2}
    assert torch.equal(column(graph, "a", name), model.g.flatten())


@pytest.mark.parametrize(
    "run", [lambda m, x: m.out(m.a(x) * m.g + m.s), lambda m, x: m.out(torch.addcmul(m.s, m.g, m.a(x)))]
)
def test_a_scale_and_a_shift_of_tokens(run: Callable[..., Tensor]) -> None:
    model = made(run, a=nn.Linear(4, 6), g=learnt(6), s=learnt(6), out=nn.Linear(6, 2))
    graph = check(model, TOKENS)
    assert torch.equal(column(graph, "a", "scale"), model.g)
    assert torch.equal(column(graph, "a", "shift"), model.s)


def test_layer_scale_in_a_residual_branch() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.out(y + m.gamma * m.b(F.gelu(m.a(y))))

    model = made(run, stem=nn.Linear(4, 6), a=nn.Linear(6, 8), b=nn.Linear(8, 6), gamma=learnt(6), out=nn.Linear(6, 2))
    graph = check(model, TOKENS)
    holder = next(name for name in sizes(graph) if column(graph, name, "scale").tolist() == model.gamma.tolist())
    assert holder == "b"
    assert "b" in together(graph, "stem")
    assert not together(graph, "a")


def test_channels_that_others_read_take_their_scale_on_nodes_of_their_own() -> None:
    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        return m.b(m.g * y), m.c(y)

    model = made(run, a=conv(3, 6), g=learnt(6, 1, 1), b=conv(6, 2), c=conv(6, 2))
    graph = check(model, IMAGES)
    assert sizes(graph) == {"input": 3, "a": 6, "g": 6, "b": 2, "c": 2}
    assert torch.equal(column(graph, "g", "scale"), model.g.flatten())
    assert together(graph, "a") == {"g"}


def test_one_number_for_all_is_carried() -> None:
    model = made(lambda m, x: m.out(m.a(x) * m.g), a=conv(3, 6), g=learnt(1), out=conv(6, 2))
    graph = check(model, IMAGES, carried=("g",))
    assert free(graph) == {"a"}


def test_prelu_with_a_slope_per_channel() -> None:
    model = scrambled(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.PReLU(6), conv(6, 2)))
    graph = check(model, IMAGES)
    assert sizes(graph) == {"input": 3, "0": 6, "3": 2}
    assert torch.equal(column(graph, "0", "slope"), model[2].weight)
    assert column(graph, "3", "slope").tolist() == [0.0, 0.0]


def test_prelu_with_a_single_slope_is_carried() -> None:
    model = scrambled(nn.Sequential(conv(3, 6), nn.PReLU(), conv(6, 2)))
    graph = check(model, IMAGES, carried=("1.weight",))
    assert "  carried: 1.weight [1]" in graph.summary()
    assert free(graph) == {"0"}


# Gates


def squeeze(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.out(y * torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3), keepdim=True))))))


def squeeze_linear(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.out(y * torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1).flatten(1)))))[:, :, None, None])


@pytest.mark.parametrize(("run", "kind"), [(squeeze, conv), (squeeze_linear, nn.Linear)])
def test_a_gate_goes_with_its_channels(run: Callable[..., Tensor], kind: Any) -> None:
    model = made(run, a=conv(3, 6), down=kind(6, 4), up=kind(4, 6), out=conv(6, 2))
    graph = check(model, IMAGES)
    assert sizes(graph) == {"input": 3, "a": 6, "down": 4, "up": 6, "out": 2}
    assert together(graph, "a") == {"up"}
    assert together(graph, "down") == set()
    assert free(graph) == {"a", "down"}
    assert torch.equal(block_between(graph, "a", "up"), torch.ones(6, 1, 1, 1))
    assert torch.equal(features(graph, "out.weight")[0, :, :, 0], model.out.weight.flatten(1))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.out((lambda a, b: a * torch.sigmoid(b))(*m.a(x).chunk(2, -1))),
        lambda m, x: m.out(torch.mul(*m.a(x).split([6, 6], dim=-1))),
        lambda m, x: m.out(F.silu(m.a(x)[..., :6]) * m.a(x)[..., 6:]),
    ],
)
def test_halves_that_gate_each_other_go_together_and_stay(run: Callable[..., Tensor]) -> None:
    model = made(run, a=nn.Linear(4, 12), out=nn.Linear(6, 2))
    graph = check(model, TOKENS)
    channel = couplings(graph.spec).channel
    start = groups(graph)["a"].start
    assert torch.equal(channel[start : start + 6], channel[start + 6 : start + 12])
    assert free(graph) == set()
    assert any(why.startswith("split or regrouped") for why in reasons(graph, "a"))


def test_gated_linear_unit() -> None:
    graph = check(scrambled(nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 2))), TOKENS)
    assert free(graph) == set()
    assert "read by 1 (glu), which has no rule" in reasons(graph, "0")


def test_two_layers_that_gate_each_other() -> None:
    model = made(lambda m, x: m.out(F.silu(m.a(x)) * m.b(x)), a=nn.Linear(4, 6), b=nn.Linear(4, 6), out=nn.Linear(6, 2))
    graph = check(model, TOKENS)
    assert together(graph, "a") == {"b"}
    assert free(graph) == {"a"}


# Taken apart and put together


def test_a_split_by_sizes_is_read_in_its_parts() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        first, second, third = m.a(x).split([1, 2, 3], dim=1)
        return m.out(torch.cat([m.c(third), second, first], 1))

    model = made(run, a=conv(3, 6), c=conv(3, 4), out=conv(7, 2))
    graph = check(model, IMAGES)
    start = groups(graph)["a"].start
    assert [(name, source) for name, source, _, _ in blocks(graph)] == [
        ("a.weight", "input"),
        ("c.weight", str((start + 3, 3))),
        ("out.weight", "c"),
        ("out.weight", str((start, 3))),
    ]
    weight = model.out.weight[:, :, 0, 0]
    assert torch.equal(graph.edge_features[2][0, :, :, 0], weight[:, :4])
    assert torch.equal(graph.edge_features[3][0, :, :, 0], weight[:, [6, 4, 5]])  # in the order of the nodes
    assert free(graph) == {"c"}


@pytest.mark.parametrize("shuffle", [nn.ChannelShuffle(2), None])
def test_shuffled_channels_are_read_where_they_are(shuffle: nn.Module | None) -> None:
    by_hand = lambda y: y.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8)  # noqa: E731
    model = made(lambda m, x: m.out((shuffle or by_hand)(m.a(x))), a=conv(3, 6), out=conv(6, 2))
    graph = check(model, IMAGES)
    order = [0, 3, 1, 4, 2, 5]
    read = graph.spec.read_by(graph.spec.weights()["out.weight"]) - groups(graph)["a"].start
    assert read.tolist() == order
    assert free(graph) == set()


def test_a_concatenation_of_branches() -> None:
    model = made(lambda m, x: m.out(torch.cat([m.a(x), x, m.b(x)], 1)), a=conv(3, 4), b=conv(3, 5, 3), out=conv(12, 2))
    graph = check(model, IMAGES)
    assert free(graph) == {"a", "b"}
    found = groups(graph)
    read = graph.spec.read_by(graph.spec.weights()["out.weight"]).tolist()
    assert read == [*found["a"], *found["input"], *found["b"]]
    weight = model.out.weight[:, :, 0, 0]  # the three are neighbours: one block reads them, in the order of the nodes
    assert torch.equal(features(graph, "out.weight")[0, :, :, 0], weight[:, [4, 5, 6, 0, 1, 2, 3, *range(7, 12)]])


def class_token(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y = torch.cat([m.token.expand(len(y), -1, -1), y], 1) + m.places
    return m.out(F.gelu(m.b(y))[:, 0])


def test_a_class_token_and_a_position_embedding_are_carried_and_counted() -> None:
    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 8), "out": nn.Linear(8, 2)}
    model = made(class_token, **parts, token=learnt(1, 1, 6), places=learnt(1, 6, 6))
    graph = check(model, TOKENS, carried=("token", "places"))
    assert sizes(graph) == {"input": 4, "a": 6, "b": 8, "out": 2}
    held = sum(p.numel() for part in parts.values() for p in part.parameters())
    summary = graph.summary()
    assert f"in the graph: {held} of {held + 42} parameters" in summary
    assert "carried through unchanged: 42 in 2 tensors, and 0 buffers" in summary
    assert "  carried: token [1, 1, 6]" in summary
    assert "  carried: places [1, 6, 6]" in summary
    assert "b" in free(graph)


def test_upsampled_pixels_make_nodes_that_stay() -> None:
    model = made(lambda m, x: m.out(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 8), out=conv(2, 3))
    graph = check(model, IMAGES)
    assert sizes(graph) == {"input": 3, "a": 8, "out.weight.input": 2, "out": 3}
    assert free(graph) == set()
    assert torch.equal(block_between(graph, "out.weight.input", "out")[0, :, :, 0], model.out.weight[:, :, 0, 0])


def test_downsampled_pixels_are_read_once_per_position() -> None:
    model = made(lambda m, x: m.out(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 4), out=conv(16, 2))
    graph = check(model, IMAGES)
    parts = [e for e, (name, *_) in zip(graph.edge_features, blocks(graph), strict=True) if name == "out.weight"]
    assert [part.shape for part in parts] == [(1, 2, 4, 1)] * 4
    for position, part in enumerate(parts):
        assert torch.equal(part[0, :, :, 0], model.out.weight.view(2, 4, 4)[:, :, position])


@pytest.mark.parametrize("into", ["zeros", "clone"])
def test_writing_into_a_tensor(into: str) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 6, 8, 8) if into == "zeros" else m.a(x).clone()
        y[:, 2:] = m.b(x)
        return m.out(y)

    parts = {} if into == "zeros" else {"a": conv(3, 6)}
    graph = check(made(run, **parts, b=conv(3, 4), out=conv(6, 2)), IMAGES)
    read = graph.spec.read_by(graph.spec.weights()["out.weight"]).tolist()
    found = groups(graph)
    first = found["a"][:2] if into == "clone" else found["out.weight.padding"]
    assert read == [*first, *found["b"]]


# Once more


def test_a_module_called_twice_has_one_home() -> None:
    model = made(lambda m, x: m.out(m.c(F.relu(m.c(m.a(x))))), a=conv(3, 6), c=conv(6, 6, 3), out=conv(6, 2))
    graph = check(model, IMAGES)
    assert sizes(graph) == {"input": 3, "a": 6, "c": 6, "out": 2}
    assert [b[:3] for b in blocks(graph)] == [
        ("a.weight", "input", "a"),
        ("c.weight", "a", "c"),
        ("c.weight", "c", "c"),
        ("out.weight", "c", "out"),
    ]
    assert [slot.home for slot in graph.spec.edge_slots if slot.param == "c.weight"] == [True, False]
    assert together(graph, "a") == {"c"}
    assert torch.equal(graph.edge_features[1], graph.edge_features[2])


def test_one_encoder_for_two_inputs() -> None:
    model = made(lambda m, x, y: m.out(torch.cat([m.a(x), m.a(y)], -1)), a=nn.Linear(4, 6), out=nn.Linear(12, 2))
    graph = check(model, (torch.randn(2, 4), torch.randn(2, 4)))
    assert sizes(graph) == {"input": 4, "input#2": 4, "a": 6, "out": 2}
    assert together(graph, "input") == {"input#2"}
    assert torch.equal(block_between(graph, "a", "out")[0], model.out.weight.view(2, 2, 6).mT)
    assert free(graph) == {"a"}


def test_norms_are_not_shared_by_layers_that_are() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.n2(m.c(F.relu(m.n1(m.c(m.a(x)))))))

    norms = {"n1": nn.BatchNorm2d(6), "n2": nn.BatchNorm2d(6)}
    graph = check(made(run, a=conv(3, 6), c=conv(6, 6), **norms, out=conv(6, 2)), IMAGES)
    for name, norm in norms.items():
        assert torch.equal(column(graph, name, "norm.weight"), norm.weight)
    assert together(graph, "a") == {"c", "n1", "n2"}


# Carried


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_carried(kind: Any) -> None:
    model = made(
        lambda m, x: m.out(m.r(m.a(x))[0]), a=nn.Linear(4, 6), r=kind(6, 5, batch_first=True), out=nn.Linear(5, 2)
    )
    names = tuple(f"r.{what}_{side}_l0" for what in ("weight", "bias") for side in ("ih", "hh"))
    graph = check(model, TOKENS, carried=names)
    assert sizes(graph)["out"] == 2
    assert torch.equal(features(graph, "a.weight")[0, :, :, 0], model.a.weight)
    assert torch.equal(features(graph, "out.weight")[0, :, :, 0], model.out.weight)
    assert free(graph) == set()
    assert any(why.startswith("read by r (") for why in reasons(graph, "a"))


def test_sums_over_letters_with_parameters_are_carried() -> None:
    model = made(
        lambda m, x: m.out(torch.einsum("btc,dc->btd", m.a(x), m.w)),
        a=nn.Linear(4, 6),
        w=learnt(5, 6),
        out=nn.Linear(5, 2),
    )
    graph = check(model, TOKENS, carried=("w",))
    assert free(graph) == set()
    assert any("(einsum), which has no rule" in why for why in reasons(graph, "a"))
    with pytest.raises(ConversionError, match=r"calls einsum with the parameters w"):
        to_graph(model, TOKENS, on_unknown="error")


def vector(m: Any, x: Tensor) -> Tensor:
    return m.a(x).mean((2, 3))


@pytest.mark.parametrize(
    ("by_keyword", "by_position"),
    [
        (
            lambda m, x: m.out(F.conv2d(input=m.a(x), weight=m.w)),
            lambda m, x: m.out(F.conv2d(m.a(x), m.w)),
        ),
        (
            lambda m, x: m.out(torch.addcmul(input=m.g, tensor1=m.g, tensor2=m.a(x))),
            lambda m, x: m.out(torch.addcmul(m.g, m.g, m.a(x))),
        ),
        (
            lambda m, x: m.head(torch.matmul(input=vector(m, x), other=m.v.T)),
            lambda m, x: m.head(vector(m, x) @ m.v.T),
        ),
        (
            lambda m, x: m.head(vector(m, x) @ m.v.transpose(dim0=0, dim1=1)),
            lambda m, x: m.head(vector(m, x) @ m.v.transpose(0, 1)),
        ),
        (
            lambda m, x: m.head(vector(m, x) @ m.v.permute(dims=(1, 0))),
            lambda m, x: m.head(vector(m, x) @ m.v.permute(1, 0)),
        ),
        (
            lambda m, x: m.head(F.linear(input=vector(m, x), weight=m.v)),
            lambda m, x: m.head(F.linear(vector(m, x), m.v)),
        ),
    ],
)
def test_arguments_by_keyword(by_keyword: Callable[..., Any], by_position: Callable[..., Any]) -> None:
    """The same graph as by position: every parameter of the calls lies in it."""

    def graph(run: Callable[..., Any]) -> NetworkGraph:
        own = {"w": learnt(6, 6, 1, 1), "g": learnt(6, 1, 1), "v": learnt(6, 6)}
        return to_graph(made(run, a=conv(3, 6), out=conv(6, 2), head=nn.Linear(6, 2), **own), IMAGES)

    assert blocks(graph(by_keyword)) == blocks(graph(by_position))
    assert graph(by_keyword).spec.carried == graph(by_position).spec.carried
