"""Contract of work that is done elsewhere, in copies of a run folder.

* Rows with several seeds and speed-ups, entries and cells of a matrix, rows of a vote are those of one process:
  report, log, weights, files; workers read nothing but what is sent to them, not even the weights that a recipe names.
* Workers of this machine make the runs of a matrix in the folder itself: what they finished of one is there after a
  kill.
* What has failed is said, the rest is kept, and a resumed run makes what is missing and nothing else.
* Logs only grow; files that a worker deletes go; nothing outside of a job's paths comes back.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, VOTE_TINY
from evidence import evidence, files_of

import gmn
from gmn import away, matrix_runs, pipeline, study_cli
from gmn.away import Parcel, apply, in_copy, pack, share
from gmn.engine import attempt
from gmn.exits import Stopped
from gmn.jsonl import append_line, read_lines
from gmn.recipe import AnyRecipe, load_recipe
from gmn.settings_vote import VoteRecipe

ROWS = [
    *(*TINY, "data.limit=120", "data_models.val=0", "report.seeds=2", "report.speed_ups=[1.5]", "prune.steps=40"),
    *("report.baselines=[sparse]", "data_models.initial_speed_up=1", "data_models.initial_fit=null"),
]


class Elsewhere:
    """An engine whose worker sits in an empty folder, and knows what comes through a pipe only.

    Args:
        fails: Numbers of the jobs whose worker dies.
        sees_disk: Whether workers may be given the run folder itself.
    """

    remote = True

    def __init__(self, folder: Path, fails: Iterable[int] = (), *, sees_disk: bool = False) -> None:
        self.folder, self.fails, self.jobs, self.sees_disk = folder, set(fails), list[Any](), sees_disk
        folder.mkdir(exist_ok=True)

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        sent = pickle.dumps(function)
        for number, job in enumerate(jobs):
            self.jobs.append(job.job if isinstance(job, Parcel) else (job.trial.row, job.trial.seed))
            if number in self.fails:
                yield job, gmn.GmnError("the worker died")
                continue
            here = Path.cwd()
            os.chdir(self.folder)
            try:
                found = attempt(pickle.loads(sent), pickle.loads(pickle.dumps(job)))
            finally:
                os.chdir(here)
            yield job, pickle.loads(pickle.dumps(found))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_rows_are_those_of_one_process(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ROWS)
    pipeline.meta_train(recipe, tmp_path / "here")
    failing = Elsewhere(tmp_path / "worker", fails=[1, 2])
    with pytest.raises(gmn.GmnError, match="the worker died"):
        pipeline.meta_train(recipe, tmp_path / "there", engine=failing)
    assert [*failing.jobs] == [(row, seed) for row in ("metanetwork", "sparse") for seed in (0, 1)]
    again = Elsewhere(tmp_path / "worker")
    pipeline.meta_train(recipe, tmp_path / "there", engine=again, resume=True)
    assert again.jobs == [("metanetwork", 1), ("sparse", 0)]
    assert evidence(tmp_path / "there") == evidence(tmp_path / "here")
    assert list((tmp_path / "worker").iterdir()) == []


def trained_weights(path: Path) -> None:
    torch.manual_seed(3)
    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 4, "shortcut": "B"})
    torch.save(model.state_dict(), path)


def test_weights_and_metanetworks_that_a_recipe_names_travel(tmp_path: Path) -> None:
    trained_weights(Path("w.pt"))
    own = [*ROWS, "network.weights=w.pt", "data_models.fit=null", "report.seeds=1", "report.speed_ups=[]"]
    pipeline.meta_train(load_recipe("quickstart", [*own, "report.baselines=[]"]), tmp_path / "first")
    recipe = load_recipe("quickstart", [*own, "report.metanetworks={older: first}", "report.baselines=[]"])
    for name, options in (("here", {}), ("there", {"engine": Elsewhere(tmp_path / "worker")})):
        pipeline.prune_recipe(recipe, tmp_path / name, tmp_path / "first", **options)
    assert evidence(tmp_path / "there") == evidence(tmp_path / "here")


MATRIX = """
method: matrix
common: {base: quickstart}
entries:
  narrow: # and in the same metanetwork another kind, whose images are of another size
    data_models:
      also:
        wide:
          data: {size: 10}
          network: {options: {width: 8, shortcut: B}, weights: w8.pt}
          data_models: {fit: null, val: 0}
  wide: {network: {options: {width: 8, shortcut: B}, weights: w8.pt}, data_models: {fit: null}}
"""


def small_matrix() -> AnyRecipe:
    """Of two entries; one takes weights from a file, in the folder where one is."""
    torch.manual_seed(4)
    wide = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 8, "shortcut": "B"})
    torch.save(wide.state_dict(), "w8.pt")
    Path("m.yaml").write_text(MATRIX)
    overrides = [f"common.{field}" for field in ROWS if not field.startswith(("network", "report.speed_ups"))]
    return load_recipe("m.yaml", [*overrides, "common.report.seeds=1", "common.report.baselines=[]"])


@pytest.fixture(scope="module")
def matrix_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipeline.meta_train(small_matrix(), folder / "here")
    return folder / "here"


def test_a_matrix_is_that_of_one_process(matrix_here: Path, tmp_path: Path) -> None:
    recipe, failing = small_matrix(), Elsewhere(tmp_path / "worker", fails=[1])
    with pytest.raises(gmn.GmnError, match="the worker died"):
        pipeline.meta_train(recipe, tmp_path / "there", engine=failing)
    again = Elsewhere(tmp_path / "worker")
    pipeline.meta_train(recipe, tmp_path / "there", engine=again, resume=True)
    assert again.jobs == [("wide",), ("narrow", "wide"), ("wide", "narrow")]
    assert len(evidence(matrix_here)["logs"]) == 4  # of two entries and two cells
    assert evidence(tmp_path / "there") == evidence(matrix_here)


def test_what_a_worker_of_this_machine_finished_stays(
    matrix_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the meta-training and the rows of an entry."""
    recipe, engine = small_matrix(), Elsewhere(tmp_path / "worker", sees_disk=True)

    def killed(*_: object, **__: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(matrix_runs, "compare", killed)
        with pytest.raises(Stopped):
            pipeline.meta_train(recipe, tmp_path / "there", engine=engine)
    learnt = tmp_path / "there" / "entries" / "narrow" / "metanetwork.safetensors"
    before = learnt.stat().st_mtime_ns
    pipeline.meta_train(recipe, tmp_path / "there", engine=engine, resume=True)
    assert learnt.stat().st_mtime_ns == before
    assert evidence(tmp_path / "there") == evidence(matrix_here)
    assert not (tmp_path / "there" / "outside").exists()
    assert list((tmp_path / "worker").iterdir()) == []


def test_the_rows_of_a_vote_are_those_of_one_process(
    vote_run: tuple[Path, dict[str, Any]], tiny_vote_recipe: VoteRecipe, tmp_path: Path
) -> None:
    run = shutil.copytree(vote_run[0], tmp_path / "votes")
    (run / "results.jsonl").unlink()
    (run / "report.json").unlink()
    wanted = [(result["row"], result["seed"]) for result in vote_run[1]["results"]]
    with pytest.raises(gmn.GmnError, match="the worker died"):
        pipeline.meta_train(tiny_vote_recipe, run, resume=True, engine=Elsewhere(tmp_path / "worker", fails=[1, 5]))
    assert not (run / "report.json").exists()
    again = Elsewhere(tmp_path / "worker")
    assert pipeline.meta_train(tiny_vote_recipe, run, resume=True, engine=again) == vote_run[1]
    assert again.jobs == [wanted[1], wanted[5]]
    assert evidence(run) == evidence(vote_run[0])


def test_what_a_study_lacks_is_made_by_workers(vote_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, workers = shutil.copytree(vote_run[0], tmp_path / "votes"), Elsewhere(tmp_path / "worker")
    usual: dict[str, Any] = {"similarity": "leep", "targets": 1, "iterations": None}
    study_cli.study("neighbours", run, **usual, neighbours="2,3", engine=workers)
    assert workers.jobs == [("vote", 0), ("vote", 1)]  # those with 3 are in the comparison


def test_a_network_that_a_zoo_elsewhere_votes_on(vote_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    recipe = load_recipe("graph-mask-voting", [*VOTE_TINY, "report.baselines=[short]", "target=['1', '4', '7']"])
    for name, options in (("here", {}), ("there", {"engine": Elsewhere(tmp_path / "worker")})):
        pipeline.prune_recipe(recipe, tmp_path / name, vote_run[0], **options)
    assert evidence(tmp_path / "there") == evidence(tmp_path / "here")
    assert "task-seed0.safetensors" in files_of(tmp_path / "there")


# -- the copies --------------------------------------------------------------------------------------------------------


def work(folder: Path, job: str) -> None:
    """Something of everything."""
    (folder / "own" / "new.txt").write_text(job + (folder / "sent" / "a.txt").read_text())
    (folder / "own" / "old.txt").unlink()
    (folder / "elsewhere.txt").write_text("not for the caller")
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"job": job}) + "\n")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    for name, text in (("own/old.txt", "old"), ("own/same.txt", "same"), ("log.jsonl", '{"job": "first"}\n')):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    return home


def test_what_travels_back(home: Path) -> None:
    paths = ["own", "log.jsonl", "absent"]
    assert set(pack(home, paths)) == {"own/old.txt", "own/same.txt", "log.jsonl"}
    changes = in_copy(work, {"sent/a.txt": b"!"}, Parcel("b", paths, pack(home, paths)))
    assert changes == {"own/new.txt": b"b!", "own/old.txt": None, "log.jsonl": b'{"job": "b"}\n'}
    (home / "log.jsonl").write_text('{"job": "first"}\n{"job": "between"}\n')
    apply(home, changes)
    assert (home / "log.jsonl").read_text().split() == [
        '{"job":',
        '"first"}',
        '{"job":',
        '"between"}',
        '{"job":',
        '"b"}',
    ]
    assert sorted(path.name for path in home.rglob("*.txt")) == ["new.txt", "same.txt"]


def logs(folder: Path, job: str) -> None:
    append_line(folder / "log.jsonl", {"job": job})


@pytest.mark.parametrize("closed", [False, True])
def test_a_torn_line_of_a_log_stays_behind(home: Path, closed: bool) -> None:
    """A kill or a full disk left it; the worker closes it, and somebody may have done so here meanwhile."""
    with (home / "log.jsonl").open("a") as log:
        log.write('{"job": "ha')
    changes = in_copy(logs, {}, Parcel("b", ["log.jsonl"], pack(home, ["log.jsonl"])))
    assert changes == {"log.jsonl": b'\n{"job": "b"}\n'}
    if closed:
        logs(home, "between")
    apply(home, changes)
    assert [entry["job"] for entry in read_lines(home / "log.jsonl")] == ["first", *["between"] * closed, "b"]
    assert (home / "log.jsonl").read_text().count("\n") == 3 + closed


def test_what_says_that_others_are_whole_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that is killed while a run comes back can go on with it."""
    written: list[str] = []
    monkeypatch.setattr(away, "save_bytes", lambda path, _: written.append(str(path.relative_to(tmp_path))))
    names = ["cells/a/report.json", "cells/a/models/b/model.json", "cells/a/models/b/weights.safetensors"]
    apply(tmp_path, dict.fromkeys([*names, "cells/a/recipe.yaml", "cells/a/environment.json"], b""))
    assert written[0] == "cells/a/recipe.yaml"
    assert written[-2:] == names[1::-1]


def test_jobs_that_fail_are_said_and_the_others_kept(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Elsewhere(tmp_path / "worker", fails=[0])
    with pytest.raises(gmn.GmnError, match="the worker died"):
        share(engine, work, home, {"a": ["own"], "b": ["own"]}, "jobs", outside={"sent/a.txt": b"!"})
    assert (home / "own" / "new.txt").read_text() == "b!"
    assert "a: the worker died" in capsys.readouterr().err
