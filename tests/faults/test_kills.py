"""Runs that are killed, and go on: `victims.py` forks them, `evidence.py` says what must be the same.

* Killed with SIGKILL at a random moment and resumed, a run ends with the report, the log, the weights and the files of
  a run that nobody killed: nothing twice in the log, nothing half-written, nothing left over.
* So does one whose disk is full (exit code 3) and one that is stopped with Ctrl-C (130), and one with damaged files.
* So does a zoo that two processes build when one of them is killed, and when both are, and one goes on.
* Two runs with the same seed are the same, however often they keep what is under way.
* The moments are random with a fixed seed; one here, 25 with `make soak` (`pytest -m soak`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import crew
import pytest
from conftest import TINY, VOTE_TINY
from evidence import evidence

from gmn.checkpoint import load_json
from gmn.run import load_report

META = ["quickstart", *TINY, "data.limit=120", "prune.steps=40", "report.baselines=[direct]", "data_models.val=0"]
META += ["checkpoint_every=1e-9"]
VOTE = ["graph-mask-voting", *VOTE_TINY, "zoo.tasks=4", "vote.neighbours=2", "report.baselines=[nearest]"]
VOTE += ["zoo.targets=1", "report.seeds=1", "checkpoint_every=1e-9", "pretrain.fit.epochs=2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

Order = Callable[..., list[list[int]]]
Whole = tuple[Path, dict[str, Any], int]


@contextmanager
def serving(**environment: str) -> Iterator[Order]:
    """Run `[verb, recipe, folder, tick, fault]` jobs at the same time; by default nothing happens to them.

    All are forks of one Python, with one hash seed and one state of the random numbers that nobody seeds.
    """
    server = Path(__file__).with_name("victims.py")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, str(server)], env=ONE_THREAD | environment, **pipes)
    assert process.stdin
    assert process.stdout

    def run(*jobs: list[Any]) -> list[list[int]]:
        whole = [[*job, None, "kill"][:5] if len(job) == 3 else [*job, "kill"][:5] for job in jobs]
        process.stdin.write(json.dumps(whole) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(process.stdout.readline())  # type: ignore[union-attr]

    yield run
    process.stdin.close()
    process.stdout.close()
    process.wait(30)


@pytest.fixture(scope="session")
def order() -> Iterator[Order]:
    with serving() as run:
        yield run


def whole(order: Order, folder: Path, recipe: list[str], verb: str = "meta-train") -> Whole:
    """A run that nobody kills: where it is, what it leaves, and how many ticks it has."""
    [[status, ticks]] = order([verb, recipe, str(folder)])
    assert status == 0
    print(f"{ticks} ticks")
    return folder, evidence(folder), ticks


@pytest.fixture(scope="session")
def meta(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(order, tmp_path_factory.mktemp("whole") / "meta", META)


@pytest.fixture(scope="session")
def vote(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(order, tmp_path_factory.mktemp("whole") / "vote", VOTE)


def gmn_command(folder: Path, *fields: str) -> list[str]:
    """The same run with these fields too, for a Python of its own."""
    sets = [part for field in (*META[1:], *fields) for part in ("--set", field)]
    return ["-m", "gmn", "meta-train", META[0], *sets, "--run", str(folder)]


def moments(ticks: int, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, ticks + 1), count))


def killed_and_resumed(
    order: Order, folder: Path, recipe: list[str], tick: int, verb: str = "meta-train"
) -> dict[str, Any]:
    assert order([verb, recipe, str(folder), tick]) == [[-signal.SIGKILL, 0]]
    [[status, _]] = order([verb, recipe, str(folder)])
    assert status == 0
    return evidence(folder)


def test_a_killed_run_ends_like_one_that_was_not(order: Order, meta: Whole, tmp_path: Path) -> None:
    [tick] = moments(meta[2], 1, seed=1)
    assert killed_and_resumed(order, tmp_path / "run", META, tick) == meta[1]


def test_a_full_disk_and_a_stopped_run(order: Order, meta: Whole, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert order(["meta-train", META, folder, meta[2] // 3, "full"])[0][0] == 3
    assert order(["meta-train", META, folder, meta[2] // 4, "interrupt"])[0][0] == 130
    assert order(["meta-train", META, folder])[0][0] == 0
    assert evidence(tmp_path / "run") == meta[1]


def test_damaged_files_are_made_again(order: Order, meta: Whole, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(meta[0], tmp_path / "run"))
    (folder / "report.json").unlink()
    for name in ("checkpoints/epoch-002.safetensors", "metanetwork.safetensors"):
        os.truncate(folder / name, 1000)
    content = bytearray((folder / "models/direct-seed0/weights.safetensors").read_bytes())
    content[-5] ^= 64  # one bit of one weight
    (folder / "models/direct-seed0/weights.safetensors").write_bytes(content)
    (folder / "data-models/0/model.json").write_text('{"format": 1, "netw')
    assert order(["meta-train", META, str(folder)])[0][0] == 0
    assert evidence(folder) == meta[1]


def test_a_damaged_checkpoint_costs_its_epoch_alone(order: Order, meta: Whole, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(meta[0], tmp_path / "run"))
    for name in ("report.json", "metanetwork.safetensors"):
        (folder / name).unlink()
    first, second = (folder / "checkpoints" / f"epoch-00{epoch}.safetensors" for epoch in (1, 2))
    os.truncate(first, 1000)
    before = second.stat().st_ino
    assert order(["meta-train", META, str(folder)])[0][0] == 0
    assert evidence(folder) == meta[1]
    assert second.stat().st_ino == before


def test_two_runs_with_the_same_seed(order: Order, meta: Whole, tmp_path: Path) -> None:
    assert whole(order, tmp_path / "again", [*META, "checkpoint_every=60.0", "seed=0"])[1] == meta[1]


@pytest.mark.soak
@pytest.mark.parametrize("number", range(25))
def test_25_killed_runs(order: Order, meta: Whole, tmp_path: Path, number: int) -> None:
    tick = moments(meta[2], 25, seed=0)[number]
    assert killed_and_resumed(order, tmp_path / "run", META, tick) == meta[1]


@pytest.mark.soak
@pytest.mark.parametrize("number", range(10))
def test_full_disks(order: Order, meta: Whole, tmp_path: Path, number: int) -> None:
    folder, tick = str(tmp_path / "run"), moments(meta[2], 10, seed=4)[number]
    assert order(["meta-train", META, folder, tick, "full"])[0][0] == 3
    assert order(["meta-train", META, folder])[0][0] == 0
    assert evidence(tmp_path / "run") == meta[1]


@pytest.mark.soak
@pytest.mark.parametrize(("name", "recipe"), [("meta", META), ("vote", VOTE)])
def test_a_resume_in_another_python(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, recipe: list[str]
) -> None:
    """Nothing may depend on the order of a set, or on random numbers that nobody seeded: forks would share both."""
    expected: Whole = request.getfixturevalue(name)
    for seed, tick, status in ((1, expected[2] // 2, -signal.SIGKILL), (2, None, 0)):
        with serving(PYTHONHASHSEED=str(seed)) as run:
            assert run(["meta-train", recipe, str(tmp_path / "run"), tick])[0][0] == status
    assert evidence(tmp_path / "run") == expected[1]


@pytest.mark.soak
def test_two_whole_quickstarts_are_alike(tmp_path: Path) -> None:
    for name in ("one", "other"):
        command = [sys.executable, "-m", "gmn", "meta-train", "quickstart", "--run", name, "--seed", "3"]
        subprocess.run(command, check=True, cwd=tmp_path, env=ONE_THREAD)
    assert evidence(tmp_path / "one") == evidence(tmp_path / "other")


@pytest.mark.soak
def test_a_run_that_is_killed_again_and_again(order: Order, meta: Whole, tmp_path: Path) -> None:
    """It gets a bit further each time, also when it is killed while it cleans up."""
    folder, kills = tmp_path / "run", 0
    for tick in (meta[2] // 3, 5, meta[2] // 3, 12):
        [[status, _]] = order(["meta-train", META, str(folder), tick])
        kills += status == -signal.SIGKILL
    assert kills == 4
    assert order(["meta-train", META, str(folder)])[0][0] == 0
    assert evidence(folder) == meta[1]


SELECT = ["--min-accuracy=0.01", "--finetune-images=100", "--use"]
SOME = [pytest.param(number, marks=[pytest.mark.soak] if number else []) for number in range(5)]


@pytest.fixture(scope="session")
def search(order: Order, meta: Whole, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = Path(shutil.copytree(meta[0], tmp_path_factory.mktemp("whole") / "search"))
    return whole(order, folder, SELECT, "select")


@pytest.mark.parametrize("number", SOME)
def test_a_killed_search_for_a_checkpoint(
    order: Order, meta: Whole, search: Whole, tmp_path: Path, number: int
) -> None:
    """It has no `--resume`: what is found is kept, and asked for again it ends like one that nobody killed."""
    folder, tick = Path(shutil.copytree(meta[0], tmp_path / "run")), moments(search[2], 5, seed=5)[number]
    assert killed_and_resumed(order, folder, SELECT, tick, "select") == search[1]


@pytest.fixture(scope="session")
def pruning(order: Order, meta: Whole, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(order, tmp_path_factory.mktemp("whole") / "pruning", [*META, f"--meta={meta[0]}"], "prune")


@pytest.mark.parametrize("number", SOME)
def test_a_killed_pruning(order: Order, meta: Whole, pruning: Whole, tmp_path: Path, number: int) -> None:
    recipe, tick = [*META, f"--meta={meta[0]}"], moments(pruning[2], 5, seed=6)[number]
    assert killed_and_resumed(order, tmp_path / "run", recipe, tick, "prune") == pruning[1]


MATRIX = ["matrix", *(f"common.{field}" for field in META[1:] if not field.startswith("network"))]
MATRIX += ["entries.resnet8.network.options={width: 4, shortcut: B}", "columns=[resnet8]"]


@pytest.mark.soak
def test_a_killed_matrix(order: Order, tmp_path: Path) -> None:
    """Its entries and cells are runs of their own; it is killed in each of them."""
    _, expected, ticks = whole(order, tmp_path / "whole", MATRIX)
    for tick in moments(ticks, 5, seed=7):
        assert killed_and_resumed(order, tmp_path / str(tick), MATRIX, tick) == expected, tick


def working(mark: str) -> bool:
    """Whether a worker of Ray does a job, of a cluster that was started with this in its environment."""
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours
            if (place / "cmdline").read_bytes().startswith(b"ray::attempt"):
                return mark.encode() in (place / "environ").read_bytes().split(b"\0")
    return False


@pytest.mark.soak
def test_a_killed_caller_of_a_cluster(order: Order, meta: Whole, tmp_path: Path) -> None:
    """Workers were making its rows; it goes on with a new cluster."""
    folder = tmp_path / "run"
    command = [sys.executable, *gmn_command(folder), "--engine", "ray"]
    process = subprocess.Popen(command, env=ONE_THREAD | {"GMN_TEST": str(folder)})
    while not working(f"GMN_TEST={folder}"):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (folder / "report.json").exists()
    subprocess.run([*command, "--resume"], check=True, env=ONE_THREAD)
    found = evidence(folder)
    shown = {name for name in found["files"] if name.startswith(("plots", "report."))}  # which the harness leaves out
    assert found | {"files": found["files"] - shown} == meta[1] | {"files": meta[1]["files"] - shown}


@pytest.mark.soak
def test_another_number_of_processes(tmp_path: Path) -> None:
    """A run that two processes began and that was killed is finished by one, which keeps what they made."""
    folder = tmp_path / "run"
    gmn = gmn_command(folder, "meta_train.epochs=6")
    kept = killed_in_two_processes(gmn, folder)
    assert load_json(folder / "environment.json")["processes"] == 2
    assert not (folder / "report.json").exists()
    subprocess.run([sys.executable, *gmn, "--resume"], check=True, env=ONE_THREAD)
    assert kept == {path: path.stat().st_ino for path in kept}
    assert len(list((folder / "checkpoints").iterdir())) == 6
    assert len(load_report(folder)["meta_train"]) == 6


def killed_in_two_processes(gmn: list[str], folder: Path) -> dict[Path, int]:
    """Two processes begin a run and are killed after its second epoch; the first two checkpoints, as files."""
    paths = [folder / "checkpoints" / f"epoch-00{epoch}.safetensors" for epoch in (1, 2)]
    together = crew.start([gmn] * 2, stdout=None, stderr=None)
    while not paths[-1].is_file():
        assert [process.poll() for process in together] == [None, None]
        time.sleep(0.02)
    for process in together:
        process.kill()
        process.wait()
    assert not (folder / "report.json").exists()
    return {path: path.stat().st_ino for path in paths}


@pytest.mark.soak
def test_two_killed_processes(tmp_path: Path) -> None:
    """Two go on, and end like two that nobody killed."""
    commands = {name: gmn_command(tmp_path / name, "meta_train.epochs=6") for name in ("whole", "run")}
    kept = killed_in_two_processes(commands["run"], tmp_path / "run")
    for name, resume in (("whole", []), ("run", ["--resume"])):
        together = crew.start([[*commands[name], *resume]] * 2, stdout=None, stderr=None)
        assert [process.wait(600) for process in together] == [0, 0]
    assert kept == {path: path.stat().st_ino for path in kept}
    assert evidence(tmp_path / "run") == evidence(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A folder on a disk of so many kilobytes; called again, the disk grows."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(kilobytes: int) -> Path:
        options = f"{'remount,' * place.is_mount()}size={kilobytes}k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        return place

    yield size
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


SHARES = [0.6, *(pytest.param(share, marks=pytest.mark.soak) for share in (0.3, 0.4, 0.5, 0.7, 0.8))]


@pytest.mark.parametrize("share", SHARES)
def test_the_disk_of_a_zoo_is_full(order: Order, vote: Whole, small_disk: Callable[[int], Path], share: float) -> None:
    """SQLite, which writes past Python, finds it full too."""
    whole = sum(path.stat().st_size for path in vote[0].rglob("*") if path.is_file()) // 1024
    folder = small_disk(int(share * whole)) / "run"
    assert order(["meta-train", VOTE, str(folder)])[0][0] == 3
    small_disk(20 * whole)
    assert order(["meta-train", VOTE, str(folder)])[0][0] == 0
    found = evidence(folder)
    assert found["torn"] <= 1  # the disk took a part of the last line, which is made again
    assert found | {"torn": 0} == vote[1]


PENDING = "zoo/tasks/."
"""The file of a task that is being handed in."""


def begun(order: Order, folder: Path) -> str:
    """A run that was killed over its first task."""
    assert order(["meta-train", VOTE, str(folder), PENDING])[0][0] == -signal.SIGKILL
    return str(folder)


@pytest.fixture(scope="session")
def shared(order: Order, vote: Whole, tmp_path_factory: pytest.TempPathFactory) -> int:
    """As many ticks as each of two processes surely has that go on with such a run: half of what the lesser one had."""
    folder = begun(order, tmp_path_factory.mktemp("whole") / "shared")
    (main, ticks), (worker, other) = order(["meta-train", VOTE, folder], ["join", VOTE, folder])
    assert (main, worker) == (0, 0)
    assert evidence(Path(folder)) == vote[1]
    print(f"{ticks} and {other} ticks")
    return min(ticks, other) // 2


def test_a_worker_of_a_zoo_is_killed(order: Order, vote: Whole, tmp_path: Path) -> None:
    """When it hands in a task; the other one takes over, without a resume."""
    folder = begun(order, tmp_path / "run")
    (main, _), (worker, _) = order(["meta-train", VOTE, folder], ["join", VOTE, folder, PENDING])
    assert (main, worker) == (0, -signal.SIGKILL)
    assert evidence(tmp_path / "run") == vote[1]


@pytest.mark.soak
@pytest.mark.parametrize("number", range(10))
def test_one_of_two_builders_of_a_zoo_is_killed(
    order: Order, vote: Whole, shared: int, tmp_path: Path, number: int
) -> None:
    """The other one goes on; where it was the one that reports, a resume reports."""
    folder, tick = begun(order, tmp_path / "run"), moments(shared, 10, seed=2)[number]
    ticks = [tick, None] if number % 2 else [None, tick]
    ended = order(["meta-train", VOTE, folder, ticks[0]], ["join", VOTE, folder, ticks[1]])
    assert [status for status, _ in ended] == [-signal.SIGKILL if last else 0 for last in ticks]
    if ticks[0]:
        assert not (tmp_path / "run" / "report.json").exists()
        assert order(["meta-train", VOTE, folder])[0][0] == 0
    assert evidence(tmp_path / "run") == vote[1]


@pytest.mark.soak
@pytest.mark.parametrize("number", range(10))
def test_both_builders_of_a_zoo_are_killed(order: Order, vote: Whole, shared: int, tmp_path: Path, number: int) -> None:
    folder, tick = begun(order, tmp_path / "run"), moments(shared, 10, seed=3)[number]
    ended = order(["meta-train", VOTE, folder, tick], ["join", VOTE, folder, tick])
    assert [status for status, _ in ended] == [-signal.SIGKILL] * 2
    assert order(["meta-train", VOTE, folder])[0][0] == 0
    assert evidence(tmp_path / "run") == vote[1]
