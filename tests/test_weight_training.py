"""Weights that went stay zero in training, and the loss that makes them small.

* what went is zero after every step of every optimizer, in averages too, and does not count where gradients are clipped
* the sparsity losses are what their formulas say; rescaling a layer, or of N:M a channel, does not lower the invariant
  ones, and gradients at zero are finite
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_weight_masks import RESNET, resnet
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import gmn
from gmn.data import Data, load_data
from gmn.errors import PruningError
from gmn.settings import Fit
from gmn.weight_masks import WeightMask, WeightSparsity


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits", limit=192)


# -- masks in training -------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(data: Data) -> tuple[nn.Module, WeightMask]:
    model = resnet()
    pruned = gmn.prune(model, data.example_inputs(), pattern="2:4")
    assert pruned.mask is not None
    return pruned.model, pruned.mask


@pytest.fixture
def zeros(masked: tuple[nn.Module, WeightMask]) -> Iterator[list[int]]:
    """After every step of any optimizer: how many of the weights that went are not zero."""
    model, mask = masked
    found: list[int] = []
    gone = lambda: sum(int((model.get_parameter(n)[~k] != 0).sum()) for n, k in mask.keep.items())  # noqa: E731
    handle = register_optimizer_step_post_hook(lambda *_: found.append(gone()))
    yield found
    handle.remove()


OPTIMIZERS = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "ema, clip, cosine": {"ema": 0.7, "clip": 0.5, "schedule": "cosine"},
    "channels last, distilled": {"channels_last": True, "distill": 0.5},
}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_what_went_is_zero_after_every_step(
    data: Data, masked: tuple[nn.Module, WeightMask], zeros: list[int], options: dict[str, Any]
) -> None:
    model, mask = masked
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = Fit(**{"epochs": 2, "lr": 0.1, "batch_size": 48, **options})
    gmn.fit(model, data.train, config, mask=mask, teacher=resnet())
    assert len(zeros) >= 4
    assert not any(zeros)
    for name, keep in mask.keep.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight[~keep], torch.zeros(int((~keep).sum())))  # also in the average
        assert float((weight[keep] != before[name][keep]).float().mean()) > 0.9
    gmn.fit(model, data.train, config, teacher=resnet())
    assert zeros[-1] > 100  # nothing holds them then


def test_weights_that_come_back_before_training_are_set_to_zero(data: Data, masked: Any, zeros: list[int]) -> None:
    _, mask = masked
    model = resnet()
    gmn.fit(model, data.train, Fit(epochs=1, lr=0.0001, batch_size=48), mask=mask)
    assert all(bool((model.get_parameter(name)[~keep] == 0).all()) for name, keep in mask.keep.items())


def test_a_mask_for_another_network_is_refused(data: Data, masked: Any) -> None:
    _, mask = masked
    wider = gmn.build_network(**{**RESNET, "options": {"width": 16, "shortcut": "B"}})
    with pytest.raises(PruningError, match=r"for another network: expected \[8, 8, 3, 3\]; got \[16, 16, 3, 3\]"):
        gmn.fit(wider, data.train, Fit(epochs=1, lr=0.1), mask=mask)
    with pytest.raises(PruningError, match="got None; in layer1"):
        gmn.fit(nn.Linear(2, 2), data.train, Fit(epochs=1, lr=0.1), mask=mask)


def test_gradients_of_what_went_do_not_count_where_they_are_clipped(data: Data) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    keep = torch.zeros(10, 64, dtype=torch.bool)
    keep[:, :2] = True
    mask = WeightMask({"1.weight": keep}, {})
    mask.apply(model)
    before = [p.detach().clone() for p in model.parameters()]
    config = Fit(iterations=1, lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.01, batch_size=48)
    gmn.fit(model, data.train, config, mask=mask)
    step = torch.cat([(new.detach() - old).flatten() for new, old in zip(model.parameters(), before, strict=True)])
    assert float(step.norm()) == pytest.approx(0.01, rel=1e-3)


# -- the sparsity loss -------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    state = {"a": torch.tensor([[3.0, -4.0]]), "b": torch.tensor([[0.0, 5.0, 1.0, 2.0]]), "other": torch.ones(3)}
    plain, pairs = WeightSparsity({"a": 1, "b": 1}), WeightSparsity({"a": 1, "b": 1}, (1, 2))
    for sparsity in (plain, pairs):
        assert sparsity.sparsity_loss(state).item() == pytest.approx((7 + 8) / (55 / 6) ** 0.5 / 6)
    own = 2 * 7 / (2 * 25) ** 0.5 + 4 * 8 / (4 * 30) ** 0.5
    assert plain.sparsity_loss(state, scale_invariant=True).item() == pytest.approx(own / 6)
    share = 2 * 3 / 7 + 4 * 1 / 8  # of [0, 5, 1, 2] the 0 and the 1 go
    assert pairs.sparsity_loss(state, scale_invariant=True).item() == pytest.approx(share / 6)


LOSSES = [(False, None), (True, None), (True, (2, 4))]


@pytest.mark.parametrize(("invariant", "group"), LOSSES)
def test_only_invariant_losses_are_not_lowered_by_rescaling(invariant: bool, group: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    state = {"a": torch.randn(3, 8, requires_grad=True), "b": torch.randn(2, 4, requires_grad=True)}
    sparsity = WeightSparsity({"a": 1, "b": 1}, group)
    loss = sparsity.sparsity_loss(state, scale_invariant=invariant)
    weights = list(state.values())
    gradients = torch.autograd.grad(loss, weights)
    along = [float((g * w.detach()).sum()) for g, w in zip(gradients, weights, strict=True)]
    if invariant:
        assert along == pytest.approx([0.0, 0.0], abs=1e-6)
        tripled = sparsity.sparsity_loss({"a": 3 * state["a"], "b": state["b"]}, scale_invariant=True)
        assert tripled.item() == pytest.approx(loss.item())
    else:
        assert min(along) > 0.05
        pushes = torch.cat([(g / w.detach().sign()).flatten() for g, w in zip(gradients, weights, strict=True)])
        assert float(pushes.std()) < 1e-6  # the same push on every weight


def test_shrinking_a_channel_lowers_the_norm_but_not_what_2_of_4_take() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    shrunk = weight * torch.tensor([[1.0], [0.1]])
    plain, pattern = WeightSparsity({"w": 1}), WeightSparsity({"w": 1}, (2, 4))
    losses = [
        [sparsity.sparsity_loss({"w": w}, scale_invariant=True).item() for w in (weight, shrunk)]
        for sparsity in (plain, pattern)
    ]
    assert losses[0][1] < 0.8 * losses[0][0]
    assert losses[1] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("invariant", "group"), LOSSES)
def test_the_gradient_at_zero_is_finite(invariant: bool, group: tuple[int, int] | None) -> None:
    state = {"a": torch.zeros(1, 4, requires_grad=True), "b": torch.ones(1, 8, requires_grad=True)}
    loss = WeightSparsity({"a": 1, "b": 1}, group).sparsity_loss(state, scale_invariant=invariant)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, list(state.values())))
