"""Contract of the conversion at its ends: what goes in, and networks whose run cannot be watched.

* The channels of an input lie where its first layer reads them, with or without a batch; every input has its own nodes.
* Inputs may be several, named, nested, or indices; outputs are frozen wherever they are in the result.
* A scripted function makes `torch.export` trace the network, and the graph is that of its twin in Python.
* What cannot be exported either is converted, exact, and stays whole.
* The network is left as it was: modes, hooks and numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reading import Made, blocks, check, free, groups, learnt, reasons, scrambled, sizes, together
from torch import Tensor, nn

from gmn.convert import to_graph
from gmn.errors import ConversionError
from gmn.groups import couplings
from gmn.rules import load_rules, rule_for
from gmn.trace import trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(5))


def made(run: Callable[..., Any], **parts: Any) -> nn.Module:
    return scrambled(Made(run, **parts))


def conv(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 1)


# Inputs


@pytest.mark.parametrize(
    ("first", "last", "shape", "channels"),
    [
        (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), (2, 3, 8, 8), 3),
        (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), (3, 8, 8), 3),  # no batch
        (nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1), (2, 1, 8, 8), 1),
        (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), (3, 3, 3, 3), 3),  # all axes alike
        (nn.Conv1d(5, 6, 3), nn.Conv1d(6, 2, 1), (2, 5, 4), 5),
        (nn.Linear(4, 6), nn.Linear(6, 2), (2, 4), 4),
        (nn.Linear(4, 6), nn.Linear(6, 2), (4,), 4),
        (nn.Linear(4, 6), nn.Linear(6, 2), (2, 5, 4), 4),  # tokens
        (nn.Linear(4, 6), nn.Linear(6, 2), (2, 8, 8, 4), 4),  # images with the channels last
        (nn.Linear(4, 6), nn.Linear(6, 2), (4, 4, 4), 4),
        (nn.LayerNorm(4), nn.Linear(4, 2), (2, 5, 4), 4),
        (nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), (2, 3, 8, 8), 3),
    ],
)
def test_the_channels_lie_where_the_first_layer_reads_them(
    first: nn.Module, last: nn.Module, shape: tuple[int, ...], channels: int
) -> None:
    graph = check(scrambled(nn.Sequential(first, nn.ReLU(), last)), torch.randn(shape))
    assert sizes(graph)["input"] == channels
    assert reasons(graph, "input") == {"network input"}
    assert {source for _, source, target, _ in blocks(graph) if target == "0"} == {"input"}
    assert "network output" in reasons(graph, "2")
    assert free(graph) <= {"0"}


def test_flattened_grey_images_are_one_channel_of_many_positions() -> None:
    graph = check(scrambled(nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 2))), torch.randn(2, 1, 8, 8))
    assert blocks(graph)[0] == ("1.weight", "input", "1", (1, 6, 1, 64))


def test_two_inputs_of_other_kinds() -> None:
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return m.out(torch.cat([m.a(x).mean((2, 3)), m.b(y)], 1))

    model = made(run, a=conv(3, 6), b=nn.Linear(5, 4), out=nn.Linear(10, 2))
    graph = check(model, (IMAGES, torch.randn(2, 5)))
    assert sizes(graph) == {"input": 3, "input#2": 5, "a": 6, "b": 4, "out": 2}
    assert [b[:3] for b in blocks(graph)] == [
        ("a.weight", "input", "a"),
        ("b.weight", "input#2", "b"),
        ("out.weight", str((groups(graph)["a"].start, 10)), "out"),
    ]
    assert free(graph) == {"a", "b"}


def test_two_inputs_that_are_added() -> None:
    model = made(lambda m, x, y: m.b(x + y), b=nn.Linear(4, 2))
    assert together(check(model, (TOKENS, TOKENS)), "input") >= {"input#2"}


def test_inputs_by_name_and_indices() -> None:
    def run(m: nn.Module, *, words: Tensor, extra: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = F.relu(m.a(words)) * scale
        return {"first": [m.b(y)], "second": (m.c(y + m.d(extra)), None)}

    layers = {"b": nn.Linear(6, 2), "c": nn.Linear(6, 3), "d": nn.Linear(4, 6)}
    model = made(run, a=nn.Embedding(7, 6), **layers)
    graph = check(model, {"words": torch.tensor([[0, 1, 6, 2, 3]] * 2), "extra": TOKENS, "scale": 2.0})
    assert sizes(graph)["input"] == 4
    assert sizes(graph)["a.entries"] == 7
    assert all("network output" in reasons(graph, name) for name in "bc")


def test_nested_inputs() -> None:
    model = made(lambda m, batch: m.a(batch["x"]) + m.b(batch["more"][0]), a=nn.Linear(4, 2), b=nn.Linear(5, 2))
    graph = check(model, ({"x": torch.randn(2, 4), "more": [torch.randn(2, 5)]},))
    assert {source for _, source, *_ in blocks(graph)} >= {"input", "input#2"}


def test_an_unused_layer_is_carried() -> None:
    model = made(lambda m, x: m.a(x), a=nn.Linear(4, 2), unused=nn.Linear(3, 3))
    check(model, TOKENS, carried=("unused.weight", "unused.bias"))


# Runs that cannot be watched


def scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def block_of_convolutions(act: Callable[[Tensor], Tensor]) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = act(m.n1(m.a(x)))
        y = act(m.n3(m.c(act(m.n2(m.b(y))))) + y)
        return m.out(y.mean((2, 3)))

    norms = {f"n{i}": nn.BatchNorm2d(6) for i in (1, 2, 3)}
    layers = {"a": conv(3, 6), "b": nn.Conv2d(6, 6, 3, padding=1, groups=6), "c": conv(6, 6), "out": nn.Linear(6, 2)}
    return made(run, **layers, **norms)


def mixer(act: Callable[[Tensor], Tensor]) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (part.view(2, 5, 2, 3).transpose(1, 2) for part in m.qkv(m.n1(y)).chunk(3, -1))
        y = y + m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return m.out(y + m.g * m.c(act(m.b(m.n2(y)))))

    norms = {"n1": nn.LayerNorm(6), "n2": nn.LayerNorm(6)}
    layers = {"qkv": nn.Linear(6, 18), "proj": nn.Linear(6, 6), "b": nn.Linear(6, 8), "c": nn.Linear(8, 6)}
    return made(run, a=nn.Linear(4, 6), **layers, **norms, g=learnt(6), out=nn.Linear(6, 2))


def facts(model: nn.Module, x: Tensor) -> dict[str, Any]:
    graph = check(model, x)
    coupled = couplings(graph.spec)
    return {
        "blocks": blocks(graph),
        "places": [(s.param, s.nodes, graph.spec.columns[s.column]) for s in graph.spec.node_slots],
        "channels": coupled.channel.tolist(),
        "free": free(graph),
        "heads": graph.spec.heads,
        "edges": [e.tolist() for e in graph.edge_features],
    }


def traced_by(model: nn.Module, x: Tensor) -> tuple[str, bool]:
    load_rules()
    record = trace(model, x, lambda module: rule_for(module) is not None)
    return record.traced_by, record.blind


@pytest.mark.parametrize(("build", "x"), [(block_of_convolutions, IMAGES), (mixer, TOKENS)])
def test_a_scripted_function_changes_nothing(build: Callable[..., nn.Module], x: Tensor) -> None:
    assert traced_by(build(swish), x) == ("run", False)
    assert traced_by(build(scripted(swish)), x) == ("export", False)
    watched, exported = facts(build(swish), x), facts(build(scripted(swish)), x)
    for what, value in watched.items():
        assert exported[what] == value, what


def through_numpy(y: Tensor) -> Tensor:
    return torch.from_numpy(y.numpy() * 2)


@pytest.mark.parametrize(
    "build", [block_of_convolutions, lambda act: made(lambda m, x: m.b(act(m.a(x))), a=conv(3, 6), b=conv(6, 2))]
)
def test_a_detour_over_numpy_freezes_everything(build: Callable[..., nn.Module]) -> None:
    model = build(through_numpy)
    assert traced_by(model, IMAGES) == ("run", True)
    graph = check(model, IMAGES)
    assert free(graph) == set()
    assert any("runs where it cannot be followed" in why for why in reasons(graph, "a"))


@pytest.mark.parametrize("act", [swish, scripted(swish), through_numpy], ids=["run", "export", "blind"])
def test_the_network_is_left_as_it_was(act: Callable[[Tensor], Tensor]) -> None:
    model = block_of_convolutions(act).train()
    model.n2.eval()
    model.a.weight.requires_grad_(False)
    model.b.register_forward_hook(lambda *_: None)
    look = lambda: (  # noqa: E731
        {n: m.training for n, m in model.named_modules()},
        {n: (id(p), p.requires_grad, p._version, p.grad) for n, p in model.named_parameters()},
        {n: [len(h) for h in (m._forward_hooks, m._forward_pre_hooks)] for n, m in model.named_modules()},
        {n: t.tolist() for n, t in model.state_dict().items()},
        torch.is_grad_enabled(),
    )
    before = look()
    to_graph(model, IMAGES)
    assert look() == before
    with pytest.raises(ConversionError, match="does not run on the example inputs"):
        to_graph(model, IMAGES[:, :2])
    assert look() == before
