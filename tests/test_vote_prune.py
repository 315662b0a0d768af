"""Contract of `gmn.vote_prune`: the whole way of meta-vote pruning on handwritten digits, small.

* Every planned task is pruned once and stored with what later steps need; a task that fails does not stop the others.
* A stored task comes back as the network it was; every similarity finds neighbours, the same classes nearest.
* The vote gives a network of the wanted size that starts from its neighbours: better than one from nowhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gmn.bench_vote import vote_cost
from gmn.data import Data, load_data
from gmn.errors import GmnError
from gmn.networks import build_network
from gmn.settings import FilterPruning, Fit
from gmn.similarity import similarity_by_name
from gmn.surgery import remove
from gmn.tasks import sample_tasks, task_data, with_head
from gmn.training import evaluate, fit
from gmn.vote_prune import Backbone, build_zoo, nearest, vote_for
from gmn.zoo import Task, Zoo

SHORT = FilterPruning(ratio=0.5, iterations=20, interval=10, batch_size=32, lr=0.02, final_epochs=1, score_images=100)
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
def zoo(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, digits: Data) -> Zoo:
    zoo = Zoo.create(tmp_path_factory.mktemp("zoo"), backbone.about(ratio=0.5))
    zoo.plan(sample_tasks(digits.class_names, [3], 5, 1, seed=0))
    zoo.plan([Task("wrong", (3, 99), ("3", "99"))])
    assert build_zoo(backbone, digits, zoo, SHORT) == 6
    return zoo


def test_every_task_is_pruned_once_and_stored(zoo: Zoo, backbone: Backbone, digits: Data) -> None:
    assert zoo.counts()["done"] == 6
    failed = zoo.task("wrong")
    assert (failed.status, "no such class" in failed.error) == ("failed", True)
    assert build_zoo(backbone, digits, zoo, SHORT) == 0
    assert zoo.verify() == []
    for task in zoo.tasks():
        _, mask, weights = zoo.load(task.name)
        mask.validate(backbone.spec, backbone.coupled)
        model = backbone.rebuilt(weights)
        own = task_data(digits, task.classes)
        assert evaluate(model, own.val).accuracy == task.metrics["accuracy"] > 0.6
        assert sum(p.numel() for p in model.parameters()) == task.parameters
        head = with_head(backbone.model, backbone.example, 3, seed=0)
        assert task.parameters < 0.4 * sum(p.numel() for p in head.parameters())
        assert zoo.load_extra(task.name)["prototypes"].shape == (3, 64)


@pytest.mark.parametrize("name", ["prototypes", "leep", "shared_classes", "shared_parents"])
def test_the_same_classes_are_nearest(name: str, zoo: Zoo, backbone: Backbone, digits: Data) -> None:
    parents = {digit: "even" if int(digit) % 2 == 0 else "odd" for digit in digits.class_names}
    task = zoo.tasks(split="zoo")[2]
    found = nearest(backbone, zoo, task_data(digits, task.classes), similarity_by_name(name), 3, parents=parents)
    assert len(set(found)) == 3
    if name != "shared_parents":  # several tasks have an odd and an even digit
        assert found[0] == task.name


def test_a_vote_starts_from_its_neighbours(zoo: Zoo, backbone: Backbone, digits: Data) -> None:
    (target,) = zoo.tasks(split="target")
    data = task_data(digits, target.classes)
    names = nearest(backbone, zoo, data, similarity_by_name("prototypes"), 3)
    model, mask = vote_for(backbone, zoo, names, data, QUICK, ratio=0.5, seed=0)
    mask.validate(backbone.spec, backbone.coupled)
    again, same = vote_for(backbone, zoo, names, data, QUICK, ratio=0.5, seed=0)
    assert torch.equal(mask.keep, same.keep)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    torch.manual_seed(1)
    fresh = build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"shortcut": "B"})
    nowhere = with_head(remove(fresh, backbone.spec, mask, backbone.example), backbone.example, 3, seed=0)
    fit(nowhere, data.train, QUICK, seed=0)
    voted, random = (evaluate(network, data.val).accuracy for network in (model, nowhere))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in nowhere.parameters())
    assert voted > 0.85
    assert voted > random + 0.2


def test_too_few_neighbours(zoo: Zoo, backbone: Backbone, digits: Data) -> None:
    with pytest.raises(GmnError, match="too small: expected 9 tasks that are done; got 5"):
        nearest(backbone, zoo, task_data(digits, (0, 1)), similarity_by_name("prototypes"), 9)


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
