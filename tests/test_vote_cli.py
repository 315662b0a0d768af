"""`gmn prune` with a zoo, and the mistakes that users make with vote recipes, on the shortened `graph-mask-voting`.

* it votes for a new task from a run or from a zoo alone; what it leaves loads, measures, and can vote itself
* a damaged task is named, and the results are those of a zoo without it
* a pruning goes on with the zoo that it began with, and never harms one
* mistakes are one line and exit code 2
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_cli
import test_vote_pipeline
import torch
from conftest import TINY, VOTE_TINY
from test_cli import Here, mistake
from test_vote_pipeline import Finished, accuracy, options
from zoo_tasks import flip, path_of

import gmn
from gmn import pipeline, trials, vote_compare
from gmn.checkpoint import load_json
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run, load_report
from gmn.zoo import Zoo

here = test_cli.here
run = test_vote_pipeline.run
ALONE = [*VOTE_TINY, "report.baselines=[]", "report.seeds=1"]


def target_of(names: list[str]) -> str:
    return f"target={json.dumps(names)}"


def prune(here: Here, meta: Path, run: str, *more: str) -> dict[str, Any]:
    """`gmn prune`, and its report."""
    code, _, err = here(*("prune", "graph-mask-voting", "--meta", str(meta), "--run", run), *options([*ALONE, *more]))
    assert code == 0, err
    return load_report(Path(run))


@pytest.mark.parametrize("similarity", ["prototypes", "shared_classes"])
def test_a_damaged_task_never_votes(run: Path, here: Here, capsys: pytest.CaptureFixture[str], similarity: str) -> None:
    names = next(iter(load_report(run)["targets"].values()))
    more = target_of(names), f"similarity.name={similarity}"
    sound = prune(here, run, "sound", *more)
    job = pipeline.reopened(run)
    nearest = job.ranking(job.targets[0], similarity).nearest(3)[0]
    without = Zoo.open(shutil.copytree(run / "zoo", run.parent / "without"))
    without.redo([nearest])  # planned again: nothing is known about it
    flip(path_of(job.zoo, nearest))
    capsys.readouterr()
    arguments = "prune", "graph-mask-voting", "--meta", "votes", "--run", "damaged", *options([*ALONE, *more])
    code, _, err = here(*arguments)
    assert code == 0
    assert f"skipped {nearest}: the file has another checksum" in err
    (damaged,), expected = load_report(Path("damaged"))["results"], prune(here, without.folder, "without-it", *more)
    assert [damaged] == expected["results"]
    one, two, three = (
        gmn.load_model(Path(name) / "models" / "vote-seed0").state_dict() for name in ("damaged", "without-it", "sound")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], three[key]) for key in one)
    assert sound["results"][0]["neighbours"] == 3


def test_prune_from_a_run_and_from_a_moved_zoo(run: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = target_of(["1", "7", "4", "0"]), "report.baselines=[random, short, reptile]"
    report = prune(here, run, "from-run", *wanted)
    moved = shutil.move(run / "zoo", run.parent / "elsewhere")
    shutil.rmtree(run)
    again = prune(here, Path(moved), "from-zoo", *wanted)
    assert again["results"] == report["results"]
    assert report["targets"] == {"target": ["1", "7", "4", "0"]}
    data = gmn.load_data("digits", limit=300, validation=0.25)
    assert [result["row"] for result in report["results"]] == ["vote", "random", "short", "reptile"]
    for result in report["results"]:
        folder = Path("from-zoo") / "models" / f"{result['row']}-seed0"
        model = gmn.load_model(folder)
        assert accuracy(model, data, ["1", "7", "4", "0"]) == pytest.approx(result["test_accuracy"])
        assert gmn.cost(model, data.example_inputs()).flops == result["flops"]
        assert json.loads((folder / "model.json").read_text())["class_names"] == ["1", "7", "4", "0"]


def test_a_pruned_task_can_vote_next_time(run: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    vote_for = trials.vote_for

    def watched(backbone: Any, zoo: Zoo, names: list[str], *rest: Any, **more: Any) -> Any:
        seen.append(names)
        return vote_for(backbone, zoo, names, *rest, **more)

    monkeypatch.setattr(trials, "vote_for", watched)
    more = "similarity.name=shared_classes", "vote.neighbours=1"
    first, second = ["0", "4", "7", "1"], ["2", "3", "5", "8"]
    prune(here, run, "first", *more, target_of(first))
    prune(here, run, "second", *more, target_of(second))
    for name in ("first", "second"):
        code, out, err = here("zoo", "add", "votes/zoo", f"{name}/task-seed0.safetensors")
        assert (code, err) == (0, ""), err
        assert out.startswith("added ")
    added = [task for task in Zoo.open(run / "zoo").tasks() if len(task.classes) == 4]
    assert sorted(list(task.class_names) for task in added) == [first, second]
    assert Zoo.open(run / "zoo").verify() == []
    seen.clear()
    prune(here, run, "next", *more, target_of(first))
    assert seen == [[task.name for task in added if list(task.class_names) == first]]


def test_a_pruning_goes_on_with_the_same_zoo_only(run: Path, here: Here) -> None:
    names = target_of(["1", "7", "4"])
    report = prune(here, run, "pruned", names)
    other = shutil.copytree(run / "zoo", Path("other"))
    model, about = gmn.load_model(other / "network"), load_json(other / "network" / "model.json")
    next(model.parameters()).data += 1e-3
    gmn.save_model(other / "network", model, about["network"], input_shape=about["input_shape"])
    resumed = ("--run", "pruned", "--resume", *options([*ALONE, names]))
    code, _, _ = here("prune", "graph-mask-voting", "--meta", "votes", *resumed)
    assert code == 0
    assert "another zoo" in mistake_of(here, "prune", "graph-mask-voting", "--meta", "other", *resumed)
    assert load_report(Path("pruned")) == report


# -- mistakes ----------------------------------------------------------------------------------------------------------


def mistake_of(here: Here, *arguments: str) -> str:
    """The one line that a wrong call prints, after what it said of its progress."""
    code, out, err = here(*arguments)
    assert (code, out) == (2, "")
    *progress, last = err.splitlines()
    assert last.startswith("gmn: ")
    assert not [line for line in progress if line.startswith(("gmn: ", "Traceback"))]
    return last


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("similarity.name=leap", ["unknown similarity 'leap'", "did you mean 'leep'"]),
        ("vote.neighbours=13", ["vote.neighbours (13) are more than zoo.tasks (12)"]),
        ("vote.fit={epochs: 2, lr: 0.1}", ["vote.fit.iterations"]),
        ("zoo.classes=[11]", ["too few classes"]),
        ("zoo.tasks=119", ["too few classes for so many tasks", "expected 121"]),
        ("report.baselines=[fast]", ["report.baselines", "'fast'"]),
        ("method=voting", ["unknown method", "metanetwork, vote", "'voting'"]),
        ("method=metanetwork", ["unknown key"]),
        ("rewrite=nowhere", ["nothing learnt here", "nowhere"]),
        ("ratio=0.01", ["nothing would be pruned", "a ratio of 0.031 or more", "one of 32 channels", "got 0.01"]),
        ("pretrain=null", ["nothing trains the network"]),
        ('target=["1", "7"]', ["target names a task to prune for", "gmn prune"]),
    ],
)
def test_mistakes_in_a_recipe(here: Here, tmp_path: Path, override: str, words: list[str]) -> None:
    line = mistake(here, "meta-train", "graph-mask-voting", *options([*VOTE_TINY, override]))
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (['target=["1", "7", "ten"]'], ["no such class", "'ten'", "digits"]),
        (['target=["1", "7", "1"]'], ["class"]),
        (["target=[1, 7]"], ["target", "string"]),
        (['target=["1"]'], ["target", "expected at least 2 items; got ['1']"]),
        (["target=[]"], ["target", "expected at least 2 items; got []"]),
        (["similarity.name=leap"], ["unknown similarity 'leap'"]),
        (["vote.neighbours=13", "zoo.tasks=20"], ["the zoo is too small", "expected 13", "got 12"]),
        (["ratio=0.01"], ["nothing would be pruned", "a ratio of 0.031 or more"]),
        (["network.options={width: 16, shortcut: B}"], ["another network", "16"]),
        (["network.name=cifar.resnet14"], ["another network", "cifar.resnet14", "cifar.resnet8"]),
    ],
)
def test_mistakes_in_what_to_prune(vote_run: Finished, here: Here, overrides: list[str], words: list[str]) -> None:
    wanted = options([*ALONE, *overrides])
    line = mistake_of(here, "prune", "graph-mask-voting", "--meta", str(vote_run[0]), *wanted)
    assert all(word in line for word in words), line


def test_mistakes_in_what_was_learnt(run: Path, here: Here) -> None:
    meta = Path("meta")
    Run(meta, dump_recipe(load_recipe("quickstart", TINY))).start()
    (meta / "metanetwork.safetensors").touch()
    wrong = mistake(here, "prune", "graph-mask-voting", "--meta", "meta", *options(ALONE))
    assert "different methods" in wrong
    assert "expected a recipe with `method: metanetwork`; got vote" in wrong
    wrong = mistake(here, "prune", "quickstart", "--meta", "votes", *options(TINY))
    assert "expected a recipe with `method: vote`; got metanetwork" in wrong
    (run / "zoo" / "network").rename("network")
    assert "no network yet" in mistake(here, "join", "votes")
    Path("network").rename(run / "zoo" / "network")
    for recipe in ("quickstart", "graph-mask-voting"):
        assert "nothing learnt here" in mistake(here, "prune", recipe, "--meta", "nowhere")
    assert "no report yet" in mistake(here, "study", "iou", "meta")
    (meta / "report.json").write_text("{}")
    assert "no zoo" in mistake(here, "study", "iou", "meta")
    assert "did you mean 'recall'" in mistake(here, "study", "recal", "votes")
    assert "no zoo" in mistake(here, "join", "meta")
    assert "not a run folder" in mistake(here, "join", "votes/zoo")
    shutil.rmtree(run / "zoo" / "network")
    wrong = mistake_of(here, "prune", "graph-mask-voting", "--meta", "votes", *options(ALONE))
    assert "the zoo lacks its network" in wrong
    (run / "zoo" / "index.sqlite").write_text("no zoo")
    assert "votes" in mistake_of(here, "prune", "graph-mask-voting", "--meta", "votes", *options(ALONE))
    assert not Path("runs").exists()


def test_a_baseline_that_was_not_learnt_is_missed_at_once(
    run: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the other rows' hours."""
    shutil.rmtree(run / "zoo" / "reptile")
    monkeypatch.setattr(vote_compare, "begin", lambda *_: pytest.fail("a trial is begun"))
    more = options([*ALONE, "report.baselines=[random, reptile]"])
    line = mistake_of(here, "prune", "graph-mask-voting", "--meta", "votes", *more)
    assert "the zoo has no reptile network" in line
    assert "leave reptile out of report.baselines" in line
    assert not Path("runs").exists()


def test_a_zoo_is_not_deleted_by_the_pruning_that_uses_it(run: Path, here: Here) -> None:
    for meta in ("votes", "votes/zoo"):
        arguments = "prune", "graph-mask-voting", "--meta", meta, "--run", "votes", *options(VOTE_TINY)
        assert "learnt in" in mistake(here, *arguments, "--overwrite")
        assert "learnt in" in mistake(here, *arguments, "--resume")
    assert Zoo.open(run / "zoo").verify() == []


def test_a_pruning_has_no_zoo_of_its_own(run: Path, here: Here) -> None:
    prune(here, run, "pruned", target_of(["1", "7", "4"]))
    before = sorted(Path("pruned").rglob("*"))
    for call in (("join", "pruned"), ("study", "iou", "pruned")):
        line = mistake(here, *call)
        assert "the run has no zoo" in line
        assert str(run / "zoo") in line
    assert sorted(Path("pruned").rglob("*")) == before
