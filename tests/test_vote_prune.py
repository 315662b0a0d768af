"""Contract of `gmn.zoo_build`, `gmn.neighbours` and `gmn.vote_prune`: meta-vote pruning on handwritten digits, small.

* Every planned task is pruned once and stored with what later steps need; a task that fails does not stop the others.
* A stored task comes back as the network it was; every similarity finds neighbours, the same classes nearest.
* A damaged task, or one of other tensors than expected, is named and never among the neighbours.
* The vote gives a network of the wanted size that starts from its neighbours: better than one from nowhere.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from zoo_tasks import flip, path_of

from gmn import bench_vote
from gmn.backbone import Backbone, prototypes
from gmn.bench_vote import vote_cost
from gmn.checkpoint import load_model, save_model
from gmn.data import Data, load_data
from gmn.errors import GmnError
from gmn.neighbours import Ranking, ranking
from gmn.networks import build_network
from gmn.settings import Fit
from gmn.settings_vote import FilterPruning, HeadPruning
from gmn.similarity import similarity_by_name
from gmn.surgery import remove
from gmn.tasks import sample_tasks, task_data, with_head
from gmn.training import evaluate, fit
from gmn.vote_prune import vote_for
from gmn.zoo import Task, Zoo
from gmn.zoo_build import Pruner, build_zoo, pruner

SHORT = FilterPruning(iterations=20, interval=10, batch_size=32, lr=0.02, final_iterations=13, score_images=100)
QUICK = Fit(epochs=1, lr=0.02, batch_size=32, images_per_epoch=320)  # ten steps


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def backbone(digits: Data) -> Backbone:
    torch.manual_seed(0)
    model = build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"shortcut": "B"})
    fit(model, digits.train, Fit(epochs=4, lr=0.1, batch_size=64), seed=0)
    return Backbone.of(model, digits.example_inputs())


@pytest.fixture(scope="module")
def prune(digits: Data) -> Pruner:
    return pruner(SHORT, digits.example_inputs(), 0.5)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, digits: Data, prune: Pruner) -> Zoo:
    zoo = Zoo.create(tmp_path_factory.mktemp("zoo"), backbone.about(ratio=0.5))
    zoo.plan(task for task in sample_tasks(digits.class_names, [3], 5, 1, seed=0) if task.split == "zoo")
    zoo.plan([Task("wrong", (3, 99), ("3", "99"))])
    assert build_zoo(backbone, digits, zoo, prune) == 5
    return zoo


def test_every_task_is_pruned_once_and_stored(zoo: Zoo, backbone: Backbone, digits: Data, prune: Pruner) -> None:
    assert zoo.counts() == {"planned": 0, "done": 5, "failed": 1}
    failed = zoo.task("wrong")
    assert (failed.status, "no such class" in failed.error) == ("failed", True)
    assert build_zoo(backbone, digits, zoo, prune) == 0
    assert zoo.verify() == []
    for task in zoo.tasks():
        _, mask, weights = zoo.load(task.name)
        mask.validate(backbone.spec, backbone.coupled)
        model = backbone.rebuilt(mask, weights)
        own = task_data(digits, task.classes)
        assert evaluate(model, own.val).accuracy == task.metrics["accuracy"] > 0.6
        assert sum(p.numel() for p in model.parameters()) == task.parameters
        head = with_head(backbone.model, backbone.head, 3, seed=0)
        assert task.parameters < 0.4 * sum(p.numel() for p in head.parameters())
        assert zoo.load_extra(task.name)["prototypes"].shape == (3, 64)


def found_by(name: str, backbone: Backbone, zoo: Zoo, data: Data, parents: dict[str, str] | None = None) -> Ranking:
    return ranking(backbone, zoo, data, similarity_by_name(name), parents=parents, images=200)


@pytest.mark.parametrize("name", ["prototypes", "leep", "shared_classes", "shared_parents"])
def test_the_same_classes_are_nearest(name: str, zoo: Zoo, backbone: Backbone, digits: Data) -> None:
    parents = {digit: "even" if int(digit) % 2 == 0 else "odd" for digit in digits.class_names}
    task = zoo.tasks(split="zoo")[2]
    found = found_by(name, backbone, zoo, task_data(digits, task.classes), parents)
    assert sorted(found.names) == [task.name for task in zoo.tasks()]
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert sorted(name for number in range(1, 6) for name in found.group(number)) == sorted(found.names)
    assert (found.flops > 0) == (name in ("prototypes", "leep"))
    if name != "shared_parents":  # several tasks have an odd and an even digit
        assert found.nearest(3)[0] == task.name


def test_a_search_in_pieces(zoo: Zoo, backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that have no memory for many images at a time answer the same."""
    data, plain, seen = task_data(digits, zoo.tasks()[0].classes), Backbone.rebuilt, list[int]()
    whole = found_by("leep", backbone, zoo, data)

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        if len(inputs[0]) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append(len(inputs[0]))

    def rebuilt(*own: Any) -> torch.nn.Module:
        model = plain(*own)
        model.register_forward_hook(hook)
        return model

    monkeypatch.setattr(Backbone, "rebuilt", rebuilt)
    cut = found_by("leep", backbone, zoo, data)
    assert (cut.names, cut.flops) == (whole.names, whole.flops)
    assert cut.scores == pytest.approx(whole.scores, rel=1e-5)
    assert 1 < max(seen) <= 60


def test_a_vote_starts_from_its_neighbours(zoo: Zoo, backbone: Backbone, digits: Data) -> None:
    target = sample_tasks(digits.class_names, [3], 5, 1, seed=0)[-1]
    data = task_data(digits, target.classes)
    names = found_by("prototypes", backbone, zoo, data).nearest(3)
    model, mask = vote_for(backbone, zoo, names, data, QUICK, ratio=0.5, seed=0)
    mask.validate(backbone.spec, backbone.coupled)
    again, same = vote_for(backbone, zoo, names, data, QUICK, ratio=0.5, seed=0)
    assert torch.equal(mask.keep, same.keep)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert evaluate(model, data.val).accuracy > 0.85
    few = QUICK.model_copy(update={"images_per_epoch": 7 * 32})  # in ten steps some random starts come close
    voted, _ = vote_for(backbone, zoo, names, data, few, ratio=0.5, seed=0)
    torch.manual_seed(1)
    fresh = build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"shortcut": "B"})
    nowhere = with_head(remove(fresh, backbone.spec, mask, backbone.example), backbone.head, 3, seed=0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in nowhere.parameters())
    fit(nowhere, data.train, few, seed=0)
    assert evaluate(voted, data.val).accuracy > evaluate(nowhere, data.val).accuracy + 0.2


def test_too_few_neighbours(zoo: Zoo, backbone: Backbone, digits: Data) -> None:
    with pytest.raises(GmnError, match="too small: expected 9 sound tasks; got 5"):
        found_by("prototypes", backbone, zoo, task_data(digits, (0, 1))).nearest(9)


def copied(zoo: Zoo, folder: Path) -> Zoo:
    return Zoo.open(shutil.copytree(zoo.folder, folder / "zoo"))


@pytest.mark.parametrize("name", ["prototypes", "leep", "shared_classes"])
def test_a_damaged_task_is_named_and_no_neighbour(
    name: str, zoo: Zoo, backbone: Backbone, digits: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, whole = zoo.tasks()[2], copied(zoo, tmp_path)
    data = task_data(digits, bad.classes)
    flip(path_of(whole, bad.name))
    found, sound = found_by(name, backbone, whole, data), found_by(name, backbone, zoo, data)
    assert f"skipped {bad.name}: " in capsys.readouterr().err
    kept = [pair for pair in zip(sound.names, sound.scores, strict=True) if pair[0] != bad.name]
    assert list(zip(found.names, found.scores, strict=True)) == kept


def test_a_task_of_other_tensors_does_no_harm(
    zoo: Zoo, backbone: Backbone, digits: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gmn zoo add` takes what says that it is for the same network: its tensors need not be what gmn would write."""
    own, data = copied(zoo, tmp_path), task_data(digits, (1, 2, 3))
    task, mask, weights = own.load(own.tasks()[0].name)
    extra = own.load_extra(task.name)
    fresh = {"status": "planned", "file": "", "sha256": "", "bytes": 0}
    strangers = ("bare", "headless", "wide", "loud", "odd")
    bare, headless, wide, loud, odd = (dataclasses.replace(task, name=name, **fresh) for name in strangers)
    own.add(bare, mask.keep, weights)
    own.add(headless, mask.keep, {name: t for name, t in weights.items() if name != f"{backbone.head}.weight"}, extra)
    own.add(wide, mask.keep, {**weights, "conv1.weight": torch.zeros(99, 1, 3, 3)}, extra)
    own.add(
        loud,
        mask.keep,
        {name: torch.full_like(t, 1e38) if t.is_floating_point() else t for name, t in weights.items()},
        extra,
    )
    own.add(odd, mask.keep, weights, {"prototypes": torch.zeros(99, 64)})
    found = found_by("leep", backbone, own, data)
    said = capsys.readouterr().err
    assert [f"skipped {name}: " in said for name in strangers] == [False, True, True, True, True]
    assert set(found.names) == {"bare", *(task.name for task in zoo.tasks())}
    assert found.scores[found.names.index("bare")] == found.scores[found.names.index(task.name)]
    with pytest.raises(GmnError, match="'prototypes' needs prototypes"):
        found_by("prototypes", backbone, own, data)


def test_a_task_may_have_more_classes_than_the_network(digits: Data) -> None:
    """Classes of other data than those of the pre-training."""
    torch.manual_seed(0)
    options = {"shortcut": "B", "width": 4}
    model = build_network("cifar.resnet8", num_classes=3, in_channels=1, options=options).eval()
    assert prototypes(Backbone.of(model, digits.example_inputs()), digits).shape == (10, 16)


def test_a_zoo_of_another_network(tmp_path: Path, zoo: Zoo, digits: Data) -> None:
    other = build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"shortcut": "B", "width": 8})
    with pytest.raises(GmnError):
        Zoo.open(zoo.folder, Backbone.of(other.eval(), digits.example_inputs()).about())


def test_the_cost_of_a_vote_is_measured() -> None:
    found = vote_cost("cifar.resnet8", 50, 3, rounds=1)
    assert (found.tasks, found.neighbours) == (50, 3)
    assert found.search > 0
    assert found.vote > 0
    assert found.total == found.search + found.vote + found.average < 5


def test_a_vote_among_a_thousand_tasks_takes_less_than_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the processor, since a busy machine's clock says little; a quarter of it is usual. LEEP is not meant."""
    monkeypatch.setattr(bench_vote, "time", SimpleNamespace(perf_counter=time.process_time))
    found = vote_cost("cifar.resnet20", 1000, 10, rounds=3)
    assert found.tasks == 1000
    assert 0 < found.total < 1
    bench_vote.show(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "search by prototypes" in said
    assert "LEEP runs every task's network" in said


def test_attention_heads_vote_and_come_back(tmp_path: Path, digits: Data) -> None:
    """A transformer: heads and nodes go, the stream stays; neighbours predict; what is saved loads with its heads."""
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 4}
    source = {"name": "timm.vit_tiny_patch16_224", "num_classes": 10, "in_channels": 1, "options": options}
    torch.manual_seed(0)
    backbone = Backbone.of(build_network(**source).eval(), digits.example_inputs(), only_inside=True)
    zoo = Zoo.create(tmp_path / "zoo", backbone.about(ratio=0.5))
    zoo.plan(sample_tasks(digits.class_names, [3], 3, 1, seed=0)[:3])
    config = HeadPruning(iterations=3, final_iterations=1, batch_size=16)
    assert build_zoo(backbone, digits, zoo, pruner(config, backbone.example, 0.5)) == 3
    data = task_data(digits, (1, 4, 7))
    names = ranking(backbone, zoo, data, similarity_by_name("leep")).nearest(2)
    model, mask = vote_for(backbone, zoo, names, data, QUICK, ratio=0.5, seed=0)
    mask.validate(backbone.spec, backbone.coupled)
    block = model.get_submodule("blocks.0")
    assert (block.attn.num_heads, block.mlp.fc1.out_features, block.mlp.fc2.out_features) == (2, 48, 24)
    save_model(tmp_path / "model", model, {**source, "num_classes": 3})
    images = next(data.test.batches(20))[0]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model")(images), model(images))
