"""The whole way of meta-vote pruning, on the shortened recipe `graph-mask-voting`.

* a run leaves recipe, network, zoo, results, report and page, and nothing temporary; every method has its row for every
  target and seed; no target is a task of the zoo; what the report says can be measured again
* a killed build goes on where it was, and ends with the zoo and the results of one that was not killed
* processes share the tasks of a zoo, and no one goes on before all of them are done
* finished trials are not run again
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from conftest import VOTE_TINY
from test_cli import Here
from zoo_tasks import change

import gmn
from gmn import pipeline, trials, vote_compare, zoo_build, zoo_claims
from gmn.api import Voters
from gmn.checkpoint import load_json
from gmn.recipe import load_recipe
from gmn.run import Run, load_report
from gmn.settings_vote import VoteRecipe
from gmn.tasks import task_data
from gmn.vote_job import VoteJob
from gmn.zoo import Zoo
from gmn.zoo_task import WEIGHTS

here = test_cli.here
Finished = tuple[Path, dict[str, Any]]
ROWS = ("vote", "nearest", "short", "long", "random", "reptile")
FEW = [*VOTE_TINY, "report.baselines=[random]", "report.seeds=1"]  # whose rows the full run has too


def options(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def recipe_of(overrides: list[str]) -> VoteRecipe:
    recipe = load_recipe("graph-mask-voting", overrides)
    assert isinstance(recipe, VoteRecipe)
    return recipe


@pytest.fixture
def run(vote_run: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(vote_run[0], tmp_path / "votes")


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_made(run: Path, tiny_vote_recipe: VoteRecipe, here: Here) -> None:
    assert load_recipe(run / "recipe.yaml") == tiny_vote_recipe
    code, out, err = here("report", "votes")
    assert (code, err) == (0, "")
    assert all(title in out for title in ("vote", "nearest only", "short pruning", "long pruning", "random", "Reptile"))
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    made = {"recipe.yaml", "environment.json", "metrics.jsonl", "results.jsonl", "report.json", "report.html"}
    zoo = {"zoo/index.sqlite", "zoo/network/model.json", "zoo/network/weights.safetensors", "zoo/reptile/model.json"}
    assert made | zoo <= files
    assert not [name for name in files if ".tmp" in name]
    assert Zoo.open(run / "zoo").verify() == []
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "long pruning" in page


def test_every_method_has_its_row_for_every_target_and_seed(vote_run: Finished) -> None:
    folder, report = vote_run
    results = report["results"]
    assert load_report(folder) == json.loads(json.dumps(report))
    assert [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()] == results
    wanted = {(row, target, seed) for row in ROWS for target in report["targets"] for seed in (0, 1)}
    assert {(result["row"], result["target"], result["seed"]) for result in results} == wanted
    assert len(results) == len(wanted) == 24
    assert {result["iterations"] for result in results if result["row"] == "long"} == {20}
    assert {result["iterations"] for result in results if result["row"] != "long"} == {10}
    neighbours = {row: {result["neighbours"] for result in results if result["row"] == row} for row in ROWS}
    assert neighbours == {**{row: {0} for row in ROWS}, "vote": {3}, "nearest": {1}}


def test_no_target_is_a_task_of_the_zoo(vote_run: Finished) -> None:
    folder, report = vote_run
    zoo = Zoo.open(folder / "zoo")
    voters = {frozenset(task.class_names) for task in zoo.tasks(split="zoo")}
    targets = {frozenset(names) for names in report["targets"].values()}
    assert (len(voters), len(targets), zoo.tasks(split="target")) == (12, 2, [])
    assert not voters & targets
    assert zoo.counts() == {"planned": 0, "done": 12, "failed": 0}


def accuracy(model: torch.nn.Module, data: gmn.Data, classes: list[str]) -> float:
    """On the test images of a task; by hand."""
    right = total = 0
    numbers = [data.class_names.index(name) for name in classes]
    with torch.no_grad():
        for images, labels in data.test.batches(100):
            for image, label in zip(images, labels.tolist(), strict=True):
                if label in numbers:
                    total += 1
                    right += int(model(image[None]).argmax()) == numbers.index(label)
    return right / total


def test_the_numbers_can_be_measured_again(vote_run: Finished, run: Path) -> None:
    report, job = vote_run[1], pipeline.reopened(run)
    data = gmn.load_data("digits", limit=300, validation=0.25)
    target = job.targets[0]
    first = {r["row"]: r for r in report["results"] if r["target"] == target.name and r["seed"] == 0}
    finished = trials.finish(job.data, None, trials.begin(job, trials.plan(job, "vote", target, 0)))
    vote = first["vote"]
    assert accuracy(finished.model, data, list(target.class_names)) == pytest.approx(vote["test_accuracy"])
    price = gmn.cost(finished.model, data.example_inputs())
    assert (price.flops, price.parameters) == (vote["flops"], vote["parameters"])
    assert price.flops < 0.5 * report["base"]["flops"]
    assert vote["training_flops"] == 3 * 10 * 16 * price.flops
    assert first["random"]["training_flops"] == vote["training_flops"]
    assert (first["random"]["parameters"], first["random"]["flops"]) == (price.parameters, price.flops)
    own = task_data(data, target.classes).train.labels
    read = sum(min(50, count) for count in torch.bincount(own).tolist())
    zoo = Zoo.open(run / "zoo").tasks()
    assert vote["search_flops"] == read * report["base"]["flops"] + 60 * sum(task.flops for task in zoo)
    assert first["random"]["search_flops"] == first["long"]["search_flops"] == 0
    assert first["long"]["training_flops"] > 1.5 * first["short"]["training_flops"] > vote["training_flops"]
    assert report["zoo"] == {"tasks": 12, "training_flops": sum(task.metrics["training_flops"] for task in zoo)}


def test_every_target_has_a_draw_of_its_own(run: Path) -> None:
    job = pipeline.reopened(run)
    drawn = [trials.begin(job, trials.plan(job, "random", target, 0)).keep for target in job.targets[:2]]
    assert not torch.equal(*(mask.keep for mask in drawn if mask))


def test_the_majority_of_the_nearest_decides(run: Path) -> None:
    """At the recipe's small temperature no unit goes that has more votes than one that stays."""
    job = pipeline.reopened(run)
    begun = trials.begin(job, trials.plan(job, "vote", job.targets[1], 1))
    assert begun.keep
    coupled, ranked = job.backbone.coupled, job.ranking(job.targets[1], "leep")
    assert len(ranked.names) == 12
    votes = job.zoo.masks(ranked.names[:3]).sum(0)[coupled.first_nodes]
    stays = begun.keep.keep[coupled.first_nodes]
    for layer in coupled.group[coupled.prunable].unique():
        own = coupled.group == layer
        assert int((own & stays).sum()) * 2 == int(own.sum())
        assert votes[own & stays].min() >= votes[own & ~stays].max()
    assert bool((votes[coupled.prunable] % 3 > 0).any())  # they do not agree on all units


# -- killed, shared, damaged -------------------------------------------------------------------------------------------


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    """`gmn meta-train` in a process of its own."""
    command = [sys.executable, "-m", "gmn", "meta-train", "graph-mask-voting", "--run", str(folder), *options(FEW)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *more], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def done(folder: Path) -> int:
    return Zoo.open(folder / "zoo").counts()["done"] if (folder / "zoo" / "index.sqlite").is_file() else 0


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was killed while it built its zoo."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    process = started(folder)
    try:
        until(lambda: done(folder) >= 7 or process.poll() is not None)
    finally:
        process.kill()
        process.communicate()
    assert 7 <= done(folder) < 12
    return folder


def same_zoo(one: Path, other: Path) -> None:
    """Tasks, masks and weights; not when and where they were made."""
    a, b = Zoo.open(one / "zoo"), Zoo.open(other / "zoo")
    names = [task.name for task in a.tasks()]
    assert [(task.name, task.plan, task.metrics) for task in a.tasks()] == [
        (task.name, task.plan, task.metrics) for task in b.tasks()
    ]
    assert torch.equal(a.masks(names), b.masks(names))
    for name in names:
        weights, others = a.load(name)[2], b.load(name)[2]
        assert all(torch.equal(weights[key], others[key]) for key in weights.keys() | others.keys())


def same_results(report: dict[str, Any], full: dict[str, Any]) -> None:
    """Every row of the shorter comparison is in the full one, number by number."""
    wanted = [r for r in full["results"] if r["row"] in ("vote", "random") and r["seed"] == 0]
    assert len(wanted) == 4
    key = lambda result: (result["target"], result["row"])  # noqa: E731
    assert sorted(report["results"], key=key) == sorted(wanted, key=key)


def test_a_killed_build_goes_on(stopped: Path, vote_run: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    before = {task.name: (task.created, task.file) for task in Zoo.open(folder / "zoo").tasks()}
    report = pipeline.meta_train(recipe_of(FEW), folder, resume=True)
    after = {task.name: (task.created, task.file) for task in Zoo.open(folder / "zoo").tasks()}
    assert len(after) == 12
    assert before.items() <= after.items()
    same_zoo(folder, vote_run[0])
    same_results(report, vote_run[1])


def test_processes_share_the_tasks(
    stopped: Path, vote_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper takes one task and is slow at it: the run does the others and must wait for it, not go on without."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    zoo, mine, add = Zoo.open(folder / "zoo"), [], zoo_build.prune_for

    def slow(*arguments: Any) -> Any:
        mine.append(arguments[-1].name)
        until(lambda: zoo.counts()["planned"] == 1)  # the run has done all others
        time.sleep(0.8)
        return add(*arguments)

    monkeypatch.setattr(zoo_build, "prune_for", slow)
    process = started(folder, "--resume")
    try:
        pipeline.join(folder)
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    assert len(mine) == 1
    assert f"waiting for other processes, which work on {mine[0]}" in said
    assert "failed" not in said
    same_zoo(folder, vote_run[0])
    same_results(load_report(folder), vote_run[1])


def test_a_task_of_a_dying_helper_is_taken_over(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper is a process that sleeps on its task; it dies while the others wait for it."""
    zoo = Zoo.open(shutil.copytree(stopped / "zoo", tmp_path / "zoo"))
    claimed = zoo.claim("helper")
    assert claimed
    helper = subprocess.Popen(["sleep", "100"])
    change(zoo, "UPDATE claims SET pid = ?, started = ?", helper.pid, zoo_claims.started(helper.pid))
    taken: list[str] = []
    said: list[str] = []

    def failing(*arguments: Any) -> Any:
        taken.append(arguments[-1].name)
        raise gmn.GmnError("not today")

    def kill(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            helper.kill()
            helper.wait()

    monkeypatch.setattr(zoo_build, "prune_for", failing)
    monkeypatch.setattr(zoo_build, "say", kill)
    planned = [task.name for task in zoo.tasks(status="planned")]
    try:
        zoo_build.build_zoo(*[None] * 2, zoo, failing)  # type: ignore[arg-type]
    finally:
        helper.kill()
        helper.wait()
    assert planned[0] == claimed.name
    assert taken == [*planned[1:], claimed.name]
    assert f"waiting for other processes, which work on {claimed.name}" in said


def test_what_failed_is_tried_again_by_a_resumed_run(
    run: Path, vote_run: Finished, tiny_vote_recipe: VoteRecipe
) -> None:
    zoo = Zoo.open(run / "zoo")
    zoo.redo(["zoo-00002"])
    task = zoo.claim("here")
    assert task
    zoo.fail(task, gmn.GmnError("the worker died"))
    (run / "report.json").unlink()
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True) == vote_run[1]
    assert zoo.tasks(status="failed") == []


def test_a_task_that_failed_votes_in_the_resumed_run(
    stopped: Path, vote_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: list[trials.Trial]
) -> None:
    """A run with a smaller zoo, then resumed, ends as one in which nothing failed."""
    folder, work = shutil.copytree(stopped, tmp_path / "run"), zoo_build.prune_for

    def dying(*arguments: Any) -> Any:
        if arguments[-1].name == "zoo-00011":
            raise gmn.GmnError("the worker died, 4 times")
        return work(*arguments)

    monkeypatch.setattr(zoo_build, "prune_for", dying)
    smaller = pipeline.meta_train(recipe_of(FEW), folder, resume=True)
    assert Zoo.open(folder / "zoo").counts() == {"planned": 0, "done": 11, "failed": 1}
    assert smaller["zoo"]["tasks"] == 11
    monkeypatch.setattr(zoo_build, "prune_for", work)
    again.clear()
    report = pipeline.meta_train(recipe_of(FEW), folder, resume=True)
    assert {trial.row for trial in again} == {"vote"}
    same_zoo(folder, vote_run[0])
    same_results(report, vote_run[1])


def test_a_zoo_knows_that_its_streams_stay(tiny_vote_recipe: VoteRecipe, run: Path, tmp_path: Path) -> None:
    """`gmn prune` and `gmn.load` read it from the zoo, whatever the recipe says."""
    few = ["report.baselines=[]", "report.seeds=1", "zoo.tasks=3", "zoo.targets=1"]
    pipeline.meta_train(recipe_of([*VOTE_TINY, *few, "zoo.filters.only_inside=true"]), tmp_path / "inside")
    found = gmn.load(tmp_path / "inside")
    assert isinstance(found, Voters)
    reasons = set(found.backbone.coupled.frozen.values())
    assert "residual stream" in reasons
    whole = gmn.load(run)
    assert isinstance(whole, Voters)
    assert "residual stream" not in set(whole.backbone.coupled.frozen.values())
    job = VoteJob(recipe_of([*VOTE_TINY, *few]), Run(tmp_path / "prune", "recipe"), zoo=tmp_path / "inside" / "zoo")
    assert job.backbone.coupled.frozen == found.backbone.coupled.frozen


def test_a_zoo_knows_the_weights_of_its_network(run: Path, vote_run: Finished, tiny_vote_recipe: VoteRecipe) -> None:
    """One of an older gmn does not, and is gone on with."""
    other = shutil.copytree(run, run.parent / "other")
    model, about = gmn.load_model(other / "zoo" / "network"), load_json(other / "zoo" / "network" / "model.json")
    next(model.parameters()).data += 1e-3
    gmn.save_model(other / "zoo" / "network", model, about["network"], input_shape=about["input_shape"])
    with pytest.raises(gmn.GmnError, match="networks of one structure, with other weights"):
        gmn.load(other)
    with pytest.raises(gmn.GmnError, match="networks of one structure, with other weights"):
        pipeline.meta_train(tiny_vote_recipe, other, resume=True)
    change(Zoo.open(run / "zoo"), f"DELETE FROM about WHERE key = '{WEIGHTS}'")
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True) == vote_run[1]
    assert Zoo.open(run / "zoo").verify() == []
    assert isinstance(gmn.load(run), Voters)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[trials.Trial]:
    """The trials that are begun."""
    found: list[trials.Trial] = []

    def counted(job: Any, trial: trials.Trial) -> Any:
        found.append(trial)
        return trials.begin(job, trial)

    monkeypatch.setattr(vote_compare, "begin", counted)
    return found


def test_trials_of_another_zoo_are_made_again(
    run: Path,
    vote_run: Finished,
    tiny_vote_recipe: VoteRecipe,
    again: list[trials.Trial],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A task is added to the zoo; those that need no zoo stand."""
    zoo = Zoo.open(run / "zoo")
    task, mask, weights = zoo.load("zoo-00000")
    extra = zoo.load_extra("zoo-00000")
    zoo.add(dataclasses.replace(task, name="another", file="", status="planned"), mask.keep, weights, extra)
    capsys.readouterr()
    report = pipeline.meta_train(tiny_vote_recipe, run, resume=True)
    said = capsys.readouterr().err
    assert {(trial.row, trial.seed) for trial in again} == {("vote", 0), ("vote", 1), ("nearest", 0), ("nearest", 1)}
    assert len(again) == said.count("made again, since other tasks can vote now") == 8
    others = [[r for r in own["results"] if not r["neighbours"]] for own in (report, vote_run[1])]
    assert others[0] == others[1]
    again.clear()
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True) == report
    assert again == []
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    older = [{key: value for key, value in line.items() if key != "zoo"} for line in lines]  # as an older gmn wrote
    (run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True) == report
    assert sorted({trial.row for trial in again}) == ["nearest", "vote"]


def test_finished_trials_are_not_run_again(
    run: Path, vote_run: Finished, tiny_vote_recipe: VoteRecipe, again: list[trials.Trial]
) -> None:
    results = run / "results.jsonl"
    (run / "report.json").unlink()
    with results.open("a") as file:
        file.write('{"row": "vote", "target": "tar')
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True) == vote_run[1]
    assert again == []
    *lines, last = vote_run[0].joinpath("results.jsonl").read_text().splitlines()
    results.write_text("\n".join([*lines, last[: len(last) // 2]]))
    (run / "report.json").unlink()
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True) == vote_run[1]
    assert [(trial.row, trial.target, trial.seed) for trial in again] == [("reptile", "target-00013", 1)]
    again.clear()
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True) == vote_run[1]
    assert again == []
