"""Both methods together.

* `prune.votes`: the votes of a zoo's tasks decide which channels of the same network go first; of another network, or
  with an initial pruning, they are refused.
* `rewrite`: a metanetwork rewrites the network before the zoo is made; the zoo's network is the rewritten one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, VOTE_TINY
from safetensors.torch import load_file, save_file
from zoo_tasks import change

import gmn
from gmn.checkpoint import save_metanetwork
from gmn.convert import layouts, to_graph
from gmn.errors import GmnError
from gmn.meta_job import MetaJob
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.recipe import load_recipe
from gmn.run import Run
from gmn.settings import Recipe
from gmn.settings_vote import VoteRecipe
from gmn.vote import prior
from gmn.vote_job import VoteJob
from gmn.zoo import Zoo
from gmn.zoo_task import WEIGHTS

Finished = tuple[Path, dict[str, Any]]


def job(folder: Path, zoo: Path, *more: str) -> MetaJob:
    weights = zoo / "zoo" / "network" / "weights.safetensors"
    own = ("network.options={width: 8, shortcut: B}", f"network.weights={weights}", "data_models={train: 1}")
    recipe = load_recipe("quickstart", [*TINY, *own, f"prune.votes={zoo}", *more])
    assert isinstance(recipe, Recipe)
    return MetaJob(recipe, Run(folder, "recipe"))


def test_votes_decide_what_goes_first(vote_run: Finished, tmp_path: Path) -> None:
    runs = [job(tmp_path / weight, vote_run[0], f"prune.votes_weight={weight}") for weight in ("0.0", "50.0")]
    voters = gmn.load(vote_run[0])
    keeps = voters.zoo.masks([task.name for task in voters.zoo.tasks(split="zoo")])
    coupled = voters.backbone.coupled
    assert runs[1].prior is not None
    torch.testing.assert_close(runs[1].prior, prior(keeps, coupled, 50.0))
    votes = keeps.float().mean(0)
    loved = []
    for own in runs:
        kept = own.prune(own.built(0), 1.8).mask.keep
        prunable = coupled.nodes(coupled.prunable)
        loved.append(float(votes[kept & prunable].mean() - votes[~kept].mean()))
    assert loved[1] > loved[0] + 0.2


def test_votes_of_another_network_are_refused(vote_run: Finished, tmp_path: Path) -> None:
    with pytest.raises(GmnError, match="about something else"):
        job(tmp_path / "a", vote_run[0], "network.options={width: 4, shortcut: B}", "network.weights=null",
            "data_models.fit={epochs: 1, lr: 0.1}")  # fmt: skip
    with pytest.raises(GmnError, match="no zoo to vote"):
        job(tmp_path / "b", vote_run[0], f"prune.votes={tmp_path}")


def test_votes_of_a_network_with_other_weights_are_refused(vote_run: Finished, tmp_path: Path) -> None:
    """Of one structure with the zoo's: its channels mean something else. Zoos of an older gmn lack the digest."""
    weights = load_file(vote_run[0] / "zoo" / "network" / "weights.safetensors")
    weights["conv1.weight"] = weights["conv1.weight"].flip(0)
    save_file(weights, tmp_path / "other.safetensors")
    older = shutil.copytree(vote_run[0], tmp_path / "older")
    change(Zoo.open(older / "zoo"), f"DELETE FROM about WHERE key = '{WEIGHTS}'")
    assert WEIGHTS not in Zoo.open(older / "zoo").about
    for name, zoo in {"new": vote_run[0], "old": older}.items():
        assert job(tmp_path / name, zoo).prior is not None
        with pytest.raises(GmnError, match=r"something else: expected weights_sha256 '.*; networks of one structure"):
            job(tmp_path / f"{name}-other", zoo, f"network.weights={tmp_path / 'other.safetensors'}")


def test_the_zoo_of_a_rewritten_network(vote_run: Finished, tmp_path: Path) -> None:
    network = gmn.load_model(vote_run[0] / "zoo" / "network")
    graph = to_graph(network, torch.zeros(1, 1, 8, 8), layout=layouts()["cnn"])
    torch.manual_seed(0)
    config = MetaNetworkConfig(len(graph.spec.columns), graph.spec.edge_kinds, layers=1, hidden=4, zero_init=False)
    save_metanetwork(tmp_path / "meta.safetensors", MetaNetwork(config), layouts()["cnn"])
    weights = vote_run[0] / "zoo" / "network" / "weights.safetensors"
    own = ("pretrain=null", f"network.weights={weights}", f"rewrite={tmp_path / 'meta.safetensors'}")
    recipe = load_recipe("graph-mask-voting", [*VOTE_TINY, *own])
    assert isinstance(recipe, VoteRecipe)
    backbone = VoteJob(recipe, Run(tmp_path / "run", "recipe")).backbone
    expected = gmn.load(tmp_path / "meta.safetensors").rewrite(network, torch.zeros(1, 1, 8, 8))
    state, before = expected.state_dict(), network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.model.state_dict().items())
    assert not torch.equal(state["conv1.weight"], before["conv1.weight"])
