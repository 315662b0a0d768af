"""Contract of `gmn.convert` and its rules.

* `to_model(to_graph(model))` is the model, bit for bit: parameters, buffers and outputs, pruned networks included.
* Every layout, kernel form and identity form holds every network it has columns for.
* The model comes back from `to_graph` as it was: modes, parameters, hooks.
* What has no rule is refused by name, or kept: carried through, and the channels around it frozen.
* Users' rules are used like the built-in ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from zoo import NETWORKS, FlatVGG, Residual, depthwise, network, pruned, randomise, small

import gmn.rules
from gmn.convert import layouts, to_graph, to_model
from gmn.errors import ConversionError
from gmn.flow import Flow
from gmn.graph import NetworkGraph
from gmn.groups import couplings
from gmn.reader import read
from gmn.rules import Call, Converter, register_converter, rule_for
from gmn.surgery import shapes
from gmn.trace import trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def round_trip(model: nn.Module, x: Tensor, *, carries: bool = False, **options: object) -> NetworkGraph:
    """The graph, after checking that it turns back into the model; only with `carries` may parameters be left out."""
    graph = to_graph(model, x, **options)  # pyright: ignore[reportArgumentType]
    again = to_model(graph)
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
    other = torch.randn(2, *x.shape[1:], dtype=x.dtype)
    with torch.no_grad():
        assert torch.equal(again.eval()(other), model.eval()(other))
    spec = graph.spec
    held = {*spec.shapes, *spec.carried, *spec.buffers, *(s.param for s in spec.node_slots)}
    assert held >= {*dict(model.named_parameters()), *before} - set(tied(model))
    assert carries or not spec.carried
    return graph


def tied(model: nn.Module) -> list[str]:
    """Further names of parameters that have one already."""
    return [n for n, p in model.named_parameters(remove_duplicate=False) if n not in dict(model.named_parameters())]


# Round trip


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name: str) -> None:
    model, x = network(name)
    graph = round_trip(model, x)
    assert set(graph.spec.shapes) == {n for n, _ in model.named_parameters()}
    assert all(name.endswith("num_batches_tracked") for name in graph.spec.buffers)


@pytest.mark.parametrize("name", ["resnet20A", "resnet20B", "mobilenet_v2", "densenet121"])
def test_round_trip_of_a_pruned_network(name: str) -> None:
    model, x = pruned(name)
    assert shapes(model) != shapes(network(name)[0])
    round_trip(model, x)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *[(name, "resnet56") for name in ("resnet20A", "resnet20B", "resnet56A", "resnet18", "mobilenet_v2")],
        *[(name, "resnet50") for name in ("resnet20A", "resnet20B", "resnet18", "resnet50")],
        *[(name, "vgg19") for name in ("vgg19_bn", "resnet20A", "mobilenet_v2")],
    ],
)
def test_round_trip_in_the_layouts_of_the_paper(name: str, layout: str) -> None:
    graph = round_trip(*network(name), layout=layout)
    assert graph.spec.columns == layouts()[layout].columns


@pytest.mark.parametrize("kernels", ["padded", "per-size"])
@pytest.mark.parametrize("identities", ["dense", "diagonal"])
@pytest.mark.parametrize("name", ["resnet20A", "resnet20B"])
def test_kernels_and_identities(name: str, kernels: str, identities: str) -> None:
    layout = dataclasses.replace(layouts()["generic"], kernels=kernels, identities=identities)
    spec = round_trip(*network(name), layout=layout).spec
    assert spec.edge_kinds == ({"3x3": 9} if kernels == "padded" else {"3x3": 9, "1": 1})
    residuals = [block for block in spec.blocks if block.name.endswith("residual")]
    assert len(residuals) == (9 if name == "resnet20A" else 7)
    assert {block.form for block in residuals} == {"dense" if identities == "dense" else "diagonal"}


def test_a_padded_kernel_lies_in_the_centre() -> None:
    layout = dataclasses.replace(layouts()["generic"], kernels="padded")
    model = small(nn.Conv2d(6, 6, 1))
    graph = round_trip(model, IMAGES, layout=layout)
    features = dict(zip((b.name for b in graph.spec.blocks), graph.edge_features, strict=True))["1.weight"]
    assert torch.equal(features[0, :, :, 4], model[1].weight[:, :, 0, 0])
    assert int(features[..., [0, 1, 2, 3, 5, 6, 7, 8]].count_nonzero()) == 0


@pytest.mark.parametrize("layout", ["generic", "resnet56", "vgg19"])
def test_positions_of_a_flattened_channel_are_one_edge(layout: str) -> None:
    model = randomise(FlatVGG())
    graph = round_trip(model, IMAGES, layout=layout)
    (index,) = [i for i, block in enumerate(graph.spec.blocks) if block.name == "fc1.weight"]
    assert graph.spec.blocks[index].shape == (1, 10, 12, 4)
    assert torch.equal(graph.edge_features[index][0], model.fc1.weight.view(10, 12, 4))


# Shapes of networks


@pytest.mark.parametrize("layout", ["generic", "resnet56", "resnet50"])
def test_residuals_in_place_and_functional_give_the_same_graph(layout: str) -> None:
    plain = round_trip(small(Residual()), IMAGES, layout=layout)
    in_place = round_trip(small(Residual(in_place=True)), IMAGES, layout=layout)
    assert plain.spec == in_place.spec
    assert [b.form for b in plain.spec.blocks if b.name == "1.residual"] == [
        "dense" if layout == "resnet56" else "diagonal"
    ]


def test_grouped_convolutions_are_pieces() -> None:
    model = small(Residual(groups=3))
    graph = round_trip(model, IMAGES)
    (index,) = [i for i, block in enumerate(graph.spec.blocks) if block.form == "grouped"]
    assert graph.spec.blocks[index].shape == (3, 2, 2, 9)
    assert torch.equal(graph.edge_features[index].flatten(), model[1].conv1.weight.flatten())
    frozen = couplings(graph.spec).frozen
    assert any("grouped convolution 1.conv1.weight" in reason for reason in frozen.values())


def test_depthwise_convolutions_are_diagonals() -> None:
    graph = round_trip(depthwise(), IMAGES)
    assert [b.shape for b in graph.spec.blocks if b.form == "diagonal"] == [(12, 1, 1, 9)]


class Concat(nn.Module):
    """Three branches of 6 channels side by side, with or without a norm over all of them."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(15) if norm else nn.Identity()
        self.out = nn.Conv2d(15, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.a(x), x, self.b(x)], 1)))


@pytest.mark.parametrize("norm", [False, True])
def test_concatenation(norm: bool) -> None:
    model = small(Concat(norm))
    graph = round_trip(model, IMAGES)
    out = [(b.shape[2], e) for b, e in zip(graph.spec.blocks, graph.edge_features, strict=True) if "out" in b.name]
    assert [width for width, _ in out] == [15]  # the three parts are neighbours: one block reads them all
    start = {group.name: group.start for group in graph.spec.groups}
    read = graph.spec.read_by(graph.spec.weights()["1.out.weight"]).tolist()
    own = start["1.norm"] if norm else None
    wanted = [
        *range(start["1.a"], start["1.a"] + 4),
        *range(start["0"], start["0"] + 6),
        *range(start["1.b"], start["1.b"] + 5),
    ]
    assert read == (list(range(own, own + 15)) if own is not None else wanted)


class Sum(nn.Module):
    """Three convolutions with a norm each, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.paths[0](x) + self.paths[1](x) + self.paths[2](x)


@pytest.mark.parametrize("layout", ["generic", "resnet50", "vgg19"])
def test_a_sum_of_more_branches_than_there_are_columns(layout: str) -> None:
    model = small(Sum())
    coupled = couplings(round_trip(model, IMAGES, layout=layout).spec)
    assert len(set(coupled.channel[9:15].tolist())) == 6
    assert sum(name.startswith("1.paths") for name in coupled.names) == 1


def test_a_layer_alone() -> None:
    graph = round_trip(nn.Linear(3, 2), torch.zeros(1, 3))
    assert graph.spec.num_nodes == 5


def test_arguments_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc(x) * scale

    assert to_graph(Named(), {"x": torch.zeros(1, 3), "scale": 2.0}).spec.num_edges == 6


def test_double_precision_stays() -> None:
    graph = round_trip(nn.Sequential(nn.Linear(3, 2).double()), torch.zeros(1, 3).double())
    assert graph.node_features.dtype == graph.edge_features[0].dtype == torch.float64


def test_the_model_is_left_as_it_was() -> None:
    model = small(Residual(), nn.Dropout())
    model.train()
    model[1].bn1.eval()
    model[0].weight.requires_grad_(False)
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("mine"))
    modes = {n: m.training for n, m in model.named_modules()}
    parameters = {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()}
    graph = to_graph(model, IMAGES)
    assert calls == ["mine"]
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()} == parameters
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    graph.edge_features[0].zero_()  # the graph holds copies
    graph.node_features.zero_()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


# What has no rule


class Recurrent(nn.Module):
    """An LSTM along the rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, (8, 8))


class Twisted(nn.Module):
    """A parameter that is used as nothing the graph knows."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,c,c->bchw", x, self.factor, self.factor)


@pytest.mark.parametrize(
    ("module", "message", "carried"),
    [
        (Twisted, r"Twisted '1'.*calls einsum.*1\.factor.*register_converter.*on_unknown='keep'", {"1.factor"}),
        (
            Recurrent,
            r"LSTM '1\.lstm'.*1\.lstm\.bias_hh_l0.*register_converter",
            {f"1.lstm.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")},
        ),
    ],
)
def test_what_has_no_place_is_refused_or_kept(module: type[nn.Module], message: str, carried: set[str]) -> None:
    model = small(module())
    with pytest.raises(ConversionError, match=message):
        to_graph(model, IMAGES, on_unknown="error")
    graph = round_trip(model, IMAGES, carries=True)
    assert set(graph.spec.carried) == carried
    assert all(f"carried: {name}" in graph.summary() for name in carried)
    coupled = couplings(graph.spec)
    assert not coupled.prunable.any()
    assert any(reason.startswith("read by 1") for reason in coupled.frozen.values())


class Twice(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class Tied(nn.Module):
    """Two convolutions that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 6, 1, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@pytest.mark.parametrize(("module", "weight"), [(Twice, "1.conv.weight"), (Tied, "1.a.weight")])
def test_a_weight_used_twice_has_one_home_and_several_edges(module: type[nn.Module], weight: str) -> None:
    graph = round_trip(small(module()), IMAGES)
    slots = [slot for slot in graph.spec.edge_slots if slot.param == weight]
    assert [slot.home for slot in slots] == [True, False]
    assert len({slot.block for slot in slots}) == 2
    coupled = couplings(graph.spec)  # what the first call reads, and what the second reads, are the same columns
    assert coupled.num_channels == 3 + 6 + 4
    edited = graph.replace(graph.node_features, tuple(e + 1.0 for e in graph.edge_features))
    assert torch.equal(edited.to_state_dict()[weight], dict(graph.template.named_parameters())[weight] + 1.0)


def test_channels_away_from_what_is_kept_stay_prunable() -> None:
    model = small(Residual(), nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), Twisted())
    coupled = couplings(to_graph(model, IMAGES).spec)
    free = {coupled.names[int(g)] for g in coupled.group[coupled.prunable].unique()}
    assert free == {"0", "1.conv1", "2"}


@pytest.mark.parametrize(
    ("parameter", "where"),
    [("1.conv2.weight", "1.conv2.weight"), ("1.bn1.bias", "1.bn1.bias"), ("1.bn1.running_var", "1.bn1.running_var")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(parameter: str, where: str, value: float) -> None:
    model = small(Residual())
    model.state_dict()[parameter].view(-1)[0] = value
    with pytest.raises(ConversionError, match=rf"not finite \(NaN or Inf\): in {where}"):
        to_graph(model, IMAGES)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 4, 8, 8), {}, r"Sequential does not run.*\(2, 4, 8, 8\).*3 channels.*4 channels"),
        (IMAGES, {"layout": "resnet57"}, "unknown layout: expected generic, cnn, resnet56.*'resnet57'"),
    ],
)
def test_wrong_arguments(x: Tensor, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        to_graph(small(Residual()), x, **options)  # pyright: ignore[reportArgumentType]


def test_a_layout_without_a_column_for_the_network() -> None:
    layout = dataclasses.replace(layouts()["generic"], columns=("norm.weight",), defaults=(1.0,))
    with pytest.raises(ConversionError, match=r"no free node feature.*layout='generic'"):
        to_graph(small(), IMAGES, layout=layout)


def test_a_network_without_layers() -> None:
    with pytest.raises(ConversionError, match="no layer that the graph can hold"):
        to_graph(nn.Sequential(nn.ReLU()), IMAGES)


def test_a_graph_without_its_network() -> None:
    graph = dataclasses.replace(to_graph(small(), IMAGES), template=None)
    with pytest.raises(ConversionError, match="no network to copy"):
        to_model(graph)


# Rules of one's own


class Transposed(nn.Module):
    """A linear layer that stores its weight as [in, out]."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(into, out))
        self.shift = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,io->bo", x, self.kernel) + self.shift


@pytest.fixture
def transposed_rule() -> Iterator[None]:
    class TransposedConverter(Converter):
        def encode(self, call: Call) -> Flow:
            into, out = call.module.kernel.shape
            source = call.flows[0].channels(1)
            nodes = call.builder.add_nodes(call.name, out, "linear", source)
            call.builder.add_weight(
                f"{call.name}.kernel", source, nodes, shape=(1, into, out, 1), kernel=(1,), perm=(0, 2, 1, 3)
            )
            call.builder.attach_or_fail(nodes, {"bias": f"{call.name}.shift"})
            return call.output(call.builder.ids(nodes), 1, "raw")

    assert register_converter(Transposed)(TransposedConverter) is TransposedConverter
    yield
    del gmn.rules._MODULES[Transposed]


def test_a_rule_of_ones_own(transposed_rule: None) -> None:
    class Derived(Transposed):
        pass

    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), Derived(5, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = round_trip(model, torch.randn(1, 3))
    assert [block.shape for block in graph.spec.blocks] == [(1, 5, 3, 1), (1, 4, 5, 1), (1, 2, 4, 1)]
    assert torch.equal(graph.edge_features[1][0, :, :, 0], model[2].kernel.T)
    assert set(graph.spec.shapes) == set(model.state_dict())


def test_without_its_rule_the_layer_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"Transposed '0'.*0\.kernel"):
        to_graph(nn.Sequential(Transposed(3, 2)), torch.randn(1, 3), on_unknown="error")


class TapsFirst(nn.Module):
    """A convolution along a line that stores its weight as [taps, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.kernel.permute(2, 1, 0))


def test_a_weight_may_be_stored_in_any_order() -> None:
    class TapsFirstConverter(Converter):
        def encode(self, call: Call) -> Flow:
            source = call.flows[0].channels(1)
            nodes = call.builder.add_nodes(call.name, 5, "conv", source)
            call.builder.add_weight(
                f"{call.name}.kernel", source, nodes, shape=(3, 1, 4, 5), kernel=(3,), perm=(1, 3, 2, 0)
            )
            return call.output(call.builder.ids(nodes), 1, "raw")

    register_converter(TapsFirst)(TapsFirstConverter)
    try:
        model = nn.Sequential(nn.Conv1d(2, 4, 1), TapsFirst())
        graph = round_trip(model, torch.randn(1, 2, 6))
    finally:
        del gmn.rules._MODULES[TapsFirst]
    assert torch.equal(graph.edge_features[1][0], model[1].kernel.permute(2, 1, 0))


def test_a_rule_that_returns_another_shape_is_refused(transposed_rule: None) -> None:
    class Wrong(Converter):
        def encode(self, call: Call) -> Flow:
            return call.flows[0]

    gmn.rules._MODULES[Transposed] = Wrong()
    with pytest.raises(ConversionError, match=r"wrong shape: expected \(1, 2\); got \(1, 3\); in 0"):
        to_graph(nn.Sequential(Transposed(3, 2)), torch.randn(1, 3))


# Size and time


@pytest.mark.parametrize(("name", "seconds"), [("resnet50", 1.0), ("vit_b_16", 3.0)])
def test_conversion_is_quick_and_small(name: str, seconds: float) -> None:
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    record = trace(model, x, lambda module: rule_for(module) is not None)
    start = time.process_time()  # the machine may be busy with something else
    graph = read(model, record, layouts()["generic"], "keep")
    assert time.process_time() - start < seconds
    numbers = graph.node_features.numel() + sum(features.numel() for features in graph.edge_features)
    assert numbers <= 1.5 * sum(parameter.numel() for parameter in model.parameters())
