"""Graphs in files.

* a graph file and a freshly built network give the first network back, bit for bit: numbers, types, buffers, ties
* a weight that is used twice is stored once
* a file that is torn, foreign, of another version or hostile is a CheckpointError, never another exception
* a failed write leaves the old file as it was
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from zoo import FlatVGG, depthwise, network, randomise

from gmn.convert import to_graph, to_model
from gmn.errors import CheckpointError
from gmn.graph import NetworkGraph
from gmn.graph_copies import same_bits
from gmn.graph_file import is_graph_file, load_graph, read_source, save_graph


class Small(nn.Module):
    """A bit of everything: a norm, a layer that is called twice, a lone parameter, buffers of both kinds, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc1 = nn.Linear(4, 4)
        self.fc2, self.fc3 = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.fc3.weight = self.fc2.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.tensor([1.5]))
        self.register_buffer("made", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv2(self.conv2(x).relu()).relu().mean((2, 3))
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def built(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Small(), seed)


def graph_of(model: nn.Module, *shape: int, layout: str = "generic") -> NetworkGraph:
    return to_graph(model, torch.randn(shape or (1, 3, 6, 6)), layout=layout, on_unknown="keep")


def saved(path: Path, graph: NetworkGraph) -> Path:
    save_graph(path, graph, source={"network": "small", "num_classes": 4, "options": {"depths": (1, 2)}})
    return path


def assert_same(one: nn.Module, other: nn.Module) -> None:
    expected, got = one.state_dict(), other.state_dict()
    assert expected.keys() == got.keys()
    assert [name for name in expected if not same_bits(expected[name], got[name])] == []


def assert_same_graph(one: NetworkGraph, other: NetworkGraph) -> None:
    assert one.spec == other.spec
    assert same_bits(one.node_features, other.node_features)
    assert all(map(same_bits, one.edge_features, other.edge_features))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "graph.safetensors", graph_of(built()))


# -- there and back ----------------------------------------------------------------------------------------------------


def test_bit_for_bit_with_a_freshly_built_network(file: Path) -> None:
    graph, other = graph_of(built()), built(1)
    untouched = copy.deepcopy(other)
    loaded = load_graph(file, other)
    assert_same_graph(graph, loaded)
    assert_same(built(), to_model(loaded))
    assert loaded.template is not None
    assert_same(built(), loaded.template)
    assert_same(other, untouched)
    back = to_model(loaded)
    assert back.fc2.weight is back.fc3.weight
    assert read_source(file) == {"network": "small", "num_classes": 4, "options": {"depths": [1, 2]}}


def test_without_a_network_there_is_no_template(file: Path) -> None:
    loaded = load_graph(file)
    assert_same_graph(graph_of(built()), loaded)
    assert loaded.template is None
    with pytest.raises(CheckpointError, match="has no network"):
        save_graph(file, loaded)


@pytest.mark.parametrize("make", [FlatVGG, depthwise])
def test_other_networks(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = randomise(make())
    path = saved(tmp_path / "g.safetensors", graph_of(model, 1, 3, 8, 8))
    assert_same(model, to_model(load_graph(path, randomise(make(), 1))))


def test_a_padded_layout(tmp_path: Path) -> None:
    model, x = network("resnet20A")
    graph = to_graph(model, x, layout="resnet56")
    path = saved(tmp_path / "g.safetensors", graph)
    assert_same_graph(graph, load_graph(path, model))


def test_changed_numbers_are_the_graphs_own(tmp_path: Path) -> None:
    """As after a metanetwork: the uses of one weight may differ, and then all are kept."""
    graph = graph_of(built())
    graph = graph.replace(graph.node_features * 3, tuple(e + torch.randn(e.shape) for e in graph.edge_features))
    loaded = load_graph(saved(tmp_path / "g.safetensors", graph), built(1))
    assert_same_graph(graph, loaded)
    assert_same(to_model(graph), to_model(loaded))


def test_weights_used_twice_are_stored_once(file: Path) -> None:
    twice = {slot.param for slot in graph_of(built()).spec.edge_slots if not slot.home}
    assert twice == {"conv2.weight", "fc2.weight"}
    with safetensors.safe_open(file, framework="pt") as content:
        names = list(content.keys())
    assert len([name for name in names if "conv2" in name]) == 1
    assert len([name for name in names if "fc2" in name or "fc3" in name]) == 1


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_the_type_of_the_numbers(kind: torch.dtype, tmp_path: Path) -> None:
    model = built().to(kind)
    graph = to_graph(model, torch.randn(1, 3, 6, 6, dtype=kind), on_unknown="keep")
    assert_same(model, to_model(load_graph(saved(tmp_path / "g.safetensors", graph), built(1))))


def test_parameters_of_mixed_types(tmp_path: Path) -> None:
    graph = graph_of(model := built())
    model.bn1.to(torch.float64)  # type: ignore[union-attr]
    path = saved(tmp_path / "g.safetensors", NetworkGraph(graph.spec, graph.node_features, graph.edge_features, model))
    loaded = to_model(load_graph(path, built(1)))
    assert loaded.bn1.weight.dtype == torch.float64
    assert_same(model, loaded)


def test_a_failed_write_leaves_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match="must be JSON"):
        save_graph(file, graph_of(built()), source={"options": {1.5: object()}})
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


# -- networks that do not fit ------------------------------------------------------------------------------------------


def test_another_network(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another network: parameters.*'?conv1"):
        load_graph(file, FlatVGG())
    wide = built()
    wide.fc1 = nn.Linear(4, 5)
    with pytest.raises(CheckpointError, match=r"expected fc1.weight of shape \(4, 4\); got shape \(5, 4\)"):
        load_graph(file, wide)
    without = built()
    del without.scale
    with pytest.raises(CheckpointError, match="expected scale of shape"):
        load_graph(file, without)
    more = built()
    more.register_buffer("extra", torch.ones(1))
    with pytest.raises(CheckpointError, match="expected no extra"):
        load_graph(file, more)


def test_a_graph_with_the_wrong_template_is_not_saved(tmp_path: Path) -> None:
    graph = graph_of(built())
    with pytest.raises(CheckpointError, match="another network"):
        saved(tmp_path / "g.safetensors", NetworkGraph(graph.spec, graph.node_features, graph.edge_features, FlatVGG()))
    assert list(tmp_path.iterdir()) == []


# -- files that are not what they should be ----------------------------------------------------------------------------


def parts(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safetensors.safe_open(file, framework="pt") as content:
        return content.metadata(), {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118


def rewritten(file: Path, meta: dict[str, str], tensors: dict[str, Tensor]) -> Path:
    target = file.with_name("bad.safetensors")
    safetensors.torch.save_file(tensors, target, metadata=meta)
    return target


def with_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    meta, tensors = parts(file)
    header = json.loads(meta["header"])
    change(header)
    return rewritten(file, {**meta, "header": json.dumps(header)}, tensors)


def put(where: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the header at a dotted place."""

    def change(header: Any) -> None:
        *path, last = [int(key) if key.isdecimal() else key for key in where.split("/")]
        for key in path:
            header = header[key]
        header[last] = value

    return change


BAD = {
    "spec/blocks/0/src": ([0, 10**6], "blocks[0].src"),
    "spec/blocks/0/dst": ([-1, 4], "blocks[0].dst"),
    "spec/blocks/0/pieces": (0, "blocks[0].pieces"),
    "spec/blocks/1/kernel": ([3, 10**30], "blocks[1].kernel"),
    "spec/blocks/0/kernel": ([], "blocks[0].kernel"),
    "spec/blocks/0/name": (3, "blocks.0.name"),
    "spec/groups/0/size": (-3, "groups[0]"),
    "spec/groups/1/start": (True, "groups.1.start"),
    "spec/groups": ({}, "groups"),
    "spec/edge_slots/0/block": (99, "edge_slots[0].block"),
    "spec/edge_slots/0/param": ("unused", "edge_slots[0].param"),
    "spec/edge_slots/0/shape": ([1, 4, 3, 10], "edge_slots[0].shape"),
    "spec/edge_slots/0/perm": ([0, 1, 1, 3], "edge_slots[0].perm"),
    "spec/edge_slots/0/pieces": ([1, 1], "edge_slots[0].pieces"),
    "spec/edge_slots/0/outputs": ([[0, 4, 2]], "edge_slots[0].outputs"),
    "spec/edge_slots/0/inputs": ([[0, 2, 1]], "edge_slots[0].inputs"),
    "spec/edge_slots/0/taps": ([0] * 9, "edge_slots[0].taps"),
    "spec/edge_slots/0/home": (False, "home of conv1.weight"),
    "spec/node_slots/0/column": (40, "node_slots[0].column"),
    "spec/node_slots/0/nodes": ([0, 10**9], "node_slots[0].nodes"),
    "spec/node_slots/0/rows": ([[1, 4, 1]], "node_slots[0].rows"),
    "spec/node_slots/0/trainable": (1, "node_slots.0.trainable"),
    "spec/node_slots/0/home": (False, "home of"),
    "spec/columns/0": ("bias", "columns"),
    "spec/defaults": ([], "defaults"),
    "spec/shapes/conv1.weight": ([4, 3, 3], "edge_slots[0].shape"),
    "spec/shapes/fc9.weight": ([4], "home of fc9.weight"),
    "spec/carried/unused": ([-3], "carried.unused"),
    "spec/carried/conv1.bias": ([4], "carried.conv1.bias"),
    "spec/buffers": (["scale", "scale"], "buffers"),
    "spec/frozen/0/0": ([5, 10**4], "frozen[0]"),
    "spec/heads": ([[[0, 3], 2]], "heads[0]"),
    "spec/ties": ([[[0, 3], [3, 2]]], "ties[0]"),
    "spec/more": (1, "header"),
    "spec": ([], "spec"),
    "buffers/scale": ([2], "buffer.scale"),
    "copies": ([0], "copies"),
    "dtypes/conv1.bias": ("int64", "dtypes.conv1.bias"),
    "dtypes/nobody": ("float32", "dtypes.nobody"),
    "source": (["network"], "source"),
}


@pytest.mark.parametrize("where", BAD)
def test_a_hostile_header(file: Path, where: str) -> None:
    value, named = BAD[where]
    with pytest.raises(CheckpointError) as error:
        load_graph(with_header(file, put(where, value)), built())
    assert named in str(error.value)
    assert "bad.safetensors" in str(error.value)


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Where the numbers of a header are."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path.removeprefix("/")


@pytest.mark.parametrize("value", [-1, 7, 10**40])
def test_any_number_may_be_wrong(file: Path, value: int) -> None:
    """Every number of the header, each in turn: what loads after all still has a place for each parameter."""
    header = json.loads(parts(file)[0]["header"])
    for where in leaves(header):
        bad = with_header(file, put(where, value))
        try:
            graph = load_graph(bad, built(1))
        except CheckpointError:
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in graph.to_state_dict().items()}
        assert shapes == graph.spec.shapes, where


def test_a_torn_file(file: Path) -> None:
    whole, torn = file.read_bytes(), file.with_name("torn.safetensors")
    for size in [*range(0, 16), *range(16, len(whole), 997), len(whole) - 1]:
        torn.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            load_graph(torn, built())
        assert not is_graph_file(torn)


@pytest.mark.parametrize("name", ["nodes", "edges.0.conv1", "carried.unused", "buffer.scale"])
def test_tensors_that_are_missing_or_of_another_shape(file: Path, name: str) -> None:
    meta, tensors = parts(file)
    name = next(key for key in tensors if key.startswith(name))
    value = tensors.pop(name)
    for bad in (None, value[None], value.flatten()[1:], value.to(torch.int32), torch.zeros(0, 10**15)):
        with pytest.raises(CheckpointError):
            load_graph(rewritten(file, meta, tensors if bad is None else {**tensors, name: bad}), built())


def test_tensors_that_should_not_be_there(file: Path) -> None:
    meta, tensors = parts(file)
    with pytest.raises(CheckpointError, match=r"tensor carried.more: expected no such tensor; got \(2,\)"):
        load_graph(rewritten(file, meta, {**tensors, "carried.more": torch.ones(2)}))


def test_numbers_that_are_not_finite(file: Path) -> None:
    meta, tensors = parts(file)
    tensors["nodes"][4] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        load_graph(rewritten(file, meta, tensors))


def test_files_of_other_kinds(file: Path, tmp_path: Path) -> None:
    meta, tensors = parts(file)
    for changed, message in (
        ({**meta, "version": "2"}, "another version: expected 1; got '2'"),
        ({**meta, "format": "gmn"}, "not a graph file: expected format gmn.graph; got 'gmn'"),
        ({}, "got no format"),
        ({**meta, "header": "[]"}, "malformed graph file: header"),
        ({**meta, "header": meta["header"][:-9]}, "Invalid JSON"),
        ({**meta, "header": "[" * 100_000}, "recursion"),
        ({"format": meta["format"], "version": "1"}, "Invalid JSON"),
    ):
        with pytest.raises(CheckpointError) as error:
            load_graph(rewritten(file, changed, tensors))
        assert message in str(error.value)
    torch.save(tensors, tmp_path / "pickle.safetensors")
    for path in (tmp_path / "pickle.safetensors", tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(CheckpointError):
            load_graph(path)
        assert not is_graph_file(path)
    assert is_graph_file(file)
