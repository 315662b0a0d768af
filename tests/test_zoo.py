"""The zoo: many tasks of one network.

* what is added comes back bit for bit, and only once; listing and masks need no file
* several processes share the tasks, each is done once; a killed process loses its own task and nothing else
* a damaged file is named: an error by name, left out when iterating, a problem for verify
* what a stranger wrote runs nothing, reads nothing outside the folder, and allocates nothing it only claims:
  tests/test_zoo_hostile.py
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import graph_of
from zoo_tasks import ABOUT, change, filled, flip, found, names, path_of, planned

from gmn import zoo_build, zoo_claims
from gmn.errors import CheckpointError, GmnError, PruningError
from gmn.zoo import Stored, Task, Zoo, fingerprint
from gmn.zoo_claims import is_alive, started
from gmn.zoo_format import pack, unpack


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return filled(tmp_path / "zoo")


# -- there and back ----------------------------------------------------------------------------------------------------


def test_a_task_comes_back_as_it_was_added(zoo: Zoo) -> None:
    keep, weights, extra = found(1)
    again = Zoo.open(zoo.folder, {"network": ABOUT["network"]})
    task, mask, loaded = again.load("task-1")
    assert torch.equal(mask.keep, keep)
    assert list(loaded) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
    assert torch.equal(again.load_extra("task-1")["prototypes"], extra["prototypes"])
    assert (task.classes, task.class_names, task.metrics) == ((1, 2), ("class 1", "class 2"), {"accuracy": 0.51})
    assert (task.status, task.flops, task.parameters, task.seed) == ("done", 1e6 - 1, 1000, 1)
    assert abs(task.created - time.time()) < 60
    assert again.verify() == []
    assert torch.equal(again.masks(["task-2", "task-0", "task-2"]), torch.stack([found(n)[0] for n in (2, 0, 2)]))
    assert names(zoo.folder) == ["index.sqlite", "tasks"]


def test_masks_of_any_length_survive_packing() -> None:
    for nodes in (*range(1, 40), 1001):
        masks = torch.rand(3, nodes) > 0.5
        packed = [pack(mask) for mask in masks]
        assert {len(mask) for mask in packed} == {(nodes + 7) // 8}
        assert torch.equal(unpack(packed, nodes), masks)
    assert unpack([], 9).shape == (0, 9)
    with pytest.raises(CheckpointError, match="expected 2 bytes; got 1"):
        unpack([b"\1"], 9)
    with pytest.raises(CheckpointError, match="behind the last node"):
        unpack([b"\1\2"], 9)


def test_listing(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.plan([planned(5, split="target"), planned(6)])
    zoo.fail(planned(6), ValueError("loss is \x1b[31mnan\n"))

    def listed(**wanted: Any) -> list[str]:
        return [task.name for task in zoo.tasks(**wanted)]

    assert listed() == ["task-0", "task-1", "task-2"]
    assert listed(status=None) == ["task-0", "task-1", "task-2", "task-5", "task-6"]
    assert listed(status=None, split="target") == ["task-5"]
    assert listed(classes=[2]) == listed(classes="class 2") == listed(classes=["class 2", 99]) == ["task-1", "task-2"]
    assert listed(order_by="accuracy", limit=2) == ["task-2", "task-1"]
    assert listed(order_by="-accuracy") == listed(order_by="-flops")[:3] == ["task-0", "task-1", "task-2"]
    assert zoo.tasks(status="failed")[0].error == "loss is [31mnan"
    assert zoo.counts() == {"planned": 1, "done": 3, "failed": 1}
    with pytest.raises(GmnError, match=r"nothing to order by.*accuracy"):
        zoo.tasks(order_by="accuracyy")
    with pytest.raises(GmnError, match="did you mean 'task-1'"):
        zoo.load("tusk-1")
    with pytest.raises(GmnError, match="the task is not done: got planned"):
        zoo.masks(["task-0", "task-5"])
    with pytest.raises(GmnError, match="got failed loss is"):
        zoo.load("task-6")
    assert capsys.readouterr().err == ""


def test_thousands_of_tasks_list_quickly(tmp_path: Path) -> None:
    nodes = 10_000
    zoo = Zoo.create(tmp_path, {"nodes": nodes, "fingerprint": "abc"})
    start = time.perf_counter()
    assert zoo.plan([planned(number) for number in range(4000)]) == 4000
    keep = torch.rand(nodes) > 0.5
    zoo.add(planned(0, metrics={"accuracy": 0.5}), keep, {})
    first = zoo.task("task-0")
    columns = "status, metrics, file, sha256, bytes, mask, mask_crc"  # as 2,000 calls of `add` would, without the files
    change(
        zoo,
        f"""UPDATE tasks SET ({columns}) = (SELECT {columns.replace("file", f"tasks.name || '{first.file[6:]}'")}
        FROM tasks AS first WHERE first.name = 'task-0') WHERE id <= 2000""",
    )
    assert zoo.counts()["done"] == 2000
    assert len(zoo.tasks(order_by="accuracy")) == 2000
    assert len(zoo.tasks(classes=[3])) > 500
    assert len(zoo.tasks(status="planned", limit=3)) == 3
    names = [task.name for task in zoo.tasks()]
    masks = zoo.masks(names[:1000])
    assert masks.shape == (1000, nodes)
    assert bool((masks == keep).all())
    assert time.perf_counter() - start < 5  # 0.5 s on an idle core


# -- what does not belong ----------------------------------------------------------------------------------------------


def test_a_zoo_is_about_one_network(tmp_path: Path, zoo: Zoo) -> None:
    assert Zoo.create(zoo.folder, ABOUT).about == zoo.about == ABOUT
    with pytest.raises(GmnError, match=r"something else: expected ratio 0.5; got 0.9"):
        Zoo.create(zoo.folder, {**ABOUT, "ratio": 0.5})
    with pytest.raises(GmnError, match="something else: expected more 1; got None"):
        Zoo.create(zoo.folder, {**ABOUT, "more": 1})
    with pytest.raises(GmnError, match="something else: expected fingerprint 'abd'; got 'abc'"):
        Zoo.open(zoo.folder, {"fingerprint": "abd"})
    with pytest.raises(CheckpointError, match=r"no zoo here: expected a folder with index.sqlite"):
        Zoo.open(tmp_path / "nowhere")
    for bad in ({"nodes": 0}, {"nodes": True}, {"fingerprint": ""}, {"ratio": float("nan")}, {"recipe": object()}):
        with pytest.raises(GmnError, match="zoo"):
            Zoo.create(tmp_path / "other", {**ABOUT, **bad})
    assert not (tmp_path / "other").exists()


def test_a_fingerprint_is_of_the_structure() -> None:
    one, other = graph_of("resnet20A").spec, graph_of("resnet20B").spec
    assert fingerprint(one) == fingerprint(dataclasses.replace(one)) != fingerprint(other)


def test_what_is_refused_leaves_nothing_behind(zoo: Zoo) -> None:
    keep, weights, _ = found(7)
    before = names(zoo.folder / "tasks")
    zoo.plan([planned(8)])
    refused: list[tuple[Task, Tensor, dict[str, Tensor], str]] = [
        (planned(7), keep[:-1], weights, "another network: expected 21 nodes; got 20; in task task-7"),
        (planned(7), keep.float(), weights, "malformed mask"),
        (planned(7), keep, {"w": torch.tensor([1.0, float("nan")])}, "not finite"),
        (planned(7), keep, {"w": torch.zeros(2, dtype=torch.complex64)}, "cannot keep this tensor"),
        (planned(7), keep, {"a\nb": torch.zeros(2)}, "cannot keep this tensor"),
        (planned(1), keep, weights, "already"),
        (planned(8, seed=9), keep, weights, "planned otherwise before: expected seed 8; got 9"),
    ]
    for task, mask, tensors, message in refused:
        with pytest.raises(GmnError, match=message):
            zoo.add(task, mask, tensors)
    with pytest.raises(PruningError):
        zoo.add(planned(7), torch.ones(3, 3, dtype=torch.bool), weights)
    assert names(zoo.folder / "tasks") == before
    assert zoo.verify() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", bad) for bad in ("", "..", ".a", "a/b", "a\\b", "a" * 101, "a\n")),
        *(("classes", bad) for bad in ((), (1, 1), (-1, 2), (True, 2), (1.0, 2))),
        *(("class_names", bad) for bad in ((), ("a",), ("a", ""), ("a", "b\x1b"), ("a", "b" * 1001))),
        *(("seed", -1), ("seed", 2**63), ("split", "train"), ("status", "over"), ("status", "done")),
        *(("metrics", {"accuracy": float("nan")}), ("metrics", {"a\n": 1.0}), ("metrics", {"a": torch.ones(1)})),
        *(("flops", float("inf")), ("flops", 10**400), ("created", -1.0), ("file", "a.safetensors"), ("sha256", "0")),
    ],
)
def test_malformed_tasks(field: str, value: Any) -> None:
    with pytest.raises(GmnError, match="malformed task"):
        Task(**{"name": "a", "classes": (1, 2), "class_names": ("a", "b"), field: value})


# -- processes ---------------------------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from zoo_tasks import ABOUT, found, planned
from gmn import zoo_rows
from gmn.zoo import Zoo

folder, kill = sys.argv[2], sys.argv[3] == "kill"
zoo = Zoo.create(folder, ABOUT)
zoo.plan([planned(number) for number in range(16)])
if kill:  # the file has its name, the row is not written
    zoo_rows.put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
while task := zoo.claim("worker"):
    print(task.name, flush=True)
    zoo.add(task, *found(task.seed))
"""


def worker(folder: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(folder), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_processes_share_the_tasks_and_a_killed_one_loses_only_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    killed = worker(folder, "kill")
    output, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert output == "task-0\n"
    zoo = Zoo.open(folder, ABOUT)
    assert zoo.counts() == {"planned": 16, "done": 0, "failed": 0}
    (orphan,) = zoo.verify()
    assert "no task of the zoo has this file" in orphan.what
    assert "task-0." in orphan.file
    Path(orphan.file).unlink()

    other, mine = worker(folder, "build"), []
    assert other.stdout is not None
    theirs = [other.stdout.readline()]  # it is at work
    while task := zoo.claim("this process"):
        mine.append(task.name)
        zoo.add(task, *found(task.seed))
    theirs += other.communicate()[0].splitlines()
    assert other.returncode == 0
    assert sorted(mine + [name.strip() for name in theirs]) == sorted(planned(number).name for number in range(16))
    assert zoo.counts() == {"planned": 0, "done": 16, "failed": 0}
    assert zoo.verify() == []
    for number in range(16):
        assert torch.equal(zoo.load(f"task-{number}")[1].keep, found(number)[0])


def test_claims(zoo: Zoo) -> None:
    assert zoo.plan([planned(number) for number in (2, 7, 8)]) == 2
    assert zoo.plan([planned(number) for number in (2, 7, 8)]) == 0
    with pytest.raises(GmnError, match="planned otherwise before: expected split 'zoo'; got 'target'; in task task-8"):
        zoo.plan([planned(9), planned(8, split="target")])
    first, second = zoo.claim("a"), zoo.claim("a")
    assert first is not None
    assert second is not None
    assert (first.name, second.name, zoo.claim("b")) == ("task-7", "task-8", None)  # and task-9 was not registered
    zoo.release(second)
    assert zoo.claim("b") == second
    change(zoo, "UPDATE claims SET since = since - 100 WHERE worker = 'a'")  # a long task of a process that lives
    assert zoo.release_stale(60) == 0
    change(zoo, "UPDATE claims SET machine = 'another', since = since - 100 WHERE worker = 'b'")
    assert zoo.claim("c") is None  # whether a process of another machine lives, nobody knows
    assert zoo.release_stale(60) == 1
    change(zoo, "UPDATE claims SET started = started + 1")  # the process id was given to another process
    assert zoo.claim("c") == first
    zoo.add(first, *found(7))
    zoo.fail(second, "it diverged")
    assert zoo.claim("c") is None
    zoo.fail(first, "too late")
    assert zoo.task("task-7").status == "done"
    zoo.redo(["task-7", "task-8"])
    assert len(names(zoo.folder / "tasks")) == 3
    assert (zoo.claim("d"), zoo.verify()) == (first, [])


def test_a_claim_reads_the_first_task_alone(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of planned tasks: nothing is sorted. Tasks of both splits come as they were planned."""
    zoo.plan(planned(number, split="target" if number % 3 else "zoo") for number in range(5, 3000))
    steps, unclaimed = list[int](), zoo_claims.unclaimed

    def watched(db: sqlite3.Connection) -> Iterator[str]:
        db.set_progress_handler(lambda: steps.append(1), 10)  # after every 10 instructions of SQLite's machine
        return unclaimed(db)

    monkeypatch.setattr(zoo_claims, "unclaimed", watched)
    claimed = [task.name for _ in range(6) if (task := zoo.claim("here"))]
    assert claimed == [f"task-{number}" for number in range(5, 11)]
    assert len(steps) < 6 * 100


@pytest.mark.parametrize(("seconds", "times"), [(60.0, 1), (-1.0, 21)])
def test_what_is_left_is_not_counted_after_every_task(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    zoo.plan(planned(number) for number in range(3, 23))
    counted, counts = list[int](), Zoo.counts

    def made(*arguments: Any) -> Stored:
        task = dataclasses.replace(arguments[-1], metrics={"accuracy": 0.5})
        return Stored(task, zoo.identity, *found(task.seed))

    monkeypatch.setattr(Zoo, "counts", lambda self: counted.append(1) or counts(self))
    monkeypatch.setattr(zoo_build, "prune_for", made)
    monkeypatch.setattr(zoo_build, "COUNT", seconds)
    assert zoo_build.build_zoo(*[None] * 2, zoo, made) == 20  # type: ignore[arg-type]
    assert len(counted) == times


def test_a_killed_process_that_nobody_waited_for_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    since = started(process.pid)
    assert is_alive(process.pid, since)
    process.kill()
    end = time.monotonic() + 10
    while is_alive(process.pid, since) and time.monotonic() < end:
        time.sleep(0.01)
    if Path("/proc").is_dir():
        assert not is_alive(process.pid, since)
    process.communicate()
    assert not is_alive(process.pid, since)
    assert not any(is_alive(bad) for bad in (0, -1, 2**40, "1", None))


def test_a_file_that_is_being_written_is_no_orphan(zoo: Zoo) -> None:
    mine, dead = (zoo.folder / "tasks" / f".task-9.00000000.safetensors.{pid}.tmp" for pid in (os.getpid(), 2**22 + 1))
    mine.touch()
    dead.touch()
    (problem,) = zoo.verify()
    assert (problem.file, problem.what) == (str(dead), "left by a process that was killed; delete it")


# -- damage ------------------------------------------------------------------------------------------------------------


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "flipped": (lambda path, _: flip(path), "another checksum"),
    "torn": (lambda path, _: path.write_bytes(path.read_bytes()[:-7]), "another size"),
    "empty": (lambda path, _: path.write_bytes(b""), "another size"),
    "missing": (lambda path, _: path.unlink(), "missing"),
    "replaced": (lambda path, other: path.write_bytes(other.read_bytes()), "another checksum"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_are_named_and_never_used(zoo: Zoo, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = path_of(zoo, "task-1"), path_of(zoo, "task-2")
    damage, message = DAMAGES[kind]
    damage(path, other)
    with pytest.raises(CheckpointError, match=message) as error:
        zoo.load("task-1")
    assert path.name in str(error.value)
    with pytest.raises(CheckpointError, match=message):
        zoo.load_extra("task-1")
    assert [task.name for task, _, _ in zoo.load_all()] == ["task-0", "task-2"]
    assert f"skipped task-1: {error.value}" in capsys.readouterr().err
    (problem,) = zoo.verify()
    assert (problem.task, problem.file) == ("task-1", str(path))
    assert message in problem.what
    zoo.redo(["task-1"])
    again = zoo.claim("a")
    assert again is not None
    zoo.add(again, *found(1))
    assert zoo.verify() == []


def test_a_bad_disk(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("gmn.zoo_files.digest_of", fail)
    assert list(zoo.load_all()) == []
    assert "Input/output error" in zoo.verify()[2].what


def test_a_mask_in_the_index_that_is_not_the_files(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    change(zoo, "UPDATE tasks SET mask = x'010203' WHERE name = 'task-1'")
    with pytest.raises(CheckpointError, match=r"a damaged mask in the index: in .*, task 'task-1'"):
        zoo.masks(["task-0", "task-1"])
    change(zoo, "UPDATE tasks SET mask = (SELECT mask FROM tasks WHERE name = 'task-2') WHERE name = 'task-1'")
    change(zoo, "UPDATE tasks SET mask_crc = (SELECT mask_crc FROM tasks WHERE name = 'task-2') WHERE name = 'task-1'")
    (problem,) = zoo.verify()
    assert "not the one in the file" in problem.what
    change(zoo, "UPDATE tasks SET mask = x'01' WHERE name = 'task-1'")
    assert [task.name for task in zoo.tasks()] == ["task-0", "task-2"]
    assert "a mask of another length: expected 3 bytes; got 1" in capsys.readouterr().err
    assert "a mask of another length" in zoo.verify()[0].what


def test_weights_that_are_not_finite(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr("gmn.zoo_format.check_finite", lambda *_: None)
        zoo.add(planned(5), found(5)[0], {"conv.weight": torch.tensor([float("inf")])})
    (problem,) = zoo.verify()
    assert (problem.task, "conv.weight" in problem.what, "not finite" in problem.what) == ("task-5", True, True)
