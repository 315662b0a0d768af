"""Contract of `gmn.scores` and `gmn.gradients`.

* Each criterion by hand on a network of two linear layers, and as torch-pruning computes it where both mean the same.
* While channels go, sums are those of the network without them; fpgm and random stay those of the whole network.
* Every criterion prunes a residual, a depthwise and grouped network and a vision transformer to a target.
* Every row of the paper's table of criteria is a recipe, and its loss is the formula's.
* What has no gradient is refused as a sparsity loss before a run has done anything.
* Functions and classes of a user are criteria; what they return is checked.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import depthwise, randomise, small

import gmn
from gmn import pipeline, scores
from gmn.cifar import CifarResNet
from gmn.convert import to_graph
from gmn.criteria import Importance
from gmn.data import Split
from gmn.errors import PruningError
from gmn.gradients import loss_gradients
from gmn.groups import couplings
from gmn.members import Members
from gmn.ranking import mask_steps, prune_to
from gmn.recipe import load_recipe
from gmn.scores import Score, make_score
from gmn.settings import Criterion, Prune
from gmn.training import generator

BUILT_IN = ["norm", "bn-scale", "taylor", "fpgm", "random"]
SUMS = ["norm", "bn-scale", "taylor"]


def split(images: int = 32, classes: int = 4, pixels: int = 8) -> Split:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (images, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (images,), generator=generator)
    return Split(pictures, labels, torch.full((3,), 0.5), torch.full((3,), 0.25))


class Plain(nn.Module):
    """A residual without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(x)))


@cache
def subject(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.zeros(1, 3, 8, 8)
    if name == "resnet8":
        return randomise(CifarResNet(8, num_classes=4, width=4, shortcut="B")), x
    if name == "plain":
        return small(Plain(), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1)), x
    if name == "mobile":
        own = [*depthwise()[:-3], nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)]  # type: ignore[index]
        return randomise(nn.Sequential(*own, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))), x
    size: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.models.vision_transformer.VisionTransformer(**size, num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5)
    return model, x


def importance(name: str, **criterion: Any) -> Importance:
    spec = to_graph(*subject(name)).spec
    return Importance(spec, couplings(spec), Criterion(**criterion))


def ranked(name: str, score: str, **config: Any) -> list[list[int]]:
    """Nodes that are gone after each step."""
    model, x = subject(name)
    spec, gradients = to_graph(model, x).spec, loss_gradients(model, split())
    own = {"config": Prune(**config), "criterion": Criterion(score=score), "gradients": gradients}
    masks = mask_steps(dict(model.state_dict()), spec, couplings(spec), **own)
    return [(~mask.keep).nonzero().flatten().tolist() for mask in masks]


# By hand: W1 = [[1, 2], [0, 3]], norm (3, -4), W2 = [[4, 0], [0, 1]]; dL/dw is 1 for W1, -1 for the norm, 2 for W2

STATE = {
    "0.weight": torch.tensor([[1.0, 2.0], [0.0, -3.0]]),
    "1.weight": torch.tensor([3.0, -4.0]),
    "2.weight": torch.tensor([[4.0, 0.0], [0.0, 1.0]]),
}
SLOPES = {
    name: torch.full_like(STATE[name], slope) for name, slope in (("0.weight", 1), ("1.weight", -1), ("2.weight", 2))
}
HIDDEN = [2, 3]


def by_hand(**criterion: Any) -> Importance:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    spec = to_graph(model, torch.zeros(1, 2)).spec
    return Importance(spec, couplings(spec), Criterion(**criterion))


ROOT26, ROOT17 = 26**0.5, 17**0.5  # rows (1, 2) and (0, -3), columns (4, 0) and (0, 1)


@pytest.mark.parametrize(
    ("criterion", "wanted"),
    [
        ({"score": "norm"}, [(5 + 16 + 9) / 3, (9 + 1 + 16) / 3]),
        ({"score": "norm", "p": 1.0}, [(3 + 4 + 3) / 3, (3 + 1 + 4) / 3]),
        ({"score": "norm", "reduce": "first"}, [5.0, 9.0]),
        ({"score": "bn-scale"}, [3.0, 4.0]),
        ({"score": "bn-scale", "reduce": "first"}, [3.0, 4.0]),
        ({"score": "taylor"}, [(3 + 8 + 3) / 3, (3 + 2 + 4) / 3]),
        ({"score": "taylor", "reduce": "first"}, [3.0, 3.0]),
        ({"score": "fpgm"}, [(ROOT26 + ROOT17) / 2] * 2),
        ({"score": "fpgm", "reduce": "first"}, [ROOT26] * 2),
    ],
)
def test_scores_by_hand(criterion: dict[str, Any], wanted: list[float]) -> None:
    found = by_hand(**criterion).raw(STATE, SLOPES)
    assert found[HIDDEN].tolist() == pytest.approx(wanted)


def test_fpgm_is_lowest_where_the_others_nearly_say_the_same() -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False))
    state = {"0.weight": torch.tensor([[-5.0], [1.0], [2.0], [9.0]]), "1.weight": torch.ones(1, 4)}
    spec = to_graph(model, torch.zeros(1, 1)).spec
    raw = Importance(spec, couplings(spec), Criterion(score="fpgm", reduce="first")).raw(state)
    assert raw[1:5].tolist() == [6 + 7 + 14, 6 + 1 + 8, 7 + 1 + 7, 14 + 8 + 7]


def test_random_is_another_one_for_another_seed() -> None:
    one, again, other = (by_hand(score="random", seed=seed).raw(STATE) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert bool(((one >= 0) & (one < 1)).all())


# Against torch-pruning


def unlike(name: str, criterion: Criterion, theirs: Any, *, positive: bool = False) -> list[str]:
    """Layers whose channels torch-pruning scores otherwise; `positive`: by the weights' absolute values."""
    model, x = subject(name)
    model = copy.deepcopy(model)
    for parameter in model.parameters() if positive else ():
        parameter.data.abs_()
    gradients = loss_gradients(model, split())
    for key, parameter in model.named_parameters():
        parameter.grad = gradients[key]
    spec = to_graph(model, x).spec
    coupled = couplings(spec)
    scores = Importance(spec, coupled, criterion).scores(dict(model.state_dict()), gradients=gradients)
    names = {module: own for own, module in model.named_modules()}
    seen, found = set(), []
    graph = tp.DependencyGraph().build_dependency(model, x)
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        block = next(b for b in spec.blocks if b.name == f"{names[group[0].dep.target.module]}.weight")
        channels = coupled.channel[block.dst[0] : sum(block.dst)]
        if (wanted := theirs(group)) is not None and bool(coupled.prunable[channels].all()):
            found += [] if torch.allclose(scores[channels], wanted, rtol=1e-5, atol=0) else [block.name]
            seen.add(int(coupled.group[channels[0]]))
    assert seen == set(coupled.group[coupled.prunable].tolist())
    return found


@pytest.mark.parametrize("normalize", ["max", "mean", "none"])
def test_scores_are_those_of_torch_pruning(normalize: Any) -> None:
    own: dict[str, Any] = {"group_reduction": "mean", "normalizer": None if normalize == "none" else normalize}
    for p in (1, 2):
        theirs = tp.importance.GroupMagnitudeImportance(p=p, **own)
        assert unlike("resnet8", Criterion(p=float(p), normalize=normalize), theirs) == []
    assert (
        unlike("resnet8", Criterion(score="bn-scale", normalize=normalize), tp.importance.BNScaleImportance(**own))
        == []
    )
    # theirs leaves the gradients of batch norms out, and takes distances of |w|
    assert (
        unlike("plain", Criterion(score="taylor", normalize=normalize), tp.importance.GroupTaylorImportance(**own))
        == []
    )
    theirs = tp.importance.FPGMImportance(p=1, **own)
    assert unlike("resnet8", Criterion(score="fpgm", normalize=normalize), theirs, positive=True) == []


# While channels go


@pytest.mark.parametrize("name", ["resnet8", "mobile", "vit"])
@pytest.mark.parametrize("score", SUMS)
def test_sums_are_those_of_the_network_with_zeros(name: str, score: str) -> None:
    """The quick way, from energies that are computed once, against asking again with the slices set to zero."""
    model, _ = subject(name)
    own, state = importance(name, score=score), dict(model.state_dict())
    gradients = loss_gradients(model, split())
    before = {key: value.clone() for key, value in state.items()}
    quick = own.score.course(own.members, state, gradients)
    slow = Score.course(own.score, own.members, state, gradients)
    generator, keep = torch.Generator().manual_seed(1), torch.ones(own.coupled.num_channels, dtype=torch.bool)
    first = quick(keep)
    for _ in range(3):
        keep &= torch.rand(len(keep), generator=generator) < 0.7
        found = quick(keep)
        assert torch.allclose(found, slow(keep), rtol=1e-5)
    assert bool((found[~keep] == 0).all())
    assert bool((found[keep] < first[keep]).any()) == (score != "bn-scale")
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize("score", ["fpgm", "random"])
def test_the_others_stay_those_of_the_whole_network(score: str) -> None:
    own, state = importance("resnet8", score=score, normalize="none"), dict(subject("resnet8")[0].state_dict())
    course = own.course(state)
    whole = course(keep := torch.ones(own.coupled.num_channels, dtype=torch.bool))
    keep[own.coupled.prunable.nonzero().flatten()[::2]] = False
    assert torch.equal(course(keep), whole)
    assert torch.equal(whole, own.raw(state))


@pytest.mark.parametrize("name", ["resnet8", "mobile", "vit"])
@pytest.mark.parametrize("score", BUILT_IN)
def test_every_criterion_prunes_to_a_target(name: str, score: str) -> None:
    model, x = subject(name)
    found = prune_to(
        model,
        to_graph(model, x),
        x,
        Prune(speed_up=1.4, steps=100),
        Criterion(score=score, seed=3),
        gradients=loss_gradients(model, split()),
    )
    assert 1.4 <= found.speed_up < 1.9  # a channel of the vit's stream is 1/24 of all
    assert found.model(torch.zeros(2, *x.shape[1:])).shape == (2, 4)


def test_criteria_choose_different_channels() -> None:
    last = {score: tuple(map(tuple, ranked("resnet8", score, steps=20))) for score in BUILT_IN}
    assert len(set(last.values())) == len(BUILT_IN)


def test_groups_that_a_criterion_cannot_judge_stay_whole() -> None:
    own = importance("vit", score="bn-scale")
    reasons = {own.coupled.names[g]: reason for g, reason in own.coupled.frozen.items()}
    assert reasons["blocks.0.mlp.fc1"] == reasons["blocks.1.attn.qkv"] == "nothing for the criterion 'bn-scale' to read"
    assert "patch_embed.proj" not in reasons
    model, x = subject("plain")
    with pytest.raises(PruningError, match=r"nothing can be pruned: .*'bn-scale' to read"):
        prune_to(model, to_graph(model, x), x, Prune(speed_up=1.5), Criterion(score="bn-scale"))


# The paper's table, and the sparsity loss


@pytest.mark.parametrize("reduce", ["mean", "first"])
@pytest.mark.parametrize("normalize", ["max", "mean", "none"])
def test_rows_of_the_papers_table_are_recipes(reduce: str, normalize: str) -> None:
    slices = [([1.0, 2.0], [4.0, 0.0], [3.0]), ([0.0, 3.0], [0.0, 1.0], [4.0])]
    for alpha, p in itertools.product((0, 2, 4, 6), (1, 2)):
        fields = {"reduce": reduce, "normalize": normalize, "alpha": alpha, "p": p}
        recipe = load_recipe("quickstart", [f"criterion.{key}={value}" for key, value in fields.items()])
        assert isinstance(recipe, gmn.settings.Recipe)
        sums = [[sum(w**p for w in own) for own in channel] for channel in slices]
        scores = [own[0] if reduce == "first" else sum(own) / 3 for own in sums]
        norm = {"max": max(scores), "mean": sum(scores) / 2, "none": 1.0}[normalize]
        spread = max(scores) ** 0.5 - min(scores) ** 0.5 or 1.0
        gammas = [2 ** (alpha * (max(scores) ** 0.5 - score**0.5) / spread) for score in scores]
        wanted = sum(gamma * score / norm for gamma, score in zip(gammas, scores, strict=True))
        found = by_hand(**recipe.criterion.model_dump()).sparsity_loss(STATE)
        assert found.item() == pytest.approx(wanted), fields


def test_bn_scale_is_a_sparsity_loss() -> None:
    """R = 16 * 3/4 + 4/4; only gammas have a gradient, and its sign is theirs."""
    state = {name: value.clone().requires_grad_() for name, value in STATE.items()}
    loss = by_hand(score="bn-scale").sparsity_loss(state)
    assert loss.item() == pytest.approx(16 * 3 / 4 + 1)
    loss.backward()
    assert state["1.weight"].grad.tolist() == pytest.approx([16 / 4, -1 / 4])  # type: ignore[union-attr]
    assert state["0.weight"].grad is state["2.weight"].grad is None


@pytest.mark.parametrize("score", ["taylor", "fpgm", "random"])
def test_a_run_with_no_sparsity_loss_ends_before_it_starts(score: str, tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [f"criterion.score={score}", "data.name=imagefolder", "data.root=nowhere"])
    with pytest.raises(PruningError, match=rf"no sparsity loss: got criterion\.score {score}; learn with norm"):
        pipeline.meta_train(recipe, tmp_path / "run")
    with pytest.raises(PruningError, match="no sparsity loss"):
        by_hand(score=score).sparsity_loss(STATE)


# Gradients


def test_gradients_are_those_of_the_mean_loss() -> None:
    model, own = copy.deepcopy(subject("resnet8")[0]), split(24)
    model.get_parameter("conv1.weight").requires_grad_(False)
    found = loss_gradients(model, own, 16, batch_size=5)
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    images, labels = next(own.batches(16, generator=generator(0, 0)))
    F.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6), name
    other = loss_gradients(model, own, 16, seed=1)
    assert not torch.allclose(other["conv1.weight"], found["conv1.weight"])


def test_gradients_are_of_all_classes() -> None:
    """Folders of images are sorted by class: the first ones are all of one."""
    model, own = copy.deepcopy(subject("resnet8")[0]), split(200)
    own = own.subset(own.labels.argsort(stable=True))
    for parameter in model.get_submodule("linear").parameters():
        parameter.data.zero_()
    found = loss_gradients(model, own, 40)["linear.bias"]  # what is predicted of each class minus its share
    assert bool((0.25 - found < 0.5).all())


def test_taylor_needs_gradients() -> None:
    with pytest.raises(PruningError, match="'taylor' needs gradients: got none"):
        by_hand(score="taylor").raw(STATE)


# Criteria of a user


@pytest.fixture
def register() -> Iterator[Callable[..., Any]]:
    before = dict(scores._SCORES)
    yield gmn.register_criterion
    scores._SCORES.clear()
    scores._SCORES.update(before)


def largest(members: Members, state: dict[str, Tensor]) -> Tensor:
    """The mean over slices of the largest weight in each."""
    return members.reduce(member.rows(state[member.param]).abs().amax(1) for member in members)


def test_a_function_is_a_criterion(register: Callable[..., Any]) -> None:
    wanted = [(2 + 4 + 3) / 3, (3 + 1 + 4) / 3]
    assert by_hand(score=f"{__name__}:largest").raw(STATE)[HIDDEN].tolist() == pytest.approx(wanted)
    register("largest")(largest)
    register("largest")(largest)  # a module that is loaded again
    own = by_hand(score="largest", normalize="none")
    assert own.raw(STATE)[HIDDEN].tolist() == pytest.approx(wanted)
    assert not own.score.differentiable
    keep = torch.tensor([True, True, False, True, True, True])
    assert own.course(STATE)(keep)[HIDDEN].tolist() == pytest.approx([0.0, (3 + 1 + 4) / 3])
    for other in (lambda members, state: largest(members, state), partial(largest)):
        with pytest.raises(PruningError, match="the name 'largest' of a criterion is taken"):
            register("largest")(other)


def test_a_function_may_have_gradients_and_be_a_loss(register: Callable[..., Any]) -> None:
    @register("slope", differentiable=True)
    def slope(members: Members, state: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        return members.reduce(member.rows(gradients[member.param]).abs().sum(1) for member in members)

    own = by_hand(score="slope")
    assert (own.score.needs_gradients, own.score.differentiable) == (True, True)
    assert own.raw(STATE, SLOPES)[HIDDEN].tolist() == pytest.approx([(2 + 4 + 1) / 3] * 2)


def test_a_class_is_a_criterion(register: Callable[..., Any]) -> None:
    @register("powers")
    class Powers(gmn.Score):
        differentiable = True

        def __init__(self, p: float) -> None:
            self.p = p

        def channels(self, members: Members, state: Any, gradients: Any = None) -> Tensor:
            return members.reduce((member.rows(state[member.param]).abs() ** self.p).sum(1) for member in members)

    ours, theirs = (by_hand(score=name, p=3.0) for name in ("powers", "norm"))
    assert torch.allclose(ours.raw(STATE), theirs.raw(STATE))
    assert torch.allclose(ours.sparsity_loss(STATE), theirs.sparsity_loss(STATE))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda members, state: torch.ones(3), r"malformed scores of the criterion 'own': expected one number for eac"),
        (lambda members, state: None, r"malformed scores of the criterion 'own': .*; got NoneType"),
        (lambda members, state: torch.full((6,), float("nan")), r"'own' do not rank: expected numbers from 0; got nan"),
        (lambda members, state: -torch.ones(6), r"'own' do not rank: expected numbers from 0; got -1"),
    ],
)
def test_what_a_criterion_returns_is_checked(wrong: Any, message: str, register: Callable[..., Any]) -> None:
    register("own")(wrong)
    with pytest.raises(PruningError, match=message):
        by_hand(score="own").course(STATE)(torch.ones(6, dtype=torch.bool))


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(PruningError, match=r"unknown criterion: expected one of norm, .*; did you mean 'taylor'\?"):
        make_score(Criterion(score="tailor"))
    with pytest.raises(PruningError, match=r"no such function: expected 'nothing' in module 'math'"):
        make_score(Criterion(score="math:nothing"))
    with pytest.raises(PruningError, match=r"not a criterion: expected a subclass of gmn\.Score, or a function"):
        make_score(Criterion(score="fractions:Fraction"))


def test_prune_in_python_takes_a_criterion() -> None:
    model, x = subject("resnet8")
    data = gmn.Data(split(64), split(16), split(16), ("a", "b", "c", "d"))
    for criterion in ("taylor", Criterion(score="random", seed=2)):
        found = gmn.prune(model, x, speed_up=1.5, criterion=criterion, data=data, recalibrate_images=0, keep=["conv1"])
        assert found.report["speed_up"] >= 1.5
        assert found.model.get_parameter("conv1.weight").shape[0] == 4
