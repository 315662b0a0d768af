"""Networks that rules are easily wrong about.

* What may be pruned can be, and the rest computes the same: channels whose order counts, or that a constant or a learnt
  number per channel meets out of sight, must stay.
* Every module converts, or is refused with a `ConversionError`.
* Network to graph to network is exact, also in mixed precision.
* With `on_unknown="error"` no parameter is left out in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reading import Made, assert_prunable, blocks, check, free, groups, learnt, reasons, scrambled, sizes, together
from torch import Tensor, nn

from gmn.convert import to_graph, to_model
from gmn.errors import ConversionError, PruningError
from gmn.groups import KeepMask, couplings
from gmn.surgery import remove

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(5))
POINTS = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(5))


def conv(into: int, out: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def made(run: Callable[..., Any], **parts: Any) -> nn.Module:
    return scrambled(Made(run, **parts))


# The order of the channels counts


def eca(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    gate = m.along(y.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
    return m.out(y * torch.sigmoid(gate))


@pytest.mark.parametrize(
    ("run", "x", "kind"),
    [
        (eca, IMAGES, conv),
        (lambda m, x: m.out(m.a(x).cumsum(1)), IMAGES, conv),
        (lambda m, x: m.out(F.local_response_norm(m.a(x), 3)), IMAGES, conv),
        (lambda m, x: m.out(F.avg_pool1d(m.a(x), 3, 1, 1)), TOKENS, nn.Linear),
    ],
    ids=["eca", "cumsum", "local response norm", "pooling"],
)
def test_channels_whose_order_counts_stay(run: Callable[..., Tensor], x: Tensor, kind: Any) -> None:
    model = made(run, a=kind(x.shape[1] if kind is conv else 4, 6), along=nn.Conv1d(1, 1, 3, padding=1), out=kind(6, 2))
    carried = () if run is eca else ("along.weight", "along.bias")
    assert free(check(model, x, carried=carried)) == set()


def test_channels_that_are_coordinates_stay() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(F.grid_sample(m.a(x), m.where(x).permute(0, 2, 3, 1), align_corners=False))

    graph = check(made(run, a=conv(3, 6), where=conv(3, 2), out=conv(6, 2)), IMAGES)
    assert free(graph) == {"a"}


# What meets the channels out of sight


def test_shuffled_channels_go_with_their_depthwise_kernel() -> None:
    model = made(
        lambda m, x: m.out(m.b(F.channel_shuffle(m.a(x), 2))), a=conv(3, 6), b=conv(6, 6, 3, groups=6), out=conv(6, 2)
    )
    graph = check(model, IMAGES)
    channel, found = couplings(graph.spec).channel, groups(graph)
    source = [found["a"][k] for k in (0, 3, 1, 4, 2, 5)]
    assert channel[found["b"]].tolist() == channel[source].tolist()
    assert free(graph) == set()


def test_a_grouped_convolution_of_a_concatenation_stays_whole() -> None:
    model = made(
        lambda m, x: m.out(m.b(torch.cat([m.a(x), x[:, :2]], 1))), a=conv(3, 4), b=conv(6, 8, groups=2), out=conv(8, 2)
    )
    graph = check(model, IMAGES)
    keep = torch.ones(graph.spec.num_nodes, dtype=torch.bool)
    keep[groups(graph)["b"][:2]] = False  # 2 + 4 are left, and cut in the middle: other channels, and no error
    with pytest.raises(PruningError, match="channels that must stay"):
        remove(model, graph.spec, KeepMask(keep), IMAGES)


def test_heads_of_one_channel() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, -1, 4, 1).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    layers = {role: nn.Linear(4, 4) for role in "qkv"}
    graph = check(made(run, **layers, out=nn.Linear(4, 2)), TOKENS)
    (source,) = [source for name, source, *_ in blocks(graph) if name == "out.weight"]
    assert source == "v"
    assert [heads for _, heads in graph.spec.heads] == [4]


def test_constants_that_are_concatenated_carry_no_channel() -> None:
    model = made(lambda m, x: m.out(torch.cat([m.a(x), torch.zeros(2, 2, 8, 8)], 1)), a=conv(3, 6), out=conv(8, 2))
    graph = check(model, IMAGES)
    read = graph.spec.read_by(graph.spec.weights()["out.weight"]).tolist()
    assert read[:6] == [*groups(graph)["a"]]
    assert not {*read} & {*groups(graph)["input"]}


def test_concatenated_coordinates() -> None:
    rows = lambda: torch.linspace(-1, 1, 8).expand(2, 1, 8, 8)  # noqa: E731
    model = made(lambda m, x: m.out(torch.cat([m.a(x), rows()], 1)), a=conv(3, 6), out=conv(7, 2))
    graph = check(model, IMAGES)
    assert sizes(graph)["input"] == 3
    assert free(graph) == {"a"}


@pytest.mark.parametrize(
    "run",
    [lambda m, x: m.out(m.a(x).clamp(min=0.01).pow(m.p)), lambda m, x: m.out(torch.lerp(m.a(x), m.b(x), m.p))],
    ids=["pow", "lerp"],
)
def test_parameters_per_channel_are_cut_with_them_or_keep_them(run: Callable[..., Tensor]) -> None:
    model = made(run, a=conv(3, 6), b=conv(3, 6), p=learnt(6, 1, 1), out=conv(6, 2))
    graph = to_graph(model, IMAGES)
    assert "p" in graph.spec.shapes or any(name == "p" for name, *_ in graph.spec.followers) or not free(graph)


def test_channels_that_are_compared_go_together() -> None:
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.normalize(m.a(x), dim=-1) @ F.normalize(m.b(y), dim=-1).T

    graph = check(made(run, a=nn.Linear(4, 6), b=nn.Linear(5, 6)), (torch.randn(2, 4), torch.randn(3, 5)))
    assert together(graph, "a") == {"b"}


def test_channels_before_a_norm_without_parameters_stay() -> None:
    norm = nn.LayerNorm(6, elementwise_affine=False)  # it has their number written in it, and no tensor that tells
    graph = check(scrambled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), norm, nn.Linear(6, 2))), TOKENS)
    assert free(graph) == set()


class LowRank(nn.Linear):
    """With a learnt difference of low rank, as adapters have."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.down, self.up = learnt(2, into), learnt(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def test_parameters_of_a_subclass_are_not_left_out_in_silence() -> None:
    model = scrambled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), LowRank(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    graph = check(model, TOKENS)
    assert {"2.weight", "2.down", "2.up"} <= {name for name, *_ in blocks(graph)}
    assert_prunable(model, TOKENS)


class Residual(nn.Conv2d):
    """A convolution and what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Backwards(nn.Conv2d):
    """A convolution that turns its channels around."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


class Gated(nn.Linear):
    """A linear layer whose halves gate each other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(super().forward(x), -1)


@pytest.mark.parametrize("kind", [Residual, Backwards])
def test_what_a_subclass_does_beside_its_base_is_followed(kind: Any) -> None:
    model = scrambled(nn.Sequential(conv(3, 6), nn.ReLU(), kind(6, 6, 1), nn.ReLU(), conv(6, 2)))
    for seed in range(3):  # other channels of the two layers: the sizes fit, the numbers do not
        assert_prunable(model, IMAGES, share=0.3, seed=seed)


def test_a_subclass_whose_output_has_another_size() -> None:
    graph = check(scrambled(nn.Sequential(nn.Linear(4, 6), Gated(6, 12), nn.Linear(6, 2))), TOKENS)
    assert {"0"} <= free(graph)


# Outputs and values out of sight


@dataclass
class Result:
    """What a network may return."""

    logits: Tensor


@pytest.mark.parametrize("wrap", [Result, lambda y: SimpleNamespace(logits=y)], ids=["dataclass", "namespace"])
def test_outputs_inside_an_object_are_frozen(wrap: Callable[[Tensor], Any]) -> None:
    graph = to_graph(made(lambda m, x: wrap(m.out(m.a(x))), a=conv(3, 6), out=conv(6, 2)), IMAGES)
    assert "network output" in reasons(graph, "out")


def scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


def double(y: Tensor) -> Tensor:
    return y + y


@pytest.mark.parametrize(
    "last", [lambda y: torch.from_numpy(y.numpy() * 2), scripted(double)], ids=["numpy", "scripted"]
)
def test_outputs_made_out_of_sight_are_frozen(last: Callable[[Tensor], Tensor]) -> None:
    graph = to_graph(made(lambda m, x: last(m.out(m.a(x))), a=conv(3, 6), out=conv(6, 2)), IMAGES)
    assert "out" not in free(graph)


@pytest.mark.parametrize("back", [torch.as_tensor, torch.tensor], ids=["as_tensor", "tensor"])
def test_every_detour_over_numpy_is_noticed(back: Callable[..., Tensor]) -> None:
    graph = check(made(lambda m, x: m.out(back(m.a(x).numpy() * 2)), a=conv(3, 6), out=conv(6, 2)), IMAGES)
    assert free(graph) == set()


# Every module converts


def nullified(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y[y < 0] = 0
    return m.out(y)


def rotated(m: nn.Module, x: Tensor) -> Tensor:
    """Some channels are turned, the rest, of which there is none, is not."""
    y = m.a(x)
    turned, rest = y[..., :6], y[..., 6:]
    return m.out(torch.cat([rest, -turned], -1) + (rest.mean(1, keepdim=True) * rest).sum())


OUTSIDE = torch.tensor([2.0])
CRASHES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "maximum over points": (
        lambda: made(lambda m, x: m.out(torch.max(m.a(x), 2)[0]), a=nn.Conv1d(3, 6, 1), out=nn.Linear(6, 2)),
        POINTS,
    ),
    "maximum over channels": (
        lambda: made(lambda m, x: m.out(m.a(x) * m.a(x).max(1)[0].unsqueeze(1)), a=conv(3, 6), out=conv(6, 2)),
        IMAGES,
    ),
    "an empty part": (lambda: made(rotated, a=nn.Linear(4, 6), out=nn.Linear(6, 2)), TOKENS),
    "writing where a mask says": (lambda: made(nullified, a=conv(3, 6), out=conv(6, 2)), IMAGES),
    "a constant in an exported network": (
        lambda: made(
            lambda m, x: m.out(m.act(m.a(x)) + torch.tensor([2.0])), a=conv(3, 6), act=scripted(double), out=conv(6, 2)
        ),
        IMAGES,
    ),
    "a constant from outside the module": (
        lambda: made(lambda m, x: m.out(m.a(x) * OUTSIDE), a=conv(3, 6), out=conv(6, 2)),
        IMAGES,
    ),
    "a weight stored flat": (
        lambda: made(lambda m, x: m.out(F.linear(x, m.w.view(6, 4))), w=learnt(24), out=nn.Linear(6, 2)),
        TOKENS,
    ),
    "a weight in another shape": (
        lambda: made(lambda m, x: m.out(x @ m.w.view(4, 6)), w=learnt(6, 4), out=nn.Linear(6, 2)),
        TOKENS,
    ),
    "an autoencoder with one weight": (
        lambda: made(lambda m, x: F.linear(F.relu(F.linear(x, m.w)), m.w.t()), w=learnt(6, 4)),
        TOKENS,
    ),
    "a convolution and its transpose": (
        lambda: made(lambda m, x: F.conv_transpose2d(F.relu(F.conv2d(x, m.w)), m.w), w=learnt(6, 3, 3, 3)),
        IMAGES,
    ),
    "vmap": (lambda: made(lambda m, x: m.out(torch.vmap(torch.sin)(m.a(x))), a=conv(3, 6), out=conv(6, 2)), IMAGES),
    "a scripted module": (
        lambda: scrambled(nn.Sequential(conv(3, 6), scripted(nn.Sequential(conv(6, 6))), conv(6, 2))),  # type: ignore[arg-type]
        IMAGES,
    ),
}


@pytest.mark.parametrize("name", CRASHES)
def test_every_network_converts(name: str) -> None:
    build, x = CRASHES[name]
    model = build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    again = to_model(to_graph(model, x))
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_hooks_go_when_one_cannot_be_set() -> None:
    build, x = CRASHES["a scripted module"]
    model = build()
    with suppress(RuntimeError):
        to_graph(model, x)
    assert not any(module._forward_hooks for module in model.children())


def test_lazy_layers_are_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyConv2d(2, 1))
    with pytest.raises(ConversionError):
        to_graph(model, IMAGES)


# Exact


def test_a_norm_in_single_precision_after_a_layer_in_half() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.norm(m.a(x).float()).bfloat16())

    model = made(run, a=conv(3, 6).bfloat16(), norm=nn.BatchNorm2d(6), out=conv(6, 2).bfloat16())
    again = to_model(to_graph(model, IMAGES.bfloat16()))
    assert torch.equal(again.norm.weight, model.norm.weight)


# The axis of an input


@pytest.mark.parametrize(
    ("run", "x"),
    [
        (lambda m, x, y: m.out(torch.cat([x, y[..., :2]], -1)), (TOKENS, TOKENS)),
        (lambda m, x: m.out(F.pad(x.mean(1), (0, 2))), TOKENS),
    ],
    ids=["two inputs", "a mean of tokens"],
)
def test_the_channels_of_tokens_are_found(run: Callable[..., Tensor], x: Any) -> None:
    model = made(run, g=learnt(6), out=nn.Linear(6, 2))
    assert sizes(to_graph(model, x))["input"] == 4
