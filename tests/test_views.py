"""Contract of `gmn.views`.

* PyTorch Geometric: a valid `Data`; edges point from source to target; padded and ragged features agree.
* networkx, layers: an edge for each block and each pair of groups that it joins, and no other.
* networkx, neurons: the same edges as `edge_index`, with the same features.
* What would not fit into memory is refused before it is allocated.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch
from zoo import graph_of

from gmn.address import EdgeSlot
from gmn.errors import ConversionError
from gmn.graph import EdgeBlock, GraphSpec, NetworkGraph, NodeGroup


def graph_from(groups: dict[str, int], blocks: list[EdgeBlock], identities: tuple[str, ...] = ()) -> NetworkGraph:
    """A graph with these groups and blocks; every number in it is another one."""
    starts = [sum(list(groups.values())[:i]) for i in range(len(groups))]
    made = tuple(NodeGroup(n, s, size, "conv") for s, (n, size) in zip(starts, groups.items(), strict=True))
    weights = (i for i, block in enumerate(blocks) if block.name not in identities)
    slots = tuple(EdgeSlot(f"w{i}", i, blocks[i].shape, (0, 1), ((0, 1, 1),), ((0, 1, 1),), (0,)) for i in weights)
    spec = GraphSpec(made, tuple(blocks), (), slots, ("bias", "scale"), (0.0, 1.0), {}, {}, (), ())
    nodes = torch.arange(2.0 * spec.num_nodes).view(-1, 2)
    edges = tuple(100 * (i + 1) + torch.arange(float(torch.Size(b.shape).numel())) for i, b in enumerate(blocks))
    return NetworkGraph(spec, nodes, tuple(e.view(b.shape) for e, b in zip(edges, blocks, strict=True)))


def four_nodes() -> NetworkGraph:
    """Two inputs, a neuron that reads both through two taps, and one that reads the neuron and the second input."""
    blocks = [
        EdgeBlock("a", (0, 2), (2, 1), 1, (2,)),
        EdgeBlock("b", (2, 1), (3, 1), 1, (1,)),
        EdgeBlock("skip", (1, 1), (3, 1), 1, (1,)),
    ]
    return graph_from({"input": 2, "hidden": 1, "out": 1}, blocks, identities=("skip",))


# PyTorch Geometric


def test_four_nodes_for_pyg() -> None:
    data = four_nodes().to_pyg()
    assert data.validate(raise_on_error=True)
    assert data.num_nodes == 4
    assert data.x.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert data.edge_index.tolist() == [[0, 1, 2, 1], [2, 2, 3, 3]]
    assert data.edge_attr.tolist() == [[100, 101], [102, 103], [200, 0], [300, 0]]
    assert (data.kinds, data.edge_kind.tolist()) == (["2", "1"], [0, 0, 1, 1])
    assert (data.block_names, data.edge_block.tolist()) == (["a", "b", "skip"], [0, 0, 1, 2])
    assert (data.group_names, data.node_group.tolist()) == (["input", "hidden", "out"], [0, 0, 1, 2])
    assert data.columns == ["bias", "scale"]


def test_four_nodes_for_pyg_without_padding() -> None:
    data = four_nodes().to_pyg(padded=False)
    assert data.validate(raise_on_error=True)
    assert "edge_attr" not in data
    assert data.edge_attr_0.tolist() == [[100, 101], [102, 103]]
    assert data.edge_attr_1.tolist() == [[200], [300]]


@pytest.mark.parametrize("name", ["resnet20B", "mobilenet_v2"])
def test_padded_and_ragged_features_agree(name: str) -> None:
    graph = graph_of(name)
    padded, ragged = graph.to_pyg(), graph.to_pyg(padded=False)
    assert padded.validate(raise_on_error=True)
    assert ragged.validate(raise_on_error=True)
    assert torch.equal(padded.edge_index, graph.spec.edge_index())
    assert len(padded.kinds) > 1
    for kind, name in enumerate(padded.kinds):
        rows, width = padded.edge_attr[padded.edge_kind == kind], graph.spec.edge_kinds[name]
        assert torch.equal(rows[:, :width], ragged[f"edge_attr_{kind}"])
        assert not rows[:, width:].any()


def test_the_edges_of_a_block_are_its_features() -> None:
    graph = graph_of("mobilenet_v2")
    data = graph.to_pyg()
    for block in (0, 1, len(graph.spec.blocks) - 1):  # dense, depthwise, linear
        features = graph.edge_features[block].flatten(0, 2)
        assert torch.equal(data.edge_attr[data.edge_block == block][:, : features.shape[1]], features)


@pytest.mark.parametrize("padded", [True, False])
def test_gradients_flow_back(padded: bool) -> None:
    graph = four_nodes()
    edges = tuple(e.requires_grad_() for e in graph.edge_features)
    data = graph.replace(graph.node_features.requires_grad_(), edges).to_pyg(padded=padded)
    attributes = [data[key] for key in sorted(data.to_dict()) if key.startswith("edge_attr")]
    sum((a.square().sum() for a in [data.x, *attributes]), torch.tensor(0.0)).backward()
    for tensor in (graph.node_features, *edges):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, 2 * tensor)


def test_ragged_graphs_can_be_batched() -> None:
    one, two = four_nodes(), four_nodes()
    two = two.replace(two.node_features, tuple(-e for e in two.edge_features))
    batch = Batch.from_data_list([one.to_pyg(padded=False), two.to_pyg(padded=False)])
    assert batch.edge_index[:, batch.edge_kind == 1].T.tolist() == [[2, 3], [1, 3], [6, 7], [5, 7]]
    assert batch.edge_attr_1.flatten().tolist() == [200, 300, -200, -300]


def test_too_much_padding_is_refused() -> None:
    """Of 58 GB in features of which not one is stored."""
    side = 40_000
    graph = graph_from({"a": 1, "b": 1}, [EdgeBlock("w", (0, 1), (1, 1), 1, (3, 3))])
    block = EdgeBlock("w", (0, side), (side, side), 1, (3, 3))
    groups = NodeGroup("a", 0, side, "input"), NodeGroup("b", side, side, "conv")
    spec = dataclasses.replace(graph.spec, groups=groups, blocks=(block,))
    huge = NetworkGraph(spec, torch.zeros(2 * side, 2), (torch.zeros(1).expand(block.shape),))
    with pytest.raises(ConversionError, match=r"at most 4\.3 GB; got 57\.6 GB .* 9 features; use padded=False"):
        huge.to_pyg()


# networkx, layers


def layer_edges(graph: NetworkGraph) -> set[tuple[str, str, str]]:
    layers = graph.to_networkx()
    name = layers.nodes(data="name")
    return {(name[source], name[target], block) for source, target, block in layers.edges(data="name")}


def test_layers_of_a_residual_network() -> None:
    layers = graph_of("resnet20B").to_networkx()
    names = dict(layers.nodes(data="name"))
    assert layers.nodes[2] == {"name": "layer1.0.conv1", "kind": "conv", "size": 16, "start": 19}
    found = {(names[s], names[t]): e for s, t, e in layers.edges(data=True)}
    assert found["conv1", "layer1.0.conv1"] == {
        **{"name": "layer1.0.conv1.weight", "kind": "3x3", "form": "dense", "kernel": (3, 3)},
        **{"shape": (1, 16, 16, 9), "identity": False},
    }
    residual = found["conv1", "layer1.0.conv2"]
    assert (residual["form"], residual["kernel"], residual["identity"]) == ("diagonal", (1,), True)
    shortcut = found["layer1.2.conv2", "layer2.0.conv2"]
    assert (shortcut["kind"], shortcut["identity"]) == ("1", False)
    convs = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
    chain = ["input", "conv1", *convs, "linear"]
    assert set(found) == {*pairwise(chain), *zip(chain[1:-2:2], chain[3::2], strict=True)}


@pytest.mark.parametrize(
    ("block", "pairs"),
    [
        (EdgeBlock("whole", (0, 4), (4, 4), 1, (1,)), {"ac", "ad", "bc", "bd"}),
        (EdgeBlock("grouped", (0, 4), (4, 4), 2, (1,)), {"ac", "bd"}),
        (EdgeBlock("depthwise", (0, 4), (4, 4), 4, (1,)), {"ac", "bd"}),
        (EdgeBlock("shifted", (1, 3), (4, 3), 3, (1,)), {"ac", "bc", "bd"}),
        (EdgeBlock("part", (1, 1), (6, 2), 1, (1,)), {"ad"}),
    ],
    ids=lambda value: value.name if isinstance(value, EdgeBlock) else "",
)
def test_a_block_joins_the_groups_that_its_edges_join(block: EdgeBlock, pairs: set[str]) -> None:
    graph = graph_from({"a": 2, "b": 2, "c": 2, "d": 2}, [block])
    assert layer_edges(graph) == {(*pair, block.name) for pair in pairs}
    group = graph.to_pyg().node_group  # the same, neuron by neuron
    assert {"abcd"[s] + "abcd"[t] for s, t in group[graph.spec.edge_index()].T.tolist()} == pairs


# networkx, neurons


def test_neurons_of_four_nodes() -> None:
    neurons = four_nodes().to_networkx("neuron")
    assert dict(neurons.nodes(data=True))[2] == {"features": [4.0, 5.0], "group": 1}
    assert neurons.graph["columns"] == ("bias", "scale")
    edges = {(s, t): features for s, t, features in neurons.edges(data="features")}
    assert edges == {(0, 2): [100.0, 101.0], (1, 2): [102.0, 103.0], (2, 3): [200.0], (1, 3): [300.0]}


def test_neurons_have_the_edges_of_edge_index() -> None:
    graph = graph_of("resnet20A")
    neurons = graph.to_networkx("neuron")
    assert list(neurons) == list(range(graph.spec.num_nodes))
    found: Tensor = torch.tensor([(block, s, t) for s, t, block in neurons.edges(keys=True)])
    data = graph.to_pyg(padded=False)
    expected = torch.stack([data.edge_block, *data.edge_index], dim=1)
    assert torch.equal(found.unique(dim=0), expected.unique(dim=0))
    assert len(found) == len(expected)


def test_too_many_neurons_are_refused() -> None:
    graph = graph_from({"a": 1001, "b": 1000}, [EdgeBlock("w", (0, 1001), (1001, 1000), 1, (1,))])
    with pytest.raises(ConversionError, match=r'at most 1,000,000; got 1,001,000; use level="layer"'):
        graph.to_networkx("neuron")
    assert graph.to_networkx().number_of_edges() == 1


def test_an_unknown_level() -> None:
    with pytest.raises(ConversionError, match="expected layer or neuron; got 'block'"):
        four_nodes().to_networkx("block")  # pyright: ignore[reportArgumentType]
