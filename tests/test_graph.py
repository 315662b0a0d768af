"""Contract of `gmn.graph`.

* An edge points from the input channel (`edge_index[0]`) to the output channel (`edge_index[1]`).
* Networks of the papers have the node and edge counts of the papers.
* `to_state_dict` is differentiable: each gradient lands on the feature its parameter was read from, nowhere else.
* `permute` reorders channels without changing the function, and refuses an order that has no block form.
* `validate` names what is wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import FlatVGG, depthwise, graph_of, network, randomise

from gmn.convert import to_graph, to_model
from gmn.errors import ConversionError
from gmn.graph import EdgeBlock, NetworkGraph, NodeGroup


def four_nodes() -> NetworkGraph:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 3.0]]))
        model[0].bias.fill_(5.0)
        model[1].weight.fill_(7.0)
    return to_graph(model, torch.zeros(1, 2), layout="cnn")


def test_a_graph_of_four_nodes_written_out() -> None:
    graph = four_nodes()
    absent = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert graph.spec.edge_index().tolist() == [[0, 1, 2], [2, 2, 3]]
    assert graph.node_features.tolist() == [absent, absent, [*absent[:8], 5.0], absent]
    assert [edges.tolist() for edges in graph.edge_features] == [[[[[2.0], [3.0]]]], [[[[7.0]]]]]
    assert graph.spec.groups == (
        NodeGroup("input", 0, 2, "input"),
        NodeGroup("0", 2, 1, "linear"),
        NodeGroup("1", 3, 1, "linear"),
    )
    assert graph.spec.blocks == (
        EdgeBlock("0.weight", (0, 2), (2, 1), 1, (1,)),
        EdgeBlock("1.weight", (2, 1), (3, 1), 1, (1,)),
    )
    assert graph.spec.frozen == (((0, 2), "network input"), ((3, 1), "network output"))


@pytest.mark.parametrize("groups", [1, 2])
def test_an_edge_starts_at_the_input_channel(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False, groups=groups)
    with torch.no_grad():
        conv.weight.zero_()[5, 1] = 1.0  # the last output reads input 1, or input 1 of the last group
    graph = to_graph(nn.Sequential(conv, nn.BatchNorm2d(6)), torch.zeros(1, 4, 3, 3))
    values = torch.cat([edges.flatten(0, 2) for edges in graph.edge_features])
    (edge,) = values.any(1).nonzero().flatten().tolist()
    source, target = graph.spec.edge_index()[:, edge].tolist()
    assert (source, target) == (1 if groups == 1 else 3, 4 + 5)


# Sizes


def resnet56_sizes() -> tuple[int, int]:
    nodes, edges, width = 3 + 16 + 10, 3 * 16 + 64 * 10, 16
    for out in (16, 32, 64):
        nodes += 9 * 2 * out
        edges += 2 * width * out + (2 * 8 + 1 + 8) * out * out  # first block and its residual; all others
        width = out
    return nodes, edges


def vgg19_sizes() -> tuple[int, int]:
    channels = [3, *[64] * 2, *[128] * 2, *[256] * 4, *[512] * 8, 100]
    return sum(channels), sum(a * b for a, b in itertools.pairwise(channels))


def resnet50_sizes() -> tuple[int, int]:
    nodes, edges, into = 3 + 64 + 1000, 3 * 64 + 2048 * 1000, 64
    for count, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        nodes += count * 6 * width
        edges += 5 * into * width + 5 * width * width  # into -> width -> width -> 4 width, into -> 4 width
        edges += (count - 1) * (9 * width * width + 4 * width)
        into = 4 * width
    return nodes, edges


@pytest.mark.parametrize(
    ("name", "layout", "sizes", "counted", "kinds"),
    [
        ("resnet56A", "resnet56", resnet56_sizes, (2_045, 140_720, 83), {"3x3": 9}),
        ("vgg19_bn", "vgg19", vgg19_sizes, (5_607, 2_275_520, 17), {"3x3": 9}),
        ("resnet50", "resnet50", resnet50_sizes, (23_723, 15_445_184, 54), {"1": 1, "3x3": 9, "7x7": 49}),
    ],
)
def test_sizes_of_the_paper(
    name: str, layout: str, sizes: Callable[[], tuple[int, int]], counted: tuple[int, int, int], kinds: dict[str, int]
) -> None:
    spec = graph_of(name, layout).spec
    dense = [block for block in spec.blocks if block.form == "dense"]
    assert (spec.num_nodes, spec.num_edges) == sizes() == counted[:2]
    assert len(dense) == counted[2]
    assert spec.edge_kinds == kinds
    assert len(spec.columns) == (5 if layout == "vgg19" else 8)
    diagonal = sum(block.pieces for block in spec.blocks if block.form == "diagonal")
    assert diagonal == spec.num_edges - sum(torch.Size(b.shape[:3]).numel() for b in dense)
    assert diagonal == (11_264 if name == "resnet50" else 0)


def test_edge_index_lists_the_blocks_in_order() -> None:
    graph = graph_of("resnet20B")
    index, start = graph.spec.edge_index(), 0
    assert index.shape == (2, graph.spec.num_edges)
    for block in graph.spec.blocks:
        stop = start + torch.Size(block.shape[:3]).numel()
        for side, (first, size) in zip(index[:, start:stop], (block.src, block.dst), strict=True):
            assert side.unique().tolist() == list(range(first, first + size)), block.name
        start = stop


# Differentiability


@pytest.mark.parametrize(
    ("name", "layout"), [("resnet20A", "resnet56"), ("resnet20B", "generic"), ("mobilenet_v2", "generic")]
)
def test_gradients_land_on_the_features_of_their_parameter(name: str, layout: str) -> None:
    graph = graph_of(name, layout)
    nodes = graph.node_features.clone().requires_grad_()
    edges = tuple(e.clone().requires_grad_() for e in graph.edge_features)
    state = graph.replace(nodes, edges).to_state_dict()
    model = network(name)[0]
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in state.items()}
    generator = torch.Generator().manual_seed(0)
    wanted = {n: torch.randn(value.shape, generator=generator) for n, value in state.items()}
    sum((wanted[n] * value).sum() for n, value in state.items()).backward()
    grads = [torch.zeros_like(e) if e.grad is None else e.grad for e in edges]
    assert nodes.grad is not None
    found = graph.replace(nodes.grad, tuple(grads)).to_state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    # paddings, identities and running statistics get nothing
    landed = nodes.grad.square().sum() + sum(g.square().sum() for g in grads)
    assert torch.isclose(landed, sum((w.square().sum() for w in wanted.values()), torch.tensor(0.0)))


# Permutation


def swapped(graph: NetworkGraph, *names: str) -> Tensor:
    """The order that reverses the nodes of these groups."""
    order = torch.arange(graph.spec.num_nodes)
    for group in graph.spec.groups:
        if group.name in names:
            part = slice(group.start, group.start + group.size)
            order[part] = order[part].flip(0)
    return order


def plain_statistics(model: nn.Module) -> nn.Module:
    """Equal running statistics in each norm: those stay with the origin and would not follow a permutation."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.1)
            module.running_var.fill_(0.8)
    return model


@pytest.mark.parametrize("layout", ["generic", "resnet56"])
def test_permuted_inner_channels_compute_the_same(layout: str) -> None:
    model = network("resnet20B")[0]
    model = plain_statistics(to_model(to_graph(model, network("resnet20B")[1])))
    x = torch.randn(2, 3, 32, 32)
    graph = to_graph(model, x, layout=layout)
    order = swapped(graph, "layer1.0.conv1", "layer3.2.conv1")
    permuted = to_model(graph.permute(order))
    assert not torch.equal(permuted.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
    assert torch.equal(permuted.layer1[0].conv1.weight, model.layer1[0].conv1.weight.flip(0))
    assert torch.allclose(permuted(x), model(x), rtol=1e-4, atol=1e-4)


def test_permuting_twice_with_the_inverse_order_is_the_identity() -> None:
    graph = to_graph(depthwise(), torch.randn(1, 3, 8, 8))
    order = swapped(graph, "3", "6", "0")
    assert order.tolist() != list(range(len(order)))
    back = graph.permute(order).permute(order.argsort())
    assert torch.equal(back.node_features, graph.node_features)
    assert all(torch.equal(a, b) for a, b in zip(back.edge_features, graph.edge_features, strict=True))


def test_depthwise_channels_permute_with_their_source() -> None:
    model = plain_statistics(depthwise())
    x = torch.randn(2, 3, 8, 8)
    graph = to_graph(model, x)
    both = to_model(graph.permute(swapped(graph, "3", "6")))
    assert torch.equal(both[6].weight, model[6].weight.flip(0))
    assert torch.allclose(both(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConversionError, match="permuted alike"):
        graph.permute(swapped(graph, "6"))


def test_a_permutation_across_layers_is_refused() -> None:
    graph = graph_of("resnet20B")
    order = torch.arange(graph.spec.num_nodes)
    order[[3, 19]] = order[[19, 3]]  # conv1 and layer1.0.conv1
    with pytest.raises(ConversionError, match="keep nodes in the range of each block"):
        graph.permute(order)


# Checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.replace(g.node_features[:-1], g.edge_features), r"node_features: expected \(4, 9\); got \(3, 9\)"),
        (lambda g: g.replace(g.node_features, g.edge_features[:1]), "number of edge feature tensors: expected 2"),
        (
            lambda g: g.replace(g.node_features, (g.edge_features[0].mT, g.edge_features[1])),
            r"edge_features of 0\.weight: expected \(1, 1, 2, 1\); got \(1, 1, 1, 2\)",
        ),
        (
            lambda g: dataclasses.replace(
                g, spec=dataclasses.replace(g.spec, blocks=(EdgeBlock("far", (3, 2), (2, 1), 1, (1,)),) * 2)
            ),
            "outside the nodes.*far",
        ),
        (lambda g: g.replace(g.node_features, (g.edge_features[0], g.edge_features[1] / 0)), r"not finite.*1\.weight"),
        (lambda g: g.replace(g.node_features.log(), g.edge_features), "not finite"),
    ],
)
def test_validate_names_what_is_wrong(change: Callable[[NetworkGraph], NetworkGraph], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        change(four_nodes()).validate()


def test_the_summary_says_what_is_carried() -> None:
    model = randomise(FlatVGG())
    summary = to_graph(model, torch.zeros(1, 3, 8, 8)).summary()
    assert "37 nodes in 5 groups" in summary
    assert "280 edges in 4 blocks" in summary
    assert "3x3 (9), 4 (4), 1 (1)" in summary
    assert "in the graph: 1,674 of 1,674 parameters (100.0%)" in summary
    assert "carried through unchanged: 0 in 0 tensors, and 2 buffers" in summary
