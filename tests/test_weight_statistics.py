"""Contract of `gmn.weight_statistics`.

* Every measure against its definition, on matrices small enough to compute by hand.
* Channels are output channels, however a layer stores them: a transposed convolution and a grouped one too.
* Scaling a layer scales its norms and sensitivity, and leaves correlation and rank alone.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gmn.convert import to_graph
from gmn.weight_statistics import LayerStatistics, effective_rank, mean_correlation, statistics_of


def of(model: nn.Module, example: torch.Tensor, gradient: float = 1.0) -> dict[str, LayerStatistics]:
    state = dict(model.state_dict())
    gradients = {name: torch.full_like(value, gradient) for name, value in state.items()}
    return {entry.layer: entry for entry in statistics_of(to_graph(model, example).spec, state, gradients)}


def test_a_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 5.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
    first = of(model, torch.zeros(1, 2), gradient=-2.0)["0"]
    assert first.l1 == 3.0  # 3 + 4 + 0 + 5 over four
    assert first.l2 == 5.0  # both rows
    assert first.channel_l2 == [5.0, 5.0]
    assert first.sensitivity == 6.0
    assert first.channel_sensitivity == [14.0, 10.0]
    assert first.correlation == pytest.approx(1.0)  # rows of two numbers: -1
    high, low = (math.sqrt(25 + sign * 20) for sign in (1, -1))  # W W^T = [[25, -20], [-20, 25]]
    share = high / (high + low)
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert first.rank == pytest.approx(math.exp(entropy), rel=1e-6)


def test_ranks_and_correlations() -> None:
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1.0)
    assert effective_rank(torch.eye(4)[:, :3]) == pytest.approx(3.0)
    assert effective_rank(torch.zeros(4, 3)) == 0.0
    assert mean_correlation(torch.ones(1, 3)) == 0.0
    assert mean_correlation(torch.tensor([[1.0, 0, -1], [1, -2, 1]])) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2)]
)
def test_channels_are_output_channels(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    found = of(model, torch.zeros(1, 3, 8, 8))["1"]
    outputs = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    expected = outputs.detach().flatten(1).norm(dim=1).tolist()
    assert found.channel_l2 == pytest.approx(expected, rel=1e-6)


def test_scaling_a_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    before = of(model, torch.zeros(1, 6))["0"]
    with torch.no_grad():
        model[0].weight.mul_(2)
    after = of(model, torch.zeros(1, 6))["0"]
    for measure, factor in (("l1", 2), ("l2", 2), ("sensitivity", 2), ("correlation", 1), ("rank", 1)):
        assert getattr(after, measure) == pytest.approx(factor * getattr(before, measure), rel=1e-5)
