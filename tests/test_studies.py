"""Contract of `gmn.studies` and `gmn study`, on the shortened recipe `graph-mask-voting`.

* every study leaves a JSON with what its pictures need, its pictures, and a page that holds them
* IoU and recall are those of the zoo's masks, counted here with sets of numbers
* five groups part the neighbours, the nearest first; no task is its own neighbour
* accuracies are means over the trials of results.jsonl; what the comparison has measured is not run again
* mistakes are one line and exit code 2, and leave nothing
"""

from __future__ import annotations

import base64
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cli
from test_cli import Here, mistake

from gmn import pipeline, studies, study_cli, vote_compare
from gmn.neighbours import Ranking
from gmn.settings_vote import VoteRecipe
from gmn.vote_job import VoteJob
from gmn.zoo import Zoo

here = test_cli.here
Finished = tuple[Path, dict[str, Any]]
PICTURES = {
    "iou": ["iou.png"],
    "recall": ["recall-layers.png", "recall.png"],
    "neighbours": ["neighbours.png"],
    "iterations": ["iterations.png"],
    "similarity": ["similarity.png"],
}


@pytest.fixture(scope="module")
def studied(vote_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with all five studies."""
    run = shutil.copytree(vote_run[0], tmp_path_factory.mktemp("studies") / "votes")
    usual: dict[str, Any] = {"similarity": None, "targets": 12}
    study_cli.study("iou", run, **{**usual, "similarity": "shared_classes"})
    study_cli.study("recall", run, **{**usual, "similarity": "shared_parents", "targets": 2})
    study_cli.study("neighbours", run, **{**usual, "neighbours": "3,1"})
    study_cli.study("iterations", run, **{**usual, "iterations": "10, 2"})
    study_cli.study("similarity", run, **{**usual, "iterations": "1", "targets": 1})
    return run


@pytest.fixture
def run(studied: Path, tmp_path: Path) -> Path:
    """A copy of the run with its studies."""
    return shutil.copytree(studied, tmp_path / "votes")


def content(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "studies" / f"{name}.json").read_text())
    return found


# -- what is left ------------------------------------------------------------------------------------------------------


def test_every_study_leaves_numbers_pictures_and_a_page(studied: Path) -> None:
    page = (studied / "report.html").read_text()
    made = {path.name for path in (studied / "studies").iterdir()}
    assert made == {f"{name}.json" for name in PICTURES} | {file for files in PICTURES.values() for file in files}
    for name, files in PICTURES.items():
        found = content(studied, name)
        assert (found["study"], found["recipe"]) == (name, "graph-mask-voting")
        assert found["title"] in page
        for file in files:
            picture = (studied / "studies" / file).read_bytes()
            assert picture.startswith(b"\x89PNG\r\n\x1a\n")
            assert base64.b64encode(picture).decode() in page
    assert page.count("data:image/png;base64,") == 7  # six of studies, one of the methods


def test_what_the_pictures_are_drawn_from(studied: Path) -> None:
    found = content(studied, "iou")
    assert found["layers"]
    for group in found["groups"].values():
        assert len(group["mean"]) == len(group["std"]) == len(found["layers"])
    found = content(studied, "recall")
    assert found["neighbours"] == 10
    assert set(found["groups"]) == {"1", "all"}  # all tasks are equally similar
    for group in found["groups"].values():
        assert (len(group["b_mean"]), len(group["b_std"]), len(group["d_mean"])) == (10, 10, 11)
    assert list(found["layers"]) == content(studied, "iou")["layers"]
    assert all(len(layer["b_mean"]) == 10 for layer in found["layers"].values())
    for name, series in (("neighbours", ["vote"]), ("iterations", ["vote", "short pruning", "random units"])):
        found = content(studied, name)
        assert list(found["series"]) == series
        assert found["x_ticks"] == ([1, 3] if name == "neighbours" else [2, 10])
        assert found["log"] == (name == "iterations")
        for line in found["series"].values():
            assert line["x"] == found["x_ticks"]
            assert len(line["mean"]) == len(line["std"]) == 2
    found = content(studied, "similarity")
    assert (list(found["series"]), len(found["groups"])) == (["1 steps"], 5)
    assert set(found["references"]) == {"short pruning", "long pruning", "random units", "Reptile"}


# -- masks, by hand ----------------------------------------------------------------------------------------------------


def kept(job: VoteJob, name: str) -> list[set[int]]:
    """The units of each layer that a task of the zoo keeps, as sets of the first nodes that each unit has."""
    coupled, (mask,) = job.backbone.coupled, job.zoo.masks([name])
    layers: dict[int, set[int]] = {}
    seen: set[int] = set()
    for node, (unit, stays) in enumerate(zip(coupled.channel.tolist(), mask.tolist(), strict=True)):
        if unit in seen or not bool(coupled.prunable[unit]):
            continue
        seen.add(unit)
        layers.setdefault(int(coupled.group[unit]), set()).update({node} if stays else ())
    return [layers[number] for number in sorted(layers)]


def groups_by_hand(zoo: Zoo, name: str) -> dict[int, list[str]]:
    """The other tasks in five intervals of the number of classes that they share with this one."""
    own = zoo.task(name).class_names
    shared = {task.name: len({*task.class_names} & {*own}) for task in zoo.tasks() if task.name != name}
    high, low = max(shared.values()), min(shared.values())
    groups: dict[int, list[str]] = {number: [] for number in range(1, 6)}
    for other, score in shared.items():
        groups[min(5, 1 + 5 * (high - score) // (high - low)) if high > low else 1].append(other)
    return groups


def test_iou_is_that_of_the_masks(studied: Path) -> None:
    job, found = pipeline.reopened(studied), content(studied, "iou")
    pairs: dict[str, list[list[float]]] = {}
    for task in job.zoo.tasks():
        own = kept(job, task.name)
        for number, names in groups_by_hand(job.zoo, task.name).items():
            for name in names:
                shares = [len(a & b) / len(a | b) for a, b in zip(own, kept(job, name), strict=True)]
                pairs.setdefault(str(number), []).append(shares)
    assert sum(group["pairs"] for group in found["groups"].values()) == 12 * 11
    assert found["groups"].keys() == pairs.keys()
    assert len(pairs) > 1
    for group, shares in pairs.items():
        assert found["groups"][group]["pairs"] == len(shares)
        columns = list(zip(*shares, strict=True))
        assert found["groups"][group]["mean"] == pytest.approx([statistics.fmean(column) for column in columns])
        assert found["groups"][group]["std"] == pytest.approx([statistics.stdev(column) for column in columns])
        assert any(0 < mean < 1 for mean in found["groups"][group]["mean"])


def test_recall_is_that_of_the_masks(run: Path) -> None:
    study_cli.study("recall", run, similarity="shared_parents", targets=1)
    job, found = pipeline.reopened(run), content(run, "recall")
    target, *others = [task.name for task in job.zoo.tasks()]
    own, voters = kept(job, target), [kept(job, name) for name in others[:10]]  # of equal ones the first
    b: list[list[float | None]] = []
    d: list[list[int]] = []
    for layer, units in enumerate(own):
        votes = {unit: sum(unit in voter[layer] for voter in voters) for unit in all_units(job, layer)}
        having = [{unit for unit, count in votes.items() if count == a} for a in range(11)]
        b.append([len(some & units) / len(some) if some else None for some in having[1:]])
        d.append([len(some & units) for some in having])
    assert [layer["b_mean"] for layer in found["layers"].values()] == [
        [pytest.approx(share) if share is not None else None for share in row] for row in b
    ]
    assert {share for row in b for share in row} - {None, 0.0, 1.0}  # not a trivial case
    columns = [[share for share in column if share is not None] for column in zip(*b, strict=True)]
    means = [pytest.approx(statistics.fmean(column)) if column else None for column in columns]
    spreads = [pytest.approx(statistics.stdev(column)) if len(column) > 1 else 0.0 for column in columns]
    for group in ("1", "all"):
        assert found["groups"][group]["b_mean"] == means
        assert found["groups"][group]["b_std"] == spreads
        assert found["groups"][group]["d_mean"] == pytest.approx([statistics.fmean(c) for c in zip(*d, strict=True)])


def all_units(job: VoteJob, layer: int) -> set[int]:
    """First nodes of all units of a layer."""
    coupled = job.backbone.coupled
    group = sorted({int(coupled.group[unit]) for unit in range(coupled.num_channels) if bool(coupled.prunable[unit])})
    channels = coupled.channel.tolist()
    return {channels.index(unit) for unit in set(channels) if int(coupled.group[unit]) == group[layer]}


def test_groups_part_the_neighbours_and_no_task_is_its_own(studied: Path) -> None:
    job = pipeline.reopened(studied)
    names = {task.name for task in job.zoo.tasks()}
    pairs: list[tuple[Any, Ranking]] = list(
        studies._zoo_targets(job, studies.Choices(["shared_classes"], 12, [3], [10]))
    )
    assert [task.name for task, _ in pairs] == sorted(names)
    for task, others in pairs:
        assert set(others.names) == names - {task.name}
        assert list(others.scores) == sorted(others.scores, reverse=True)
        groups = [others.group(number) for number in range(1, 6)]
        assert sorted(name for group in groups for name in group) == sorted(others.names)
        assert {number: sorted(group) for number, group in enumerate(groups, 1)} == groups_by_hand(job.zoo, task.name)


# -- accuracies --------------------------------------------------------------------------------------------------------


def results(run: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, (run / "results.jsonl").read_text().splitlines())


def test_accuracies_are_means_over_trials(studied: Path, vote_run: Finished) -> None:
    def mean(**wanted: Any) -> tuple[float, float]:
        found = [r["test_accuracy"] for r in results(studied) if all(r[key] == value for key, value in wanted.items())]
        assert len(found) == (2 if wanted.get("group") else 4)  # seeds x targets
        return pytest.approx(statistics.fmean(found)), pytest.approx(statistics.stdev(found))

    line = content(studied, "neighbours")["series"]["vote"]
    expected = [mean(row="vote", neighbours=count, iterations=10, group=0) for count in (1, 3)]
    assert list(zip(line["mean"], line["std"], strict=True)) == expected
    found = content(studied, "iterations")["series"]
    for row, title in (("vote", "vote"), ("short", "short pruning"), ("random", "random units")):
        more = {"neighbours": 3, "group": 0} if row == "vote" else {}
        expected = [mean(row=row, iterations=steps, **more) for steps in (2, 10)]
        assert list(zip(found[title]["mean"], found[title]["std"], strict=True)) == expected
    compared = [r for r in vote_run[1]["results"] if r["row"] == "long"]
    reference = content(studied, "neighbours")["references"]["long pruning"]
    assert reference == pytest.approx(statistics.fmean(r["test_accuracy"] for r in compared))
    study = content(studied, "similarity")
    on_one = [r["test_accuracy"] for r in compared if r["target"] == "target-00012"]
    assert study["references"]["long pruning"] == pytest.approx(statistics.fmean(on_one))  # as many targets as the bars
    assert study["references"]["long pruning"] != reference
    bars = study["series"]["1 steps"]
    job = pipeline.reopened(studied)
    ranked = job.ranking(job.targets[0], "leep")
    for number in range(1, 6):
        expected = mean(row="vote", group=number, target="target-00012") if ranked.group(number) else (None, None)
        assert (bars["mean"][number - 1], bars["std"][number - 1]) == expected
    assert bars["mean"][0] is not None
    assert bars["mean"][4] is not None


def test_several_similarities_in_one_picture(run: Path) -> None:
    usual: dict[str, Any] = {"targets": 1, "iterations": "1"}
    alone = content(run, "similarity")["series"]["1 steps"]
    study_cli.study("similarity", run, similarity="leep, shared_classes", **usual)
    found = content(run, "similarity")
    assert list(found["series"]) == ["leep, 1 steps", "shared_classes, 1 steps"]
    assert found["series"]["leep, 1 steps"] == alone
    assert found["series"]["shared_classes, 1 steps"] != alone
    assert found["similarity"] == "leep, shared_classes"


def test_what_the_comparison_has_measured_is_not_run_again(
    vote_run: Finished, tiny_vote_recipe: VoteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(vote_run[0], tmp_path / "votes")

    def fail(*_: Any) -> None:
        raise AssertionError("a trial is run again")

    monkeypatch.setattr(vote_compare, "begin", fail)
    usual: dict[str, Any] = {"similarity": "leep", "targets": 2}
    rows = {row: [r["test_accuracy"] for r in vote_run[1]["results"] if r["row"] == row] for row in ("vote", "short")}
    study_cli.study("neighbours", run, neighbours="3", **usual)
    line = content(run, "neighbours")["series"]["vote"]
    assert line == {"x": [3], "mean": [statistics.fmean(rows["vote"])], "std": [statistics.stdev(rows["vote"])]}
    study_cli.study("iterations", run, iterations="10", **usual)
    found = content(run, "iterations")["series"]
    assert found["short pruning"]["mean"] == [statistics.fmean(rows["short"])]
    assert (run / "results.jsonl").read_bytes() == (vote_run[0] / "results.jsonl").read_bytes()
    with pytest.raises(AssertionError, match="run again"):
        study_cli.study("neighbours", run, neighbours="2", **usual)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["iou", "votes", "--neighbours", "3"], ["an option of another study", "the study neighbours", "--neighbours"]),
        (["recall", "votes", "--iterations", "3"], ["the study iterations or similarity; got 'recall'"]),
        (["neighbors", "votes"], ["no such study", "did you mean 'neighbours'"]),
        (["iou", "votes", "--similarity", "leap"], ["unknown similarity 'leap'"]),
        (["iou", "votes", "--similarity", ""], ["unknown similarity ''"]),
        (["iou", "votes", "--similarity", "leep,prototypes"], ["a study of one similarity", "'leep,prototypes'"]),
        (["neighbours", "votes", "--neighbours", "0,3"], ["--neighbours", "'0,3'"]),
        (["neighbours", "votes", "--neighbours", ","], ["--neighbours", "','"]),
        (["iterations", "votes", "--iterations", "ten"], ["--iterations", "'ten'"]),
        (["iterations", "votes", "--iterations", ","], ["--iterations", "','"]),
        (["recall", "votes", "--similarity", "shared_classes"], ["too few tasks", "10 of one similarity"]),
        (["neighbours", "votes", "--neighbours", "13"], ["the zoo is too small", "expected 13", "got 12"]),
        (["iou", "nowhere"], ["not a run folder", "nowhere"]),
    ],
)
def test_mistakes(vote_run: Finished, here: Here, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    shutil.copytree(vote_run[0], tmp_path / "votes")
    line = mistake(here, "study", *arguments)
    assert all(word in line for word in words), line
    assert not (tmp_path / "votes" / "studies").exists()


def test_a_run_that_is_not_finished(vote_run: Finished, here: Here, tmp_path: Path) -> None:
    run = shutil.copytree(vote_run[0], tmp_path / "votes")
    (run / "report.json").unlink()
    shutil.rmtree(run / "zoo")
    assert "no report yet" in mistake(here, "study", "iou", "votes")
    assert not (run / "zoo").exists()
