"""The initial pruning whose speed-up is found on validation images.

* bisection finds the edge of what is accepted, with few probes, and none where there is none
* a probe's fine-tuning is a tenth of the recipe's
* in a run every probe is logged, the result is kept, goes for all networks and survives a resume
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, quickstart

import gmn
from gmn.errors import RecipeError
from gmn.initial import brief, candidates, largest
from gmn.meta_job import MetaJob
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run
from gmn.settings import Fit


def test_the_grid_ends_below_the_target() -> None:
    assert candidates(2.0) == [round(1.05 + 0.05 * k, 2) for k in range(18)]  # to 1.9: 2 / 1.05 is 1.905
    assert candidates(1.05) == candidates(1.1) == []


@pytest.mark.parametrize("edge", range(10))
def test_bisection_finds_the_edge(edge: int) -> None:
    grid, asked = [1.1 + 0.1 * k for k in range(9)], []

    def accepts(speed_up: float) -> bool:
        asked.append(speed_up)
        return grid.index(speed_up) < edge

    assert largest(grid, accepts) == (grid[edge - 1] if edge else 1.0)
    assert len(asked) <= 4
    assert largest([], accepts) == 1.0


def test_a_brief_fit_falls_like_the_long_one() -> None:
    fit = Fit(epochs=60, lr=0.1, milestones=[30, 50], warmup=5, mixup=0.2)
    assert brief(fit) == Fit(epochs=6, lr=0.1, milestones=[3, 5], warmup=0.5, mixup=0.2)
    assert brief(Fit(epochs=3, lr=0.1, milestones=[2])) == Fit(epochs=1, lr=0.1)
    assert brief(Fit(iterations=25, lr=0.1)) == Fit(iterations=3, lr=0.1)


AUTO = [*TINY, "data_models.initial_speed_up=auto", "data_models.initial_tolerance=5", "prune.speed_up=2.5"]


def job(folder: Path, *more: str, resume: bool = False) -> MetaJob:
    recipe = quickstart(*AUTO, "data_models.fit.epochs=8", *more)
    return MetaJob(recipe, Run(folder, dump_recipe(recipe), resume=resume))


def probes(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == "initial"]


def test_a_run_finds_it_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = job(tmp_path / "run")
    unpruned = own.trained(0)
    monkeypatch.setattr(MetaJob, "trained", lambda *_: unpruned)
    model = own.data_model(0)
    found, tried = own.initial_speed_up, probes(tmp_path / "run")
    before = gmn.evaluate(unpruned, own.data.val).accuracy
    assert 1.0 <= found <= candidates(2.5)[-1]
    assert 3 <= len(tried) <= 5
    for entry in tried:
        assert entry["speed_up"] >= entry["wanted"]
        assert entry["unpruned"] == before
        accurate = entry["validation_accuracy"] >= before - 0.05 - 1e-9
        assert entry["accepted"] == (accurate and entry["speed_up"] < 2.5)  # channels of a narrow network are coarse
    assert found == max([1.0, *(entry["wanted"] for entry in tried if entry["accepted"])])
    assert all(entry["wanted"] > found for entry in tried if not entry["accepted"])
    cost = gmn.cost(unpruned, own.example).flops / gmn.cost(model, own.example).flops
    assert cost == pytest.approx(found, rel=0.05)

    again = job(tmp_path / "run", resume=True)
    again.data_model(1)
    assert again.initial_speed_up == found
    assert len(probes(tmp_path / "run")) == len(tried)


def test_no_candidate_means_no_initial_pruning(tmp_path: Path) -> None:
    own = job(tmp_path / "run", "prune.speed_up=1.1", "data_models.initial_fit=null")
    assert gmn.cost(own.data_model(0), own.example) == gmn.cost(own.built(0), own.example)
    assert own.initial_speed_up == 1.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data_models.initial_speed_up=half"], "expected a number of at least 1, or auto; got 'half'"),
        (["data_models.initial_speed_up=0.5"], "expected a number of at least 1, or auto; got 0.5"),
        (["data_models.initial_speed_up=true"], "got True"),
        (["data_models.initial_tolerance=1"], "initial_tolerance goes with initial_speed_up: auto"),
        (["data_models.initial_speed_up=auto", "prune.votes=x"], "do not go with data_models.initial_speed_up"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", overrides)
