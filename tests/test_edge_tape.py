"""Contract of `gmn.edge_tape` and `gmn.blockwise`.

* Gradients are those of the formula, in double precision, by finite differences; messages that tie for an extreme share
  its gradient evenly, wherever the chunks are cut. Autocast changes nothing.
* The size of the chunks changes nothing but the last bits; a node may lie in several parts of one chunk.
* Every edge lies in exactly one chunk, and chunks keep to their size where one row does.
* Memory: one buffer of all edge states, whatever the number of layers, and the kept states there is room for, which
  change no bit.
* Every option, compiled kernels too, agrees with the reference to five digits in what is added and in all gradients;
  states in bfloat16 to two.
* What it cannot do it refuses: gradients of features, a second backward pass, parameters exchanged between the passes.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Residual, depthwise, small

import gmn.edge_sections
import gmn.metanetwork
from gmn.convert import to_graph
from gmn.edge_chunks import grouped
from gmn.edge_sections import Collected, sections
from gmn.edge_tape import EdgeTape
from gmn.errors import ConversionError
from gmn.graph import EdgeBlock, NetworkGraph
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.networks import build_network


def graph_of(model: nn.Module) -> NetworkGraph:
    graph = to_graph(model, torch.zeros(1, 3, 8, 8))
    return graph.replace(graph.node_features.double(), tuple(e.double() for e in graph.edge_features))


def metanetwork(graph: NetworkGraph, **options: object) -> MetaNetwork:
    torch.manual_seed(0)
    size = {"layers": 2, "hidden": 4, "zero_init": False, "node_ratio": 0.5, "edge_ratio": 0.5, **options}
    return MetaNetwork(MetaNetworkConfig(len(graph.spec.columns), graph.spec.edge_kinds, **size)).double()


def outputs(meta: MetaNetwork, graph: NetworkGraph) -> list[Tensor]:
    new = meta(graph)
    return [new.node_features, *new.edge_features]


def loss_of(meta: MetaNetwork, graph: NetworkGraph) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    made = outputs(meta, graph)
    draws = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in made]
    return torch.stack([(x * r).sum() for x, r in zip(made, draws, strict=True)]).sum()


class Anew(torch.autograd.Function):
    """The loss, computed again for every backward pass: gradcheck takes several, and a tape is good for one."""

    @staticmethod
    def forward(ctx: Any, meta: MetaNetwork, graph: NetworkGraph, *parameters: Tensor) -> Tensor:
        ctx.meta, ctx.graph = meta, graph
        return loss_of(meta, graph)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.enable_grad():
            found = torch.autograd.grad(loss_of(ctx.meta, ctx.graph), list(ctx.meta.parameters()))
        return None, None, *(grads[0] * g for g in found)


@pytest.mark.parametrize("make", [lambda: small(Residual(4), width=4), depthwise, lambda: small(Residual(groups=3))])
def test_gradcheck(make: Callable[[], nn.Module]) -> None:
    """Every entry of every parameter, by finite differences."""
    graph = graph_of(make())
    meta = metanetwork(graph, hidden=2)
    assert torch.autograd.gradcheck(lambda *own: Anew.apply(meta, graph, *own), tuple(meta.parameters()), rtol=1e-5)


@pytest.mark.parametrize("megabytes", [None, 1e-5])
def test_tied_extremes_share_the_gradient(megabytes: float | None) -> None:
    """Equal sources with equal edges send equal messages: autograd of the reference splits evenly, and so do we.

    In the smallest chunks a node's ties lie in several of them.
    """
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.3)
        model[0].bias.copy_(torch.tensor([0.1, 0.1, 0.1, 0.4]))
        model[2].weight.fill_(-0.2)
        model[2].bias.fill_(0.2)
    graph = to_graph(model, torch.zeros(1, 3, dtype=torch.float64))
    assert list(map(bool, tied_chunks(graph, max_chunk_mb=megabytes))) == [megabytes is not None] * 2


def tied_chunks(graph: NetworkGraph, **options: object) -> list[set[int]]:
    """Of each layer, the chunks with extremes that are found elsewhere too; gradients are those of the reference."""
    gradients, crossed = [], list[set[int]]()
    with pytest.MonkeyPatch.context() as patch:
        plain = Collected.crossed
        patch.setattr(Collected, "crossed", lambda own: crossed.append(plain(own)) or crossed[-1])
        for backend in ("blocks", "pyg"):
            meta = metanetwork(graph, **options, backend=backend)
            parameters = list(meta.parameters())
            gradients.append(torch.autograd.grad(loss_of(meta, graph), parameters, materialize_grads=True))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
    return [along | against for along, against in zip(crossed[::2], crossed[1::2], strict=True)]


class Twins(nn.Module):
    """Two layers with the same weights from the same nodes to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(*size) for size in ((3, 4), (4, 5), (4, 5), (5, 2)))
        self.right.load_state_dict(self.left.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.left(x) + self.right(x)))  # type: ignore[no-any-return]


def test_ties_between_parts_of_one_chunk() -> None:
    torch.manual_seed(0)
    graph = to_graph(Twins().double(), torch.zeros(1, 3, dtype=torch.float64))
    assert [len(found) for found in tied_chunks(graph, layers=1)] == [1]


def test_autocast_changes_nothing() -> None:
    """With the backward pass in its scope too, torch itself takes bfloat16 for the gradients of linear layers."""
    graph = graph_of(small(Residual()))
    graph = graph.replace(graph.node_features.float(), tuple(e.float() for e in graph.edge_features))
    meta = metanetwork(graph).float()
    parameters = list(meta.parameters())
    expected = list(torch.autograd.grad(loss_of(meta, graph), parameters))
    with torch.autocast("cpu", torch.bfloat16):
        inside = list(torch.autograd.grad(loss_of(meta, graph), parameters))
        loss = loss_of(meta, graph)
    outside = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(ours, usual) for ours, usual in zip(outside, expected, strict=True))
    assert apart(inside, [g.double() for g in expected]) < 0.05


@pytest.mark.parametrize("megabytes", [1e-5, 1e-3, 0.01, 100.0])
def test_the_size_of_chunks_does_not_matter(megabytes: float) -> None:
    graph = graph_of(small(Residual(), depthwise()[1], Residual(groups=3)))
    results = []
    for size in (None, megabytes):
        meta = metanetwork(graph, max_chunk_mb=size)
        new = outputs(meta, graph)
        results.append([*new, *torch.autograd.grad(loss_of(meta, graph), list(meta.parameters()))])
    for usual, other in zip(*results, strict=True):
        torch.testing.assert_close(other, usual, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("elements", [1, 100, 3_000, 1e9])
def test_every_edge_is_in_one_chunk(elements: float) -> None:
    blocks = (
        *(EdgeBlock(f"a{i}", (0, 6), (6 + 5 * i, 5), 1, (3, 3)) for i in range(3)),
        EdgeBlock("grouped", (6, 6), (21, 9), 3, (1, 1)),
        EdgeBlock("diagonal", (0, 6), (30, 6), 6, (3, 3)),
    )
    seen = [torch.zeros(block.shape[:3], dtype=torch.int64) for block in blocks]
    for chunk in grouped(blocks, (0, 0, 0, 1, 1), 2, elements):
        for part in chunk.parts:
            seen[part.block][part.pieces, part.rows] += 1
        g, rows, into = chunk.shape
        assert 2 * g * rows * into <= elements or (len(chunk.parts), g, rows) == (1, 1, 1)
    assert all(bool((count == 1).all()) for count in seen)


def test_blocks_of_one_shape_are_one_chunk() -> None:
    chain = tuple(EdgeBlock(f"c{i}", (4 * i, 4), (4 * i + 4, 4), 1, (1, 1)) for i in range(5))
    (chunk,) = grouped(chain, (0,) * 5, 2, 1e6)
    assert (len(chunk.parts), chunk.shape) == (5, (5, 4, 4))
    assert [len(chunk.parts) for chunk in grouped(chain, (0,) * 5, 2, 64)] == [2, 2, 1]
    same = tuple(dataclasses.replace(chain[0], name=str(i)) for i in range(5))  # nodes may be there more than once
    assert len(grouped(same, (0,) * 5, 2, 1e6)) == 1
    assert len(grouped(chain, (0, 0, 0, 1, 1), 2, 1e6)) == 2


@pytest.mark.parametrize("most", [1, 60, 2**20])
def test_chunks_read_their_nodes_and_add_to_them(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks lie in a section."""
    monkeypatch.setattr(gmn.edge_sections, "SECTION", most)
    blocks = (
        *(EdgeBlock(f"a{i}", (0, 6), (6 + 5 * i, 5), 1, (3, 3)) for i in range(3)),
        EdgeBlock("grouped", (6, 6), (21, 9), 3, (1, 1)),
    )
    vector, pairs = torch.randn(2, 30), torch.randn(2, 2, 30)
    total, both, times = torch.zeros(2, 30), torch.zeros(2, 2, 30), torch.zeros(30)
    sections.cache_clear()
    made = sections(blocks, (0, 0, 0, 1), 2, 30, 100, torch.device("cpu"))
    assert (len(made) > 1) == (most < 100)
    for section in made:
        for side, nodes in ((section.targets, "targets"), (section.sources, "sources")):
            read, read_pairs = side.spread(vector), side.spread_pairs(pairs)
            for chunk, own, of_pairs in zip(section.chunks, read, read_pairs, strict=True):
                at = torch.cat([torch.arange(first, first + count) for first, count in getattr(chunk, nodes)])
                assert torch.equal(own.view(2, -1), vector[:, at])
                g = chunk.shape[0]
                expected = pairs[:, :, at] if nodes == "targets" else pairs[:, :, at].flip(1)
                assert torch.equal(of_pairs.view(2, g, 2, -1).transpose(1, 2).reshape(2, 2, -1), expected)
                times.index_add_(0, at, torch.ones(len(at)))
            side.add(total, read)
            side.add_pairs(both, read_pairs)
    assert float(times.max()) > 1
    torch.testing.assert_close(total, vector * times)
    torch.testing.assert_close(both, pairs * times)
    sections.cache_clear()


@pytest.mark.parametrize("share", [0.0, 1.0, 2.5, 99.0])
def test_kept_states_change_nothing(share: float) -> None:
    """Room for none, one, two or all of the layers' states: the same bits."""
    graph = graph_of(small(Residual(), depthwise()[1], Residual(groups=3)))
    states = 4 * 8 * sum(e[..., 0].numel() for e in graph.edge_features)
    gradients = []
    for keep_mb in (0.0, share * states / 2**20):
        meta = metanetwork(graph, layers=5, keep_mb=keep_mb)
        gradients.append(torch.autograd.grad(loss_of(meta, graph), list(meta.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_one_buffer_whatever_the_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers held between forward and backward: one state per edge and those that were asked for, no more."""
    graph = graph_of(small(nn.Conv2d(6, 200, 1), nn.Conv2d(200, 200, 1), nn.Conv2d(200, 6, 1)))
    state = 32 * sum(e[..., 0].numel() for e in graph.edge_features)
    tapes: list[EdgeTape] = []
    monkeypatch.setattr(gmn.metanetwork, "EdgeTape", lambda *a, **k: tapes.append(EdgeTape(*a, **k)) or tapes[-1])
    for layers, room, expected in ((1, 0, 1), (6, 0, 1), (6, 2.5, 3), (3, 99, 3)):
        meta = metanetwork(graph, layers=layers, hidden=32, keep_mb=room * state * 8 / 2**20)
        by_autograd: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=by_autograd: (s.append(x.numel()), x)[1], _same):
            new = meta(graph)
        held = [*tapes[-1].states, *(e for kept in tapes[-1].kept.values() for e in kept)]
        assert sum(e.numel() for e in held) == expected * state
        assert max(by_autograd) < state / 4
        del new


def _same(x: Tensor) -> Tensor:
    return x


def results_of(graph: NetworkGraph, **options: object) -> list[Tensor]:
    """What a metanetwork adds to all features, and the gradients of its parameters, in the graph's precision."""
    meta = metanetwork(graph, layers=4, hidden=16, **options).to(graph.node_features.dtype)
    new = meta(graph)
    changes = [new.node_features - graph.node_features]
    changes += [a - b for a, b in zip(new.edge_features, graph.edge_features, strict=True)]
    return [*changes, *torch.autograd.grad(loss_of(meta, graph), list(meta.parameters()))]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative distance of two tensors."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b).detach().norm() / b.detach().norm().clamp(min=1e-9)) for a, b in pairs)


MODELS = {
    "residual": lambda: small(Residual()),
    "depthwise": lambda: small(depthwise()[1]),
    "grouped": lambda: small(Residual(groups=3)),
    "resnet20": lambda: build_network("cifar.resnet20", num_classes=10, in_channels=3, options={"shortcut": "A"}),
}
OPTIONS = [{"backend": "pyg"}, {}, {"max_chunk_mb": 1e-3}, {"keep_mb": 0.0}]
SOAK = pytest.mark.soak
COMPILED = [pytest.param(name, {"compile": True}, marks=() if name == "residual" else SOAK) for name in MODELS]
CASES = [*product(MODELS, OPTIONS), *COMPILED]  # kernels take a quarter of a minute for each network


@pytest.mark.parametrize(("model", "options"), CASES, ids=str)
def test_five_digits_in_single_precision(model: str, options: dict[str, object]) -> None:
    """Not of the output, most of which is the input: of what is added to it, and of every gradient."""
    if options.get("compile") and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    torch.manual_seed(0)
    graph = graph_of(MODELS[model]().eval())
    reference = results_of(graph, backend="pyg")
    single = graph.replace(graph.node_features.float(), tuple(e.float() for e in graph.edge_features))
    loose = options.get("backend") == "pyg" and model == "resnet20"  # it sums one by one, in single precision
    assert apart(results_of(single, **options), reference) < (1e-3 if loose else 1e-5)


def test_states_in_bfloat16() -> None:
    """Half the memory, two digits, and gradients that point the same way."""
    graph = graph_of(small(Residual(), depthwise()[1], Residual(groups=3)))
    graph = graph.replace(graph.node_features.float(), tuple(e.float() for e in graph.edge_features))
    exact, rounded = results_of(graph), results_of(graph, bf16=True)
    assert 1e-4 < apart(rounded, [x.double() for x in exact]) < 0.05
    for keep_mb in (0.0, 0.01):
        again = results_of(graph, bf16=True, keep_mb=keep_mb)
        assert all(torch.equal(one, other) for one, other in zip(rounded, again, strict=True))


def test_what_it_refuses() -> None:
    graph = graph_of(small(Residual(4), width=4))
    meta = metanetwork(graph)
    loss = loss_of(meta, graph)
    loss.backward(retain_graph=True)
    with pytest.raises(ConversionError, match="used up by an earlier backward pass"):
        loss.backward()
    wanted = graph.replace(graph.node_features, tuple(e.clone().requires_grad_() for e in graph.edge_features))
    with pytest.raises(ConversionError, match="use backend: pyg"):
        meta(wanted)
    with torch.no_grad():
        meta(wanted)


def test_parameters_must_stay_until_the_backward_pass() -> None:
    """It computes again what it did not keep, with the parameters that it finds then."""
    graph = graph_of(small(Residual(4), width=4))
    meta = metanetwork(graph)
    own = {name: p.detach().clone().requires_grad_() for name, p in meta.named_parameters()}
    loss = torch.func.functional_call(meta, own, (graph,)).node_features.sum()
    with pytest.raises(ConversionError, match="other parameters than in the forward pass"):
        loss.backward()
    loss = loss_of(meta, graph)
    with torch.no_grad():
        meta.edge_encoders["3x3"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nodes_alone_have_gradients_too() -> None:
    """A loss that never looks at an edge."""
    graph = graph_of(small(Residual(4), width=4))
    gradients = []
    for backend in ("blocks", "pyg"):
        meta = metanetwork(graph, backend=backend)
        found = torch.autograd.grad(
            meta(graph).node_features.square().sum(), list(meta.parameters()), allow_unused=True
        )
        gradients.append([torch.zeros(()) if g is None or not g.any() else g for g in found])
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-10)
