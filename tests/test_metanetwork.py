"""Contract of `gmn.metanetwork`, `gmn.layers` and `gmn.layers_pyg`.

* Edge blocks and PyTorch Geometric compute the same, forward and backward.
* Both compute what the paper writes, checked against loops over four nodes.
* Reordering the channels of the network reorders the result, and nothing else.
* With `zero_init` the metanetwork starts as the identity; identity edges never change.
* A graph of another layout is refused with what was expected and what was found.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, Literal

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import FlatVGG, Residual, depthwise, graph_of, randomise, small

from gmn.convert import to_graph, to_model
from gmn.errors import ConversionError
from gmn.graph import GraphSpec, NetworkGraph, NodeGroup
from gmn.groups import parametric
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig

IMAGES = torch.zeros(1, 3, 8, 8)
SMALL = {
    "depthwise": depthwise,
    "grouped": lambda: small(Residual(groups=3)),
    "flat": lambda: randomise(FlatVGG()),
    "attention": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=3, num_classes=5
    ).eval(),
}


@cache
def subject(name: str) -> NetworkGraph:
    if name in SMALL:
        return to_graph(SMALL[name](), IMAGES)
    return graph_of(name, "resnet56" if name == "resnet20A" else "generic")


def metanetwork(spec: GraphSpec, **options: Any) -> MetaNetwork:
    torch.manual_seed(0)
    chosen = {"layers": 2, "hidden": 8, "zero_init": False, "node_ratio": 0.3, "edge_ratio": 0.2, **options}
    return MetaNetwork(MetaNetworkConfig(len(spec.columns), spec.edge_kinds, **chosen))


def double(graph: NetworkGraph) -> NetworkGraph:
    return graph.replace(graph.node_features.double(), tuple(e.double() for e in graph.edge_features))


def with_backend(meta: MetaNetwork, backend: Literal["blocks", "pyg"]) -> MetaNetwork:
    meta.config = dataclasses.replace(meta.config, backend=backend)
    return meta


def features(graph: NetworkGraph) -> list[Tensor]:
    return [graph.node_features, *graph.edge_features]


def deltas(new: NetworkGraph, old: NetworkGraph) -> list[Tensor]:
    return [a - b for a, b in zip(features(new), features(old), strict=True)]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative distance, by tensor."""
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, wanted, strict=True))


# The two backends

GRAPHS = ["resnet20A", "resnet20B", *SMALL]


@pytest.mark.parametrize("name", GRAPHS)
def test_backends_agree(name: str) -> None:
    graph = double(subject(name))
    meta = metanetwork(graph.spec).double()
    results = {}
    for backend in ("blocks", "pyg"):
        change = deltas(with_backend(meta, backend)(graph), graph)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (d * torch.randn(d.shape, generator=generator, dtype=torch.float64)).sum() / d.numel() for d in change
        )
        assert isinstance(loss, Tensor)
        results[backend] = [d.detach() for d in change], list(torch.autograd.grad(loss, list(meta.parameters())))
    (outputs, grads), (reference, reference_grads) = results["blocks"], results["pyg"]
    assert distance(outputs, reference) < 1e-8
    assert distance(grads, reference_grads) < 1e-8
    assert float(reference[0].norm()) > 1
    assert all(float(g.norm()) > 0 for g in reference_grads)


@pytest.mark.parametrize("name", GRAPHS)
def test_backends_agree_in_single_precision(name: str) -> None:
    graph = subject(name)
    meta = metanetwork(graph.spec, node_ratio=0.05, edge_ratio=0.05)
    with torch.no_grad():
        blocks, pyg = (features(with_backend(meta, backend)(graph)) for backend in ("blocks", "pyg"))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(blocks, pyg, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(blocks, features(graph), strict=True))


# What the paper writes


def four_nodes(weights: list[float], alone: bool) -> NetworkGraph:
    """Two inputs, one hidden and one output neuron; perhaps a fifth node without any edge."""
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weights]))
        model[0].bias.fill_(0.4)
        model[2].weight.fill_(-0.7)
        model[2].bias.fill_(0.1)
    graph = to_graph(model, torch.zeros(1, 2).double())
    if not alone:
        return graph
    spec = dataclasses.replace(graph.spec, groups=(*graph.spec.groups, NodeGroup("alone", 4, 1, "opaque")))
    nodes = torch.cat([graph.node_features, graph.node_features[2:3] + 0.3])
    return dataclasses.replace(graph, spec=spec, node_features=nodes).validate()


def statistics(messages: list[Tensor], hidden: int) -> Tensor:
    """[mean, std, max, min] as torch-geometric takes them; zeros where there is no message."""
    if not messages:
        return torch.zeros(4 * hidden, dtype=torch.float64)
    columns: list[list[float]] = [[], [], [], []]
    for h in range(hidden):
        values = [float(message[h]) for message in messages]
        mean = sum(values) / len(values)
        variance = sum(value * value for value in values) / len(values) - mean * mean
        deviation = max(variance, 1e-5) ** 0.5
        parts = mean, 0.0 if variance <= 1e-5 else deviation, max(values), min(values)
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    return torch.tensor([value for column in columns for value in column], dtype=torch.float64)


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()


def literal(meta: MetaNetwork, graph: NetworkGraph) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
    """The metanetwork of the paper, node by node and edge by edge."""
    hidden, config = meta.config.hidden, meta.config
    pairs = [(int(a), int(b)) for a, b in graph.spec.edge_index().T]
    flat = [row for e in graph.edge_features for row in e.flatten(0, 2)]
    v = [meta.node_encoder(row) for row in graph.node_features]
    e = {pair: meta.edge_encoders["1"](row) for pair, row in zip(pairs, flat, strict=True)}
    inv = torch.tensor([1.0] * (hidden // 2) + [-1.0] * (hidden // 2), dtype=torch.float64)
    for layer in meta.layers:
        v = [layer_norm(state) for state in v]
        a, b, c, d = (
            [F.silu(linear[0](state)) for state in v]
            for linear in (layer.receive, layer.send, layer.edge_left, layer.edge_right)
        )
        new = []
        for i, state in enumerate(v):
            along = [a[i] * b[j] * e[j, t] for j, t in pairs if t == i]
            against = [a[i] * b[j] * (e[s, j] * inv) for s, j in pairs if s == i]
            update = layer.aggregate(statistics(along, hidden)) + layer.aggregate(statistics(against, hidden))
            new.append(state + update)
        e = {(j, i): s + c[i] * d[j] * s + c[j] * d[i] * (s * inv) * inv for (j, i), s in e.items()}
        v = new
    nodes = [
        row + config.node_ratio * meta.node_decoder[3](F.silu(meta.node_decoder[1](layer_norm(state))))
        for row, state in zip(graph.node_features, v, strict=True)
    ]
    decoder = meta.edge_decoders["1"]
    assert isinstance(decoder, nn.Sequential)
    edges = {
        pair: row + config.edge_ratio * decoder[3](F.silu(decoder[1](layer_norm(e[pair]))))
        for pair, row in zip(pairs, flat, strict=True)
    }
    return nodes, edges


@pytest.mark.parametrize("backend", ["blocks", "pyg"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("weights", [[2.0, -1.5], [2.0, 2.0001]])  # apart, and too close for a standard deviation
@torch.no_grad()
def test_the_metanetwork_of_the_paper(backend: Any, layers: int, alone: bool, weights: list[float]) -> None:
    graph = four_nodes(weights, alone)
    meta = metanetwork(graph.spec, layers=layers, hidden=4, backend=backend).double()
    result = meta(graph)
    nodes, edges = literal(meta, graph)
    assert torch.allclose(result.node_features, torch.stack(nodes), rtol=1e-9, atol=1e-12)
    found = torch.cat([e.flatten(0, 2) for e in result.edge_features])
    assert torch.allclose(found, torch.stack(list(edges.values())), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(result.node_features, graph.node_features, rtol=1e-3)


def test_a_variance_below_the_floor_counts_as_none() -> None:
    close, apart = ([torch.tensor([x], dtype=torch.float64) for x in values] for values in ([2.0, 2.0001], [2.0, -1.5]))
    assert statistics(close, 1)[1] == 0
    assert statistics(apart, 1)[1] == pytest.approx(1.75)


# Equivariance


@pytest.mark.parametrize("name", ["resnet20A", "depthwise"])
def test_reordered_channels_reorder_the_result(name: str) -> None:
    graph = double(subject(name))
    meta = metanetwork(graph.spec).double()
    generator = torch.Generator().manual_seed(2)
    order = torch.arange(graph.spec.num_nodes)
    if name == "depthwise":  # both sides of the kernel alike
        by_name = {group.name: group for group in graph.spec.groups}
        inner = torch.randperm(12, generator=generator)
        for group in (by_name["3"], by_name["6"]):
            order[group.start : group.start + 12] = group.start + inner
    else:
        for group in graph.spec.groups:
            part = group.start + torch.randperm(group.size, generator=generator)
            order[group.start : group.start + group.size] = part
    assert not torch.equal(order, torch.arange(len(order)))
    with torch.no_grad():
        first, second = meta(graph.permute(order)), meta(graph).permute(order)
    assert distance(features(first), features(second)) < 1e-12
    assert distance(features(first), features(graph)) > 1e-3


# The start


@pytest.mark.parametrize("name", GRAPHS)
def test_zero_init_is_the_identity_and_learns(name: str) -> None:
    graph = subject(name)
    meta = metanetwork(graph.spec, zero_init=True)
    result = meta(graph)
    assert all(torch.equal(a, b) for a, b in zip(features(result), features(graph), strict=True))
    assert all(torch.equal(p, graph.to_state_dict().get(n, p)) for n, p in to_model(result).named_parameters())
    sum(value.square().sum() for value in result.to_state_dict().values()).backward()
    for decoder in (meta.node_decoder, *meta.edge_decoders.values()):
        assert isinstance(decoder, nn.Sequential)
        last = decoder[3]
        assert isinstance(last, nn.Linear)
        assert last.weight.grad is not None
        assert float(last.weight.grad.norm()) > 0
        assert not last.weight.any()
        assert not last.bias.any()


@pytest.mark.parametrize("name", ["resnet20A", "resnet20B"])
@torch.no_grad()
def test_identity_edges_stay(name: str) -> None:
    graph = subject(name)
    result = metanetwork(graph.spec)(graph)
    weights = parametric(graph.spec)
    pairs = list(zip(graph.edge_features, result.edge_features, strict=True))
    assert [i for i, (old, new) in enumerate(pairs) if torch.equal(old, new)] == [
        i for i in range(len(pairs)) if i not in weights
    ]
    assert len(weights) < len(pairs)
    assert result.spec is graph.spec


def test_ratios_scale_the_change() -> None:
    graph = double(subject("flat"))
    with torch.no_grad():
        one, two = (
            deltas(metanetwork(graph.spec, node_ratio=ratio, edge_ratio=3 * ratio).double()(graph), graph)
            for ratio in (0.1, 0.2)
        )
    assert distance([2 * d for d in one], two) < 1e-9


def test_wide_edges_get_a_layer_in_between() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(4, 2))
    graph = to_graph(model, torch.zeros(1, 3, 16, 16))
    meta = metanetwork(graph.spec)
    assert graph.spec.edge_kinds == {"16x16": 256, "1": 1}
    assert isinstance(meta.edge_encoders["16x16"], nn.Sequential)
    assert isinstance(meta.edge_encoders["1"], nn.Linear)
    assert meta(graph).edge_features[0].shape == (1, 4, 3, 256)


# Errors


def test_wrong_graphs_are_refused() -> None:
    meta = metanetwork(subject("resnet20B").spec)
    with pytest.raises(ConversionError, match="expected 15 node features; got 5"):
        meta(graph_of("resnet20B", "vgg19"))
    with pytest.raises(ConversionError, match="never learnt: expected 3x3, 1; got 7x7"):
        meta(graph_of("resnet18"))
    with pytest.raises(ConversionError, match="expected an even hidden size; got 5"):
        metanetwork(subject("flat").spec, hidden=5)
