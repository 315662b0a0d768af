"""Contract of `gmn.criteria`.

* Scores are torch-pruning's group magnitude scores; the sparsity loss has the gradient of its group norm pruner.
* A hand-computed case for every way to reduce and to normalise.
* Equal, zero and empty channels give no NaN.
* The scale-invariant loss does not change when a group is scaled.
"""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision.models as tv
from torch import Tensor, nn
from zoo import network, randomise

from gmn.convert import to_graph
from gmn.criteria import Importance
from gmn.graph import GraphSpec
from gmn.groups import Couplings, couplings
from gmn.settings import Criterion

GROUP_TYPES = [nn.Conv2d, nn.Linear]


@cache
def subject(name: str) -> tuple[nn.Module, Tensor, GraphSpec, Couplings]:
    if name == "vgg11_bn":
        torch.manual_seed(0)
        model: nn.Module = tv.vgg11_bn(num_classes=4, init_weights=False)
        model.avgpool = nn.AdaptiveAvgPool2d(2)  # smaller than 7x7: the first linear layer is most of the network
        model.classifier = nn.Sequential(nn.Linear(2048, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 4))
        model, x = randomise(model), torch.randn(1, 3, 32, 32)
    else:
        model, x = network(name)
    spec = to_graph(model, x).spec
    return model, x, spec, couplings(spec)


def root_channels(model: nn.Module, spec: GraphSpec, coupled: Couplings, group: Any) -> Tensor:
    """The channels of the layer that a group of torch-pruning starts from."""
    names = {module: name for name, module in model.named_modules()}
    parameter = f"{names[group[0].dep.target.module]}.weight"
    block = next(block for block in spec.blocks if block.name == parameter)
    return coupled.channel[block.dst[0] : sum(block.dst)]


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg11_bn", "resnet20B"])
def test_scores_are_those_of_torch_pruning(name: str) -> None:
    model, x, spec, coupled = subject(name)
    importance = Importance(spec, coupled, Criterion(p=2, reduce="mean", normalize="max"))
    scores = importance.scores(dict(model.state_dict()))
    graph = tp.DependencyGraph().build_dependency(model, x)
    theirs = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer="max")
    seen = set()
    for group in graph.get_all_groups(root_module_types=GROUP_TYPES):
        channels = root_channels(model, spec, coupled, group)
        assert torch.allclose(scores[channels], theirs(group), rtol=1e-4), group[0].dep
        number = int(coupled.group[channels[0]])
        assert sorted(channels.tolist()) == (coupled.group == number).nonzero().flatten().tolist()
        seen.add(number)
    assert seen == set(range(len(coupled.names))) - {coupled.names.index("input")}


def test_the_first_layer_alone_may_score() -> None:
    """The first that runs; torch-pruning takes the layer that it is asked about."""
    model, x, spec, coupled = subject("resnet20B")
    importance = Importance(spec, coupled, Criterion(reduce="first"))
    scores = importance.scores(dict(model.state_dict()))
    graph = tp.DependencyGraph().build_dependency(model, x)
    theirs = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="first", normalizer="max")
    for name in ("conv1", "layer1.1.conv1", "layer2.0.conv2", "layer3.0.conv2", "layer3.2.conv1"):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        assert name in coupled.names
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        channels = root_channels(model, spec, coupled, group)
        assert torch.allclose(scores[channels], theirs(group), rtol=1e-4), name


@pytest.mark.parametrize("normalize", ["none", "max"])
@pytest.mark.parametrize("name", ["resnet20B", "resnet18"])
def test_the_gradient_of_the_loss_is_that_of_torch_pruning(name: str, normalize: Any) -> None:
    """Theirs adds gamma w to the gradient of a slice w; ours is 2 gamma w / (T N) for T members and normaliser N."""
    model, x, spec, coupled = subject(name)
    pruner = tp.pruner.GroupNormPruner(model, x, tp.importance.GroupMagnitudeImportance(normalizer=None), reg=1.0)
    groups = pruner._groups if name == "resnet20B" else pruner._groups[:4]
    parameters = dict(model.named_parameters())
    for group in groups:
        channels = root_channels(model, spec, coupled, group)
        number = int(coupled.group[channels[0]])
        others = {g: "not this one" for g in range(len(coupled.names)) if g != number}
        importance = Importance(spec, dataclasses.replace(coupled, frozen=others), Criterion(normalize=normalize))
        raw = importance.raw(model.state_dict())
        (members,) = importance.members.counts[channels].unique().tolist()
        factor = 2 / (members * (float(raw[channels].max()) if normalize == "max" else 1.0))
        loss = importance.sparsity_loss(parameters)
        ours = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        pruner._groups = [group]
        pruner.regularize(model, alpha=2**4)
        touched = 0
        for (key, parameter), grad in zip(parameters.items(), ours, strict=True):
            assert parameter.grad is not None
            wanted = factor * parameter.grad
            found = torch.zeros_like(wanted) if grad is None else grad
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-6 * float(wanted.abs().max())), key
            touched += bool(wanted.any())
            parameter.grad = None
        modules = {dependency.target.module for dependency, _ in group}
        assert touched == sum(isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) for m in modules)


# By hand: W1 = [[1, 2], [0, 3]] and W2 = [[4, 0], [0, 1]], so the members of the two hidden channels are
# rows (1, 2), (0, 3) and columns (4, 0), (0, 1)


def by_hand(first: list[list[float]] | None = None, second: list[list[float]] | None = None) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first or [[1.0, 2.0], [0.0, 3.0]]))
        model[2].weight.copy_(torch.tensor(second or [[4.0, 0.0], [0.0, 1.0]]))
    return model


def importance_of(model: nn.Module, **criterion: Any) -> tuple[Importance, dict[str, Tensor]]:
    spec = to_graph(model, torch.zeros(1, 2)).spec
    return Importance(spec, couplings(spec), Criterion(**criterion)), dict(model.named_parameters())


HIDDEN = [2, 3]  # channels: two inputs, two hidden, two outputs


@pytest.mark.parametrize(
    ("criterion", "raw", "scores"),
    [
        ({}, [10.5, 5.0], [1.0, 5 / 10.5]),
        ({"normalize": "mean"}, [10.5, 5.0], [10.5 / 7.75, 5 / 7.75]),
        ({"normalize": "none"}, [10.5, 5.0], [10.5, 5.0]),
        ({"reduce": "first"}, [5.0, 9.0], [5 / 9, 1.0]),
        ({"reduce": "first", "normalize": "mean"}, [5.0, 9.0], [5 / 7, 9 / 7]),
        ({"p": 1.0, "normalize": "none"}, [3.5, 2.0], [3.5, 2.0]),
        ({"p": 4.0, "normalize": "none"}, [(17 + 256) / 2, (81 + 1) / 2], [136.5, 41.0]),
    ],
)
def test_scores_by_hand(criterion: dict[str, Any], raw: list[float], scores: list[float]) -> None:
    importance, state = importance_of(by_hand(), **criterion)
    assert importance.raw(state)[HIDDEN].tolist() == pytest.approx(raw)
    assert importance.scores(state)[HIDDEN].tolist() == pytest.approx(scores)


@pytest.mark.parametrize(
    ("criterion", "loss"),
    [
        ({}, 1 + 16 * 5 / 10.5),
        ({"alpha": 0.0}, 1 + 5 / 10.5),
        ({"alpha": 1.0, "normalize": "none"}, 10.5 + 2 * 5.0),
        ({"normalize": "mean"}, (10.5 + 16 * 5) / 7.75),
        ({"reduce": "first"}, 1 + 16 * 5 / 9),
    ],
)
def test_the_loss_by_hand(criterion: dict[str, Any], loss: float) -> None:
    """The weakest channel counts 2^alpha times, the strongest once; the ends of the network do not count."""
    importance, state = importance_of(by_hand(), **criterion)
    assert importance.sparsity_loss(state).item() == pytest.approx(loss)


def test_small_powers_have_a_gradient_at_zero() -> None:
    importance, state = importance_of(by_hand(), p=0.5, normalize="none")
    importance.sparsity_loss(state).backward()
    gradients = torch.cat([p.grad.flatten() for p in state.values() if p.grad is not None])
    assert bool((torch.cat([p.detach().flatten() for p in state.values()]) == 0).any())
    assert bool(gradients.isfinite().all())
    assert bool((gradients != 0).any())


def test_gamma_between_the_ends() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [5.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 5.0]]))
    spec = to_graph(model, torch.zeros(1, 1)).spec
    importance = Importance(spec, couplings(spec))
    gamma = importance.gamma(importance.raw(model.state_dict()))
    assert gamma[1:4].tolist() == pytest.approx([16.0, 2 ** (4 * (5 - 2) / (5 - 1)), 1.0])


def test_the_gradient_by_hand() -> None:
    importance, state = importance_of(by_hand())
    importance.sparsity_loss(state).backward()
    half = torch.tensor([[1.0], [16.0]]) / 10.5  # gamma / max; the factors 2 of the square and of the mean cancel
    assert torch.allclose(state["0.weight"].grad, half * state["0.weight"])
    assert torch.allclose(state["2.weight"].grad, half.T * state["2.weight"])


def test_removed_channels_leave_the_normaliser() -> None:
    importance, state = importance_of(by_hand())
    keep = torch.tensor([True, True, False, True, True, True])
    assert importance.scores(state, keep)[3].item() == pytest.approx(1.0)


# Degenerate weights


@pytest.mark.parametrize("scale_invariant", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "gamma"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], [[3.0, 0.0], [0.0, 3.0]], [1.0, 1.0]),  # equal
        ([[0.0, 0.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 3.0]], [16.0, 1.0]),  # one is zero
        ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0]),  # all are
    ],
)
def test_degenerate_groups(first: Any, second: Any, gamma: list[float], scale_invariant: bool) -> None:
    importance, state = importance_of(by_hand(first, second))
    assert importance.gamma(importance.raw(state).detach())[HIDDEN].tolist() == gamma
    assert importance.scores(state).isfinite().all()
    loss = importance.sparsity_loss(state, scale_invariant=scale_invariant)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in state.values())


# Scale invariance


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_scaling_a_group_changes_nothing(alpha: float) -> None:
    importance, state = importance_of(by_hand(), alpha=alpha)
    loss = partial(importance.sparsity_loss, scale_invariant=True)
    value = loss(state)
    scaled = {name: 3.0 * weight for name, weight in state.items()}
    assert torch.allclose(loss(scaled), value)
    grads = torch.autograd.grad(value, list(state.values()))
    along = sum(float((g * w).sum().detach()) for g, w in zip(grads, state.values(), strict=True))
    size = sum(float((g * w).abs().sum().detach()) for g, w in zip(grads, state.values(), strict=True))
    if alpha:
        assert size > 0.1
        assert abs(along) < 1e-5 * size
    else:
        assert size < 1e-5  # the sum of I / mean I is constant
    paper = torch.autograd.grad(importance.sparsity_loss(state), list(state.values()))
    assert all((g * w).sum() > 0.1 for g, w in zip(paper, state.values(), strict=True))


def test_scaling_a_whole_network_changes_nothing() -> None:
    model, _, spec, coupled = subject("resnet20B")
    importance = Importance(spec, coupled)
    state = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    loss = importance.sparsity_loss(state, scale_invariant=True)
    assert torch.allclose(importance.sparsity_loss({n: 0.1 * w for n, w in state.items()}, scale_invariant=True), loss)
    pairs = zip(state.values(), torch.autograd.grad(loss, list(state.values()), allow_unused=True), strict=True)
    inner = [(g * w).detach() for w, g in pairs if g is not None]
    assert abs(sum(float(i.sum()) for i in inner)) < 1e-9 * sum(float(i.abs().sum()) for i in inner)


def test_half_precision_scores_are_finite() -> None:
    model = by_hand().half()
    spec = to_graph(by_hand(), torch.zeros(1, 2)).spec
    importance = Importance(spec, couplings(spec))
    assert importance.scores(model.state_dict()).isfinite().all()
