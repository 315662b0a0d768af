"""Contract of the reconstruction after pruning.

* One layer: the weights of the ridge regression towards those after surgery, computed here on all rows.
* Channels that say what others say are given back exactly, through convolutions, batch norms, biases and linear layers.
* A trained network loses less by pruning; the unpruned one stays as it is, and so do modes and gradients.
* Layers with groups, shared weights or several runs, and those with too few rows, stay as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gmn
from gmn import reconstruct as module
from gmn.data import Split
from gmn.groups import couplings
from gmn.recipe import load_recipe
from gmn.reconstruct import RIDGE, reconstruct
from gmn.surgery import remove


def images(count: int, *shape: int) -> Split:
    values = torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Split(
        values, torch.zeros(count, dtype=torch.long), torch.full((shape[0],), 0.5), torch.full((shape[0],), 0.3)
    )


def without(model: nn.Module, example: Tensor, layer: str, gone: list[int]) -> tuple[nn.Module, Any, gmn.KeepMask]:
    """The network without some channels of a layer."""
    spec = gmn.to_graph(model, example).spec
    coupled = couplings(spec)
    nodes = spec.made_by(spec.weights()[f"{layer}.weight"]).flatten()
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    keep[coupled.channel[nodes[gone]]] = False
    mask = gmn.KeepMask(coupled.nodes(keep))
    return remove(model, spec, mask, example), spec, mask


class Small(nn.Module):
    """Convolutions with a batch norm between them, and a linear layer; images of 6 pixels a side become one number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()).flatten(1).relu())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


EXAMPLE = torch.zeros(1, 3, 6, 6)


def solved(rows: Tensor, missing: Tensor) -> Tensor:
    """[outputs, unknowns] of the ridge regression, the bias last."""
    rows, missing = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).double(), missing.double()
    square = rows.T @ rows
    return torch.linalg.solve(square + RIDGE * square.diagonal().mean() * torch.eye(len(square)), rows.T @ missing).T


def test_layers_are_ridge_regressions_one_after_the_other(model: nn.Module) -> None:
    split = images(120, 3, 6, 6)
    smaller, spec, mask = without(model, EXAMPLE, "first", [1, 4])
    found, batch = copy.deepcopy(smaller), next(split.batches(120))[0]
    reconstruct(model, found, spec, mask, split, 120)
    with torch.no_grad():
        whole = model.second(model.norm(model.first(batch)).relu())
        reaching = found.norm(found.first(batch)).relu()  # the first layer is fitted already
        conv = solved(reaching.flatten(1), (whole - smaller.second(reaching)).flatten(1))
        said, reaching = model.last(whole.flatten(1).relu()), found.second(reaching).flatten(1).relu()
        linear = solved(reaching, said - smaller.last(reaching))
    for change, name in ((conv, "second"), (linear, "last")):
        own, before = found.get_submodule(name), smaller.get_submodule(name)
        assert torch.allclose(own.bias - before.bias, change[:, -1].float(), atol=1e-4)
        assert torch.allclose((own.weight - before.weight).flatten(1), change[:, :-1].float(), atol=1e-4)
    assert not torch.equal(found.second.weight, smaller.second.weight)


def test_what_others_say_too_is_given_back(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias):
            tensor[4] = 2 * tensor[1]  # batch norms of an untrained network change nothing
    smaller, spec, mask = without(model, EXAMPLE, "first", [4])
    batch = next(images(50, 3, 6, 6).batches(50))[0]
    assert not torch.allclose(smaller(batch), model(batch), atol=1e-2)
    reconstruct(model, smaller, spec, mask, images(200, 3, 6, 6), 200)
    assert torch.allclose(smaller(batch), model(batch), atol=1e-2)


def test_nothing_else_changes(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    smaller, spec, mask = without(model, EXAMPLE, "first", [1])
    smaller.train()
    norm = copy.deepcopy(smaller.norm.state_dict())
    reconstruct(model, smaller, spec, mask, images(100, 3, 6, 6), 100)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, norm[name]) for name, value in smaller.norm.state_dict().items())
    assert smaller.training
    assert smaller.norm.training
    assert all(value.requires_grad and value.grad is None for value in smaller.parameters())
    again, _, _ = without(model, EXAMPLE, "first", [1])
    reconstruct(model, again, spec, mask, images(100, 3, 6, 6), 100)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in smaller.state_dict().items())


class Odd(nn.Module):
    """Layers that cannot be fitted behind one that loses a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(4, 4, 1)
        self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.last = nn.Linear(4, 300)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mirrored(self.grouped(self.first(x)))
        x = self.twice(self.twice(x)).mean((2, 3))
        return self.last(self.other(self.tied(x)))


def test_layers_that_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    assert module._in_order(model, EXAMPLE) == ["first", "last"]
    smaller, spec, mask = without(model, EXAMPLE, "first", [2])
    before = copy.deepcopy(smaller.state_dict())
    reconstruct(model, smaller, spec, mask, images(9, 3, 6, 6), 9)  # `last` has 9 rows for 5 unknowns
    assert all(torch.equal(value, before[name]) for name, value in smaller.state_dict().items() if "first" not in name)


def test_a_trained_network_loses_less(digits: Any) -> None:
    torch.manual_seed(0)
    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 8, "shortcut": "B"})
    gmn.fit(model, digits.train, gmn.Fit(epochs=4, lr=0.1, batch_size=64))
    options: dict[str, Any] = {"speed_up": 3.0, "data": digits, "max_ratio": 0.7}
    recalibrated = gmn.prune(model, digits.example_inputs(), **options)
    reconstructed = gmn.prune(model, digits.example_inputs(), **options, reconstruct_images=500)
    assert reconstructed.report["flops"] == recalibrated.report["flops"]
    assert reconstructed.report["validation_accuracy"] > recalibrated.report["validation_accuracy"] + 0.1


@pytest.fixture(scope="module")
def digits() -> gmn.Data:
    return gmn.load_data("digits")


def test_mistakes(model: nn.Module, digits: gmn.Data) -> None:
    with pytest.raises(gmn.GmnError, match="reconstruction needs data"):
        gmn.prune(model, EXAMPLE, reconstruct_images=10)
    with pytest.raises(gmn.GmnError, match="nothing to reconstruct"):
        gmn.prune(model, EXAMPLE, reconstruct_images=10, data=digits, pattern="2:4")
    with pytest.raises(gmn.GmnError, match="reconstruct has no meaning with pattern 2:4"):
        load_recipe("quickstart", ["prune.pattern=2:4", "prune.speed_up=null", "prune.reconstruct=100"])
