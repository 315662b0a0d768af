"""Jobs on a Ray cluster of this machine, which starts once for the file.

* every job's result comes back beside it, a GmnError in place of one; jobs are drawn as there is room and end with
  their caller
* a worker that is killed in the middle costs its job one try; one that dies every time is an error of that job alone
* the tasks of a zoo: the same masks, weights and accuracies as in one process, claimed by the caller, whose claims are
  released when it stops; a worker killed in the middle loses nothing
* a full disk or too little memory in a worker ends the caller as if it were its own
* what cannot be is refused in one line
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOTE_TINY
from evidence import evidence
from test_away import small_matrix

import gmn
from gmn import pipeline
from gmn.backbone import Backbone
from gmn.data import Data
from gmn.engine import HERE, Engine, engine_named
from gmn.exits import verdict
from gmn.ray_engine import RayEngine, ray_engine
from gmn.recipe import load_recipe
from gmn.settings_vote import FilterPruning
from gmn.tasks import sample_tasks
from gmn.zoo import Zoo
from gmn.zoo_build import Pruner, build_zoo, pruner

pytest.importorskip("ray", reason="ray is not installed: pip install ray")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    with ray_engine(retries=1) as found:
        yield found


def root(job: int) -> float:
    if job < 0:
        raise gmn.GmnError("no root", got=str(job))
    return job**0.5


@pytest.mark.parametrize("where", ["here", "ray"])
def test_results_come_back_beside_their_jobs(engine: RayEngine, where: str) -> None:
    chosen: Engine = engine if where == "ray" else HERE
    found = dict(chosen.map(root, [4, -1, 9]))
    assert (found[4], found[9]) == (2.0, 3.0)
    assert isinstance(found[-1], gmn.GmnError)
    assert str(found[-1]) == "no root: got -1"
    assert list(chosen.map(root, [])) == []


def asks(name: str) -> str:
    from gmn.permission import refuse_code

    refuse_code(name, "network.name", "a.yaml:3")
    return name


def test_workers_may_call_what_the_caller_allows(engine: RayEngine) -> None:
    names = ["mine:build", "os:abort"]
    with gmn.allow_code(only=["mine:build"]):
        some = dict(engine.map(asks, names))
    with gmn.allow_code():
        everything = dict(engine.map(asks, names))
    nothing = dict(engine.map(asks, names))
    assert some["mine:build"] == "mine:build"
    assert isinstance(some["os:abort"], gmn.GmnError)
    assert everything == {name: name for name in names}
    assert all(isinstance(found, gmn.GmnError) for found in nothing.values())


def first_soon(job: int) -> int:
    """The first job ends at once, the others in ten minutes: a cancel as a task ends may abort the caller in Ray."""
    time.sleep(600 if job else 0)
    return job


def test_jobs_are_drawn_as_there_is_room_and_end_with_their_caller(engine: RayEngine) -> None:
    drawn: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    working = engine.map(first_soon, jobs())
    assert next(working) == (0, 0)
    assert len(drawn) == 2 * engine.places()
    working.close()  # type: ignore[attr-defined]
    assert dict(engine.map(root, [4])) == {4: 2.0}  # there is room again


def dying(folder: Path, job: str) -> str:
    """Kill the worker, each time or only the first time."""
    tried = folder / job
    if job == "always" or (job == "once" and not tried.exists()):
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_a_killed_worker_costs_a_try(engine: RayEngine, tmp_path: Path) -> None:
    found = dict(engine.map(partial(dying, tmp_path), ["fine", "once", "always"]))
    assert (found["fine"], found["once"]) == ("fine", "once")
    assert (tmp_path / "once").exists()
    assert isinstance(found["always"], gmn.GmnError)
    assert "the worker died: got WorkerCrashedError, 2 times" in str(found["always"])


def full(job: str) -> str:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), job)


def test_what_stops_a_worker_stops_the_caller(engine: RayEngine) -> None:
    """With the exit code and the one line that it has here."""
    with pytest.raises(OSError, match="No space left") as caught:
        list(engine.map(full, ["there/a.json"]))
    assert verdict(caught.value) == (3, "No space left on device: there/a.json")


# -- a zoo -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Data:
    return gmn.load_data("digits", limit=200)


@pytest.fixture(scope="module")
def backbone(digits: Data) -> Backbone:
    torch.manual_seed(0)
    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 8, "shortcut": "B"})
    return Backbone.of(model.eval(), digits.example_inputs())


@pytest.fixture(scope="module")
def prune(digits: Data) -> Pruner:
    config = FilterPruning(iterations=4, interval=4, final_iterations=2, lr=0.02, batch_size=16, score_images=40)
    return pruner(config, digits.example_inputs(), 0.5)


def planned(folder: Path, backbone: Backbone, digits: Data) -> Zoo:
    zoo = Zoo.create(folder, backbone.about(ratio=0.5))
    zoo.plan(task for task in sample_tasks(digits.class_names, [3], 4, 1, seed=0) if task.split == "zoo")
    return zoo


def first_dies(folder: Path, prune: Pruner, model: Any, split: Any, seed: int) -> Any:
    """As `prune`, in a worker that is killed in the middle of the first task."""
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        return prune(model, split, seed)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def test_a_zoo_is_that_of_one_process(
    engine: RayEngine, backbone: Backbone, digits: Data, prune: Pruner, tmp_path: Path
) -> None:
    near, far = (planned(tmp_path / name, backbone, digits) for name in ("near", "far"))
    assert build_zoo(backbone, digits, near, prune) == 4
    assert build_zoo(backbone, digits, far, partial(first_dies, tmp_path, prune), engine=engine) == 4
    assert (tmp_path / "died").exists()
    assert far.counts() == {"planned": 0, "done": 4, "failed": 0}
    assert far.verify() == []
    names = [task.name for task in near.tasks()]
    assert {task.name: task.metrics for task in far.tasks()} == {task.name: task.metrics for task in near.tasks()}
    assert torch.equal(near.masks(names), far.masks(names))
    for name in names:
        ours, theirs = near.load(name)[2], far.load(name)[2]
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())
    assert build_zoo(backbone, digits, far, prune, engine=engine) == 0


class Stopped(Exception):
    """What a user does to a build."""


class Stopping:
    """An engine that is stopped when it has drawn two jobs."""

    remote = False

    def map(self, function: Any, jobs: Any) -> Iterator[Any]:
        next(jobs), next(jobs)
        raise Stopped
        yield


def test_a_stopped_build_gives_its_tasks_back(backbone: Backbone, digits: Data, prune: Pruner, tmp_path: Path) -> None:
    zoo = planned(tmp_path / "zoo", backbone, digits)
    with pytest.raises(Stopped):
        build_zoo(backbone, digits, zoo, prune, engine=Stopping())
    db = sqlite3.connect(zoo.folder / "index.sqlite")
    assert db.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    db.close()
    assert zoo.counts() == {"planned": 4, "done": 0, "failed": 0}


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["matrix", "vote"])
def test_whole_recipes_are_those_of_one_process(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Report, logs, weights and files, with the threads that a worker has."""
    monkeypatch.chdir(tmp_path)
    few = [*VOTE_TINY, "zoo.tasks=4", "vote.neighbours=2", "report.baselines=[nearest]", "zoo.targets=1"]
    recipe = load_recipe("graph-mask-voting", few) if kind == "vote" else small_matrix()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipeline.meta_train(recipe, tmp_path / "here")
    torch.set_num_threads(threads)
    pipeline.meta_train(recipe, tmp_path / "there", engine=engine)
    assert evidence(tmp_path / "there") == evidence(tmp_path / "here")


# -- mistakes ----------------------------------------------------------------------------------------------------------


def refused(name: str, **options: Any) -> str:
    with pytest.raises(gmn.GmnError) as caught, engine_named(name, **options):
        pass
    return str(caught.value)


def test_mistakes_are_one_line(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean 'ray'" in refused("rai")
    assert "--engine ray beside them" in refused("here", address="auto")
    assert "cpus or gpus above 0" in refused("ray", cpus=0.0)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:99999", "nowhere.invalid:1"):
        assert f"no Ray cluster to connect to: expected {address}; got " in refused("ray", address=address)
    assert "ConnectionRefusedError" in refused("ray", address="127.0.0.1:1")
    assert "no Ray cluster to connect to: got Maybe you called ray.init twice" in refused("ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install ray" in refused("ray")
