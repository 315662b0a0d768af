"""Contract of `gmn.groups`.

* Channels joined by a residual or a depthwise kernel are one channel; channels made by the same layers are a group.
* The groups are those that torch-pruning finds.
* Ends of the network, grouped convolutions and zero-padded shortcuts are frozen, each with its reason.
* A mask that does not fit is refused and says why.
"""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn
from zoo import Residual, depthwise, graph_of, network, small

from gmn.convert import to_graph
from gmn.errors import PruningError
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask, couplings

IMAGES = torch.zeros(1, 3, 8, 8)


def nodes_of(spec: GraphSpec, name: str) -> slice:
    group = next(group for group in spec.groups if group.name == name)
    return slice(group.start, group.start + group.size)


def channels_of(spec: GraphSpec, coupled: Couplings, name: str) -> list[int]:
    return coupled.channel[nodes_of(spec, name)].tolist()


def test_a_residual_couples_channel_by_channel() -> None:
    spec = to_graph(small(Residual()), IMAGES).spec
    coupled = couplings(spec)
    outer = channels_of(spec, coupled, "0")
    assert len(set(outer)) == 6
    assert channels_of(spec, coupled, "1.conv2") == outer
    assert not set(channels_of(spec, coupled, "1.conv1")) & set(outer)
    assert coupled.num_channels == 3 + 6 + 6 + 4
    assert coupled.names == ("input", "0", "1.conv1", "4")
    assert coupled.frozen == {0: "network input", 3: "network output"}
    prunable = coupled.nodes(coupled.prunable)
    assert prunable.nonzero().flatten().tolist() == list(range(3, 21))


def test_a_depthwise_kernel_couples_its_two_sides() -> None:
    spec = to_graph(depthwise(), IMAGES).spec
    coupled = couplings(spec)
    assert channels_of(spec, coupled, "3") == channels_of(spec, coupled, "6")
    assert coupled.num_channels == spec.num_nodes - 12


def test_dense_and_diagonal_identities_couple_alike() -> None:
    for name in ("resnet20A", "resnet20B"):
        diagonal, dense = (couplings(graph_of(name, layout).spec) for layout in ("resnet50", "resnet56"))
        assert torch.equal(diagonal.channel, dense.channel)
        assert torch.equal(diagonal.group, dense.group)
        assert set(diagonal.frozen) == set(dense.frozen)


@pytest.mark.parametrize("name", ["resnet20B", "resnet18", "densenet121", "mobilenet_v2"])
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    model, x = network(name)
    spec = graph_of(name).spec
    coupled = couplings(spec)
    names = {module: n for n, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, x)
    theirs = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        makers = [d for d, _ in group if graph.is_out_channel_pruning_fn(d.handler)]
        layers = {names[d.target.module] for d in makers if isinstance(d.target.module, (nn.Conv2d, nn.Linear))}
        theirs.add(frozenset(layers))
    ours: dict[int, set[str]] = {}
    absorbed = {block.name: block.dst for block in spec.blocks if block.name.endswith("weight")}
    for parameter, dst in absorbed.items():
        ours.setdefault(int(coupled.group[coupled.channel[dst[0]]]), set()).add(parameter.removesuffix(".weight"))
    assert {frozenset(layers) for layers in ours.values()} == theirs
    assert len(theirs) > 5


def test_zero_padded_shortcuts_freeze_the_outer_channels_only() -> None:
    spec = graph_of("resnet20A").spec
    coupled = couplings(spec)
    free = {coupled.names[int(g)] for g in coupled.group[coupled.prunable].unique()}
    assert free == {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)}
    outer = {int(coupled.group[c]) for c in channels_of(spec, coupled, "layer2.1.conv2")}
    assert {coupled.frozen[g] for g in outer} == {"zero-padded shortcut layer2.0.residual"}
    assert sorted(coupled.frozen.values()) == [
        *("network input", "network output", "zero-padded shortcut layer2.0.residual"),
    ]


def test_convolutional_shortcuts_freeze_nothing() -> None:
    coupled = couplings(graph_of("resnet20B").spec)
    assert sorted(coupled.frozen.values()) == ["network input", "network output"]


def test_grouped_convolutions_stay_whole() -> None:
    spec = to_graph(small(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 3, padding=1, groups=2), nn.Conv2d(4, 6, 1)), IMAGES).spec
    coupled = couplings(spec)
    assert {coupled.names[g]: reason for g, reason in coupled.frozen.items()} == {
        "input": "network input",
        "1": "grouped convolution 2.weight",
        "2": "grouped convolution 2.weight",
        "6": "network output",
    }


def test_wrong_masks_are_refused() -> None:
    spec = to_graph(small(Residual()), IMAGES).spec
    coupled = couplings(spec)
    keep = torch.ones(spec.num_nodes, dtype=torch.bool)
    inner, outer, again = (nodes_of(spec, name).start for name in ("1.conv1", "0", "1.conv2"))

    def without(*nodes: int) -> KeepMask:
        mask = keep.clone()
        mask[list(nodes)] = False
        return KeepMask(mask)

    assert without(inner).validate(spec, coupled).keep.sum() == spec.num_nodes - 1
    without(outer, again).validate(spec, coupled)
    for mask, message in (
        (KeepMask(keep[1:]), rf"another network: expected {spec.num_nodes} nodes; got {spec.num_nodes - 1}"),
        (without(outer), "separates channels that are coupled"),
        (without(outer, again + 1), "separates channels that are coupled"),
        (without(0), "removes channels that must stay"),
        (without(spec.num_nodes - 1), "removes channels that must stay"),
        (without(*range(inner, inner + 6)), r"empties a layer: in 1\.conv1"),
    ):
        with pytest.raises(PruningError, match=message):
            mask.validate(spec, coupled)
    for malformed in (keep.float(), keep[None]):
        with pytest.raises(PruningError, match="expected bool"):
            KeepMask(malformed)
