"""A zoo in Python: `gmn.load` and `gmn.prune(..., meta=voters)`.

* `gmn.load` gives what was learnt, by whatever method, from a run folder or from a zoo alone
* the nearest tasks vote for the sub-network of a new task; fine-tuning makes it better; the model is not changed
* it is the model that the zoo was made from that is pruned, on data, by the zoo's own ratio: all else is refused
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gmn
from gmn import checkpoint
from gmn.api import Meta, Voters, load_voters
from gmn.convert import layouts
from gmn.neighbours import ranking
from gmn.similarity import similarity_by_name
from gmn.tasks import task_data
from gmn.vote_prune import vote_for

Finished = tuple[Path, dict[str, Any]]
TUNE = gmn.Fit(epochs=1, iterations=20, lr=0.02, batch_size=32)


@pytest.fixture(scope="module")
def data() -> gmn.Data:
    return task_data(gmn.load_data("digits", limit=600), (1, 4, 7, 8))


@pytest.fixture(scope="module")
def voters(vote_run: Finished) -> Voters:
    found = gmn.load(vote_run[0])
    assert isinstance(found, Voters)
    return found


@pytest.fixture(scope="module")
def model(vote_run: Finished) -> nn.Module:
    return gmn.load_model(vote_run[0] / "zoo" / "network")


def test_load_gives_what_was_learnt(vote_run: Finished, voters: Voters, tmp_path: Path) -> None:
    assert len(voters.zoo.tasks()) == 12
    moved = shutil.copytree(vote_run[0] / "zoo", tmp_path / "elsewhere")
    alone = gmn.load(str(moved))
    assert isinstance(alone, Voters)
    assert alone.zoo.folder == moved
    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 4, "shortcut": "B"})
    layout = layouts()["generic"]
    spec = gmn.to_graph(model, torch.zeros(1, 1, 8, 8), layout=layout).spec
    network = gmn.MetaNetwork(gmn.MetaNetworkConfig(len(spec.columns), spec.edge_kinds, layers=1, hidden=4))
    (tmp_path / "meta").mkdir()
    checkpoint.save_metanetwork(tmp_path / "meta" / "metanetwork.safetensors", network, layout)
    for path in (tmp_path / "meta", tmp_path / "meta" / "metanetwork.safetensors"):
        assert isinstance(gmn.load(path), Meta)


def test_nothing_to_load(tmp_path: Path, vote_run: Finished) -> None:
    with pytest.raises(gmn.GmnError, match="nothing learnt here"):
        gmn.load(tmp_path)
    zoo = shutil.copytree(vote_run[0] / "zoo", tmp_path / "zoo")
    shutil.rmtree(zoo / "network")
    with pytest.raises(gmn.GmnError, match="the zoo lacks its network"):
        gmn.load(zoo)
    (zoo / "index.sqlite").write_text("torn")
    with pytest.raises(gmn.GmnError, match=r"index\.sqlite"):
        gmn.load(zoo)


def test_the_nearest_vote(voters: Voters, model: nn.Module, data: gmn.Data, vote_run: Finished) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example = data.example_inputs()
    result = gmn.prune(model, example, meta=voters, data=data, finetune=TUNE)
    again = gmn.prune(model, example, meta=voters, data=data, finetune=TUNE)
    raw = gmn.prune(model, example, meta=voters, data=data)
    other = gmn.prune(model, example, meta=voters, data=data, finetune=TUNE, seed=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    weights = result.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.model.state_dict().items())
    assert not all(torch.equal(weights[name], value) for name, value in other.model.state_dict().items())
    assert result.model(data.example_inputs()).shape == (1, 4)
    assert not result.model.training
    price = gmn.cost(result.model, example)
    assert (result.report["flops"], result.report["parameters"]) == (price.flops, price.parameters)
    assert result.report["speed_up"] == gmn.cost(model, example).flops / price.flops > 2
    (parameters,) = {r["parameters"] for r in vote_run[1]["results"] if r["row"] == "vote"}
    assert 0 < price.parameters - parameters < 40  # as in the run, but for a class more
    assert result.report["validation_accuracy"] == gmn.evaluate(result.model, data.val).accuracy
    assert result.report["validation_accuracy"] > raw.report["validation_accuracy"] + 0.1


def test_the_choices_of_an_election(voters: Voters, data: gmn.Data) -> None:
    one, three = (voters.elect(data, neighbours=count).state_dict() for count in (1, 3))
    assert not all(torch.equal(one[name], three[name]) for name in one)
    with pytest.raises(gmn.GmnError, match="too small: expected 13 sound tasks; got 12"):
        voters.elect(data, neighbours=13)
    with pytest.raises(gmn.GmnError, match="unknown similarity 'leap'"):
        voters.elect(data, similarity="leap")


def test_parents_of_the_data_find_neighbours(voters: Voters, data: gmn.Data) -> None:
    """Even and odd digits: the nearest tasks are those with as many of each."""
    parents = {str(digit): "odd" if digit % 2 else "even" for digit in range(10)}
    own = dataclasses.replace(data, parents=parents)
    model = voters.elect(own, similarity="shared_parents")
    names = ranking(voters.backbone, voters.zoo, own, similarity_by_name("shared_parents"), parents=parents).nearest(3)
    expected = vote_for(voters.backbone, voters.zoo, names, own, None, ratio=0.5)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(gmn.GmnError, match="needs parents"):
        voters.elect(dataclasses.replace(data, parents={}), similarity="shared_parents")


def test_what_a_zoo_cannot_do(voters: Voters, model: nn.Module, data: gmn.Data) -> None:
    example = data.example_inputs()
    with pytest.raises(gmn.GmnError, match=r"no speed_up; got speed_up=2; the zoo decides how much goes: 50%"):
        gmn.prune(model, example, meta=voters, data=data, speed_up=2.0)
    with pytest.raises(gmn.GmnError, match="a zoo votes for a task: expected data="):
        gmn.prune(model, example, meta=voters)
    with pytest.raises(gmn.GmnError, match="fine-tuning needs data"):
        gmn.prune(model, example, meta=voters, finetune=TUNE)
    options = {"width": 4, "shortcut": "B"}
    other = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options=options)
    with pytest.raises(gmn.GmnError, match=r"another network|about something else"):
        gmn.prune(other, example, meta=voters, data=data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("criterion", "taylor"),
        ("pattern", "2:4"),
        ("sparsity", 0.5),
        ("round_to", 8),
        ("recalibrate_images", 100),
        ("on_unknown", "error"),
    ],
)
def test_what_votes_have_no_use_for(voters: Voters, model: nn.Module, data: gmn.Data, name: str, value: Any) -> None:
    with pytest.raises(gmn.GmnError, match=f"votes decide which channels go: got {name}; leave that out"):
        gmn.prune(model, data.example_inputs(), meta=voters, data=data, **{name: value})


def test_a_model_of_the_same_shape_with_other_weights(voters: Voters, data: gmn.Data) -> None:
    """What is voted for is cut from the zoo's network: it would silently be given back in place of this one."""
    options = {"width": 8, "shortcut": "B"}
    other = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options=options)
    with pytest.raises(gmn.GmnError, match="network"):
        gmn.prune(other, data.example_inputs(), meta=voters, data=data)


def test_a_zoo_that_does_not_say_its_ratio(vote_run: Finished, voters: Voters, tmp_path: Path) -> None:
    zoo = gmn.zoo.Zoo.create(tmp_path / "zoo", {key: v for key, v in voters.zoo.about.items() if key != "ratio"})
    shutil.copytree(vote_run[0] / "zoo" / "network", zoo.folder / "network")
    with pytest.raises(gmn.GmnError, match="ratio"):
        load_voters(zoo.folder)
