"""Contract of `gmn.filter_pruning`.

* Every layer ends at its ratio, in the number of rounds and steps that were asked for; frozen layers stay whole.
* The least active units go first, or those whose loss of w dL/dw is least; coupled layers as one.
* The mask is over the original network's nodes and is the shape of what is left; the original is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Residual, small

import gmn.filter_pruning
from gmn.convert import to_graph
from gmn.costs import cost
from gmn.data import Split
from gmn.errors import PruningError
from gmn.filter_pruning import filter_prune
from gmn.groups import couplings
from gmn.guard import Pieces
from gmn.settings_vote import FilterPruning

QUICK = {"iterations": 6, "interval": 2, "batch_size": 8, "lr": 1e-3, "final_iterations": 0, "score_images": 32}


def task(count: int = 32) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 4, torch.full((3,), 0.5), torch.full((3,), 0.3))


def example() -> Tensor:
    return torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_every_layer_ends_at_its_ratio(score: str) -> None:
    model = small(Residual(16), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 16, 1), width=16)
    before = copy.deepcopy(model.state_dict())
    shrunk = filter_prune(model, task(), FilterPruning(score=score, **QUICK), example(), ratio=0.75, seed=1)
    spec = to_graph(model, example()).spec
    coupled = couplings(spec)
    shrunk.keep.validate(spec, coupled)
    widths = {n: m.out_channels for n, m in shrunk.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths == {"0": 4, "1.conv1": 4, "1.conv2": 4, "2": 6, "4": 4}
    assert shrunk.model[-1].out_features == 4
    assert to_graph(shrunk.model, example()).spec.num_nodes == int(shrunk.keep.keep.sum())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_streams_may_stay_whole() -> None:
    model = small(Residual(16), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 16, 1), width=16)
    shrunk = filter_prune(model, task(), FilterPruning(only_inside=True, **QUICK), example(), ratio=0.75)
    widths = {n: m.out_channels for n, m in shrunk.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths == {"0": 16, "1.conv1": 4, "1.conv2": 16, "2": 6, "4": 4}


def test_an_interval_without_a_round() -> None:
    with pytest.raises(ValueError, match=r"interval \(50\) is more than iterations \(10\)"):
        FilterPruning(iterations=10)


def dead(units: tuple[int, ...], *, by: str) -> nn.Module:
    """A network some of whose 8 units never fire, or are never listened to."""
    model = small(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1))
    with torch.no_grad():
        if by == "activation":
            model[1].weight[list(units)] = 0.0
            model[1].bias[list(units)] = -1.0
        else:
            model[3].weight[:, list(units)] = 0.0
            model[1].weight[list(units)] = 0.0
            model[1].bias[list(units)] = 0.0
    return model


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_the_units_that_matter_least_go(score: str) -> None:
    model = dead((1, 4, 6), by=score)
    config = FilterPruning(score=score, **{**QUICK, "iterations": 1, "interval": 1, "lr": 1e-9})
    keep = filter_prune(model, task(), config, example(), ratio=0.375).keep.keep
    start = next(g.start for g in to_graph(model, example()).spec.groups if g.name == "1")
    assert (~keep[start : start + 8]).nonzero().flatten().tolist() == [1, 4, 6]


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_scores_are_of_all_classes(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of images are sorted by class; every round reads the same images."""
    whole, seen, batches = task(64), list[list[int]](), Split.batches
    split = whole.subset(whole.labels.argsort(stable=True))

    def watched(self: Split, size: int, *, limit: int | None = None, **more: Any) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append([])
        for images, labels in batches(self, size, limit=limit, **more):
            seen[-1] += [] if more.get("drop_last") else labels.tolist()  # trainings drop the last batch
            yield images, labels

    monkeypatch.setattr(Split, "batches", watched)
    config = FilterPruning(score=score, **{**QUICK, "score_images": 16})
    filter_prune(small(Residual(16), width=16), split, config, example(), ratio=0.75)
    scored = [labels for labels in seen if labels]
    assert len(scored) == 3
    assert scored[0] == scored[1] == scored[2]
    assert len(scored[0]) == 16
    assert set(scored[0]) == {0, 1, 2, 3}


def test_rounds_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 iterations in rounds of 3 are 3 rounds and 2 steps more, which the last ones follow."""
    taken: list[tuple[int, bool]] = []
    real = gmn.filter_pruning.fit

    def fit(model: nn.Module, split: Split, config: gmn.Fit, **options: object) -> None:
        taken.append((config.iterations or 0, all(p.requires_grad for p in model.parameters())))
        real(model, split, config, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(gmn.filter_pruning, "fit", fit)
    config = FilterPruning(**{**QUICK, "iterations": 11, "interval": 3, "final_iterations": 4})
    filter_prune(small(Residual(8), width=8), task(), config, example(), ratio=0.5)
    assert taken == [(3, True), (3, True), (3, True), (6, True)]
    taken.clear()
    config = config.model_copy(update={"interval": 9, "head_iterations": 5})
    filter_prune(small(Residual(8), width=8), task(), config, example(), ratio=0.5)
    assert taken == [(5, False), (9, True), (6, True)]


def test_the_head_alone_learns_first() -> None:
    model = small(Residual(8), width=8)
    stages = gmn.filter_pruning._Stages(task(), FilterPruning(**QUICK), example(), 0)
    trained = copy.deepcopy(model)
    stages.train_head(trained, "4", 3)
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert moved == {"4.weight", "4.bias"}
    assert all(p.requires_grad for p in trained.parameters())
    moved = {name for name, b in trained.named_buffers() if not torch.equal(b, model.get_buffer(name))}
    assert moved == set()
    assert stages.flops == 3 * 8 * cost(model, example()).flops


def test_every_image_counts_as_much_in_the_scores() -> None:
    """33 images in batches of 32: the last one is one of 33."""
    model, spec = small(Residual(16), width=16), to_graph(small(Residual(16), width=16), example()).spec
    images, coupled = task(33), couplings(spec)
    batches = [list(images.batches(size)) for size in (32, 33)]
    uneven, whole = (gmn.filter_pruning._activation(model, spec, coupled, own, Pieces("scores", 33)) for own in batches)
    assert torch.allclose(uneven, whole, rtol=1e-4)


def test_what_it_costs() -> None:
    """Without any rounds that cut, every image costs three forward passes, and one for the scores."""
    model, config = small(Residual(8), width=8), FilterPruning(**{**QUICK, "iterations": 3, "interval": 3})
    shrunk = filter_prune(model, task(), config, example(), ratio=0.01)
    assert shrunk.training_flops == (3 * 3 * 8 + 32) * cost(model, example()).flops
    half = filter_prune(model, task(), config.model_copy(update={"final_iterations": 2}), example(), ratio=0.5)
    assert half.training_flops == shrunk.training_flops + 3 * 2 * 8 * cost(half.model, example()).flops


def test_a_schedule_within_other_steps() -> None:
    config = FilterPruning(head_iterations=100, iterations=800, interval=40, final_iterations=100)
    shorter = config.within(50)
    assert (shorter.head_iterations, shorter.iterations, shorter.interval, shorter.final_iterations) == (5, 40, 2, 5)
    assert all(config.within(steps).total == steps for steps in (1, 7, 99, 1000, 12_345))


def test_decay_falls_after_the_last_round_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gmn.filter_pruning, "fit", lambda model, split, steps, **_: seen.append(steps.schedule))
    for decay in (False, True):
        config = FilterPruning(**{**QUICK, "iterations": 6, "interval": 3, "final_iterations": 4, "decay": decay})
        filter_prune(small(Residual(8), width=8), task(), config, example(), ratio=0.5)
    assert seen == ["multistep"] * 5 + ["cosine"]


def test_the_network_still_learns() -> None:
    """A task that a few units can solve: the sign of each of two colours."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    colours = torch.stack([labels % 2, labels // 2, torch.zeros(64)], 1)[:, :, None, None].expand(64, 3, 8, 8) * 200
    noise = torch.randint(0, 40, (64, 3, 8, 8), generator=generator)
    split = Split((colours + noise).to(torch.uint8), labels.long(), torch.full((3,), 0.4), torch.full((3,), 0.3))
    config = FilterPruning(**{**QUICK, "iterations": 60, "interval": 10, "lr": 0.1, "final_iterations": 80})
    shrunk = filter_prune(small(Residual(8), width=8), split, config, example(), ratio=0.5)
    images, target = next(split.batches(64))
    assert float((shrunk.model(images).argmax(1) == target).float().mean()) > 0.9
    assert F.cross_entropy(shrunk.model(images), target) < 0.5


def test_a_network_of_which_nothing_may_go() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(
        PruningError, match=r"nothing can be pruned: all channels must stay: network input; network output"
    ):
        filter_prune(model, task(), FilterPruning(**QUICK), example(), ratio=0.5)


@pytest.mark.parametrize(("interval", "ratio", "left"), [(1, 0.9, 2), (2, 0.5, 8), (20, 0.75, 4)])
def test_small_layers_reach_their_ratio_too(interval: int, ratio: float, left: int) -> None:
    """16 units in 20 rounds: a share of 11 % is less than one unit towards the end."""
    config = FilterPruning(**{**QUICK, "iterations": 20, "interval": interval})
    shrunk = filter_prune(small(Residual(16), width=16), task(), config, example(), ratio=ratio)
    assert shrunk.model[0].out_channels == left
    assert [m.out_channels for m in shrunk.model.modules() if isinstance(m, nn.Conv2d)] == [left] * 3


def test_units_without_a_module_of_their_own_are_refused() -> None:
    """The heads of a fused q, k and v have no activation that is theirs; gradients score them."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=3)
    with pytest.raises(PruningError, match=r"without an activation to score: in blocks.0.attn.*score: taylor"):
        filter_prune(model, task(), FilterPruning(**QUICK), example(), ratio=0.5)
    shrunk = filter_prune(model, task(), FilterPruning(**{**QUICK, "score": "taylor"}), example(), ratio=0.5)
    assert 0 < int(shrunk.keep.keep.sum()) < len(shrunk.keep.keep)


def test_channels_are_last_behind_a_linear_layer() -> None:
    """Eight tokens of eight channels: what counts is the mean of a channel, not of a token."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)).eval()
    tokens = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    spec = to_graph(model, tokens).spec
    batches = [(tokens, torch.zeros(3, dtype=torch.long))]
    scores = gmn.filter_pruning._activation(model, spec, couplings(spec), batches, Pieces("scores", 3))
    expected = 3 * F.relu(model[0](tokens)).mean((0, 1))
    assert torch.allclose(scores[8:16], expected.detach())
