"""What users meet at the edges of `gmn.prune`.

* layers that surgery cannot cut, constants of fixed size and layers without a rule stay whole, and the rest is pruned
* frozen parameters stay frozen
* mistakes are one clear sentence
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gmn
from gmn import rules

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """A layer that no library knows: twice a matrix product."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x @ self.weight.T


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *middle, nn.Linear(8, 4))


@pytest.fixture
def rule_for_twice() -> Iterator[None]:
    @gmn.register_converter(Twice)
    class TwiceConverter(gmn.Converter):
        def encode(self, call: gmn.Call) -> gmn.Flow:
            source = call.flows[0].channels(-1)
            nodes = call.builder.add_nodes(call.name, len(source), "linear", source)
            shape = (1, len(source), len(source), 1)
            call.builder.add_weight(f"{call.name}.weight", source, nodes, shape=shape, kernel=(1,))
            return call.output(call.builder.ids(nodes), -1, "raw")

    yield
    del rules._MODULES[Twice]


def test_a_layer_of_ones_own_is_converted_and_stays_whole(rule_for_twice: None) -> None:
    pruned = gmn.prune(network(Twice(8)), IMAGES, speed_up=1.5).model
    assert pruned[0].out_channels < 8  # type: ignore[index, operator]
    assert pruned[4].out_channels == pruned[8].weight.shape[0] == 8  # type: ignore[index, union-attr]


class Odd(nn.Module):
    """A parameter in a product that the graph has no form for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,i,i->bi", x, self.weight, self.weight)


@pytest.mark.parametrize("layer", [Twice, Odd])
def test_a_layer_without_a_rule_stays_whole(layer: type[nn.Module]) -> None:
    pruned = gmn.prune(network(layer(8)), IMAGES, speed_up=1.5).model
    assert pruned[0].out_channels < 8  # type: ignore[index, operator]
    assert pruned[4].out_channels == pruned[9].in_features == 8  # type: ignore[index, union-attr]


class Written(nn.Module):
    """The number of channels stands in the code; nothing in the graph shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network()[:6], nn.Linear(8 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).view(-1, 8 * 4))


def test_channels_whose_number_is_written_in_the_code_stay_whole() -> None:
    pruned = gmn.prune(Written(), IMAGES, speed_up=1.5).model
    sizes = [layer.out_channels for layer in pruned.body if isinstance(layer, nn.Conv2d)]  # type: ignore[union-attr]
    assert sizes[2] == 8 > sizes[1]


def test_a_layer_without_a_rule_can_be_refused() -> None:
    with pytest.raises(gmn.GmnError, match=r"no rule for Odd '8'.*on_unknown='keep'"):
        gmn.prune(network(Odd(8)), IMAGES, speed_up=1.5, on_unknown="error")


class Shifted(nn.Module):
    """A constant per channel: a buffer is cut with its channels, a bare tensor is out of reach."""

    def __init__(self, *, registered: bool) -> None:
        super().__init__()
        self.body = network()
        self.shift = torch.ones(1, 8, 1, 1)
        if registered:
            del self.shift
            self.register_buffer("shift", torch.arange(8.0).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[0](x) + self.shift
        return F.log_softmax(self.body[1:](x), dim=1)


def test_channels_that_meet_a_constant_stay_whole() -> None:
    pruned = gmn.prune(Shifted(registered=False), IMAGES, speed_up=1.5).model
    assert pruned.body[0].out_channels == 8  # type: ignore[union-attr, index]


def test_a_buffer_with_a_number_per_channel_is_cut_with_the_channels() -> None:
    pruned = gmn.prune(Shifted(registered=True), IMAGES, speed_up=1.5).model
    width = pruned.body[0].out_channels  # type: ignore[union-attr, index]
    assert pruned.shift.shape == (1, width, 1, 1)  # type: ignore[union-attr]
    assert width < 8
    assert pruned.body[2].out_channels < 8  # type: ignore[union-attr, index, operator]


def test_frozen_parameters_stay_frozen() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    pruned = gmn.prune(model, IMAGES, speed_up=1.5).model
    flags = {name: parameter.requires_grad for name, parameter in pruned.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed_up": 0.5}, r"bad value for 'speed_up': expected greater than 1; got 0\.5; in gmn\.prune"),
        ({"max_ratio": 1.5}, r"bad value for 'max_ratio': expected less than 1; got 1\.5; in gmn\.prune"),
        ({"roundto": 8}, r"unknown key 'roundto'.*in gmn\.prune; did you mean 'round_to'"),
        ({"criterion": "taylor"}, r"'taylor' needs gradients.*data="),
        ({"criterion": "tailor"}, r"unknown criterion.*did you mean 'taylor'"),
        ({"speed_up": 1e6}, r"out of reach.*max_ratio"),
        ({"example_inputs": torch.zeros(1, 5, 8, 8)}, r"does not run on the example inputs.*\(1, 5, 8, 8\)"),
    ],
)
def test_mistakes_are_one_sentence(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"example_inputs": IMAGES, "speed_up": 1.5, **changes}
    with pytest.raises(gmn.GmnError, match=message) as caught:
        gmn.prune(network(), **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
