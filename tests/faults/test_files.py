"""Files, folders and exits.

* Any changed byte of saved tensors or networks is noticed, and a saved network is then none.
* One process at a time in a run folder, also after the one before was killed; `--overwrite` keeps what others use.
* Temporary files of dead processes go, those of the living and of other machines stay.
* A resumed run logs nothing twice, and says so where it has another number of threads.
* Each cause that ends a command has one line and one exit code.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from email.message import Message
from pathlib import Path
from socket import gaierror
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import safetensors
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from made_runs import CNN, built, call

from gmn import checkpoint, pipeline, processes, report, to_graph
from gmn.checkpoint import load_json, load_sound, load_tensors, save_json, save_model, save_tensors, saved_facts
from gmn.errors import CheckpointError, GmnError, TrainingError
from gmn.exits import Stopped, verdict
from gmn.export import export_model
from gmn.jsonl import append_line, read_lines
from gmn.lock import alone
from gmn.processes import machine, sweep
from gmn.recipe import load_recipe
from gmn.run import Run


@pytest.mark.parametrize("place", [-1, -20, 60])
def test_a_changed_byte_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.arange(10.0), "empty": torch.zeros(0), "yes": torch.tensor(True)}, {"epoch": 3})
    tensors, meta = load_tensors(path)
    assert (tensors["w"].tolist(), tensors["yes"].item(), meta) == (list(range(10)), True, {"epoch": 3})
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"another checksum|cannot read|not a gmn file"):
        load_tensors(path)


def test_a_damaged_network_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        save_model(tmp_path / str(number), built(CNN, number), CNN)
    assert saved_facts(tmp_path / "0") is not None
    assert saved_facts(tmp_path / "2") is None
    assert capfd.readouterr().err == ""
    (tmp_path / "0" / "model.json").write_bytes((tmp_path / "1" / "model.json").read_bytes())
    assert saved_facts(tmp_path / "0") is None
    os.truncate(tmp_path / "1" / "weights.safetensors", 5000)
    assert saved_facts(tmp_path / "1") is None
    said = capfd.readouterr().err
    assert "warning: model.json is not of these weights" in said
    assert "it is made again" in said


def test_networks_of_an_older_gmn_have_no_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "checksum", lambda *_: None)
    save_model(tmp_path, built(CNN), CNN)
    monkeypatch.undo()
    assert saved_facts(tmp_path) is not None


def holder(folder: Path) -> subprocess.Popen[str]:
    code = f"from pathlib import Path; from gmn.lock import alone\nwith alone(Path({str(folder)!r})): print(1); input()"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "recipe")
    with run:
        run.start()
        with alone(run.folder):  # this process may
            pass
        (run.folder / "thesis").mkdir()
    with holder(run.folder) as process:
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(GmnError, match=r"another process works in the run folder: got .*run; .*gmn join"):
                Run(run.folder, "recipe", **options).start()
        assert (run.folder / "thesis").is_dir()
        Run(run.folder, "recipe", resume=True, shared=True).start()  # as gmn join
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Run(run.folder, "recipe", overwrite=True) as again:
            again.start()
    assert sorted(path.name for path in run.folder.iterdir()) == ["environment.json", "recipe.yaml"]


def test_a_run_that_another_process_began_meanwhile(tmp_path: Path) -> None:
    first, second = Run(tmp_path / "run", "recipe"), Run(tmp_path / "run", "recipe")
    first.start()
    with pytest.raises(GmnError, match="another process works in the run folder"):
        second.start()


def test_temporary_files_of_the_dead_go(tmp_path: Path) -> None:
    dead, here, there = 2**22 + 1, machine(), "0" * 16
    gone = [f".a.json.{dead}.tmp", f".a.json.{here}.{dead}.tmp", f".index.sqlite.0a1b2c3d.{here}.{dead}.tmp-wal"]
    stays = [f".a.json.{here}.{os.getpid()}.tmp", f".a.json.{there}.{dead}.tmp", "a.tmp", f"a.{dead}.tmp", ".b.x.tmp"]
    (tmp_path / "deep").mkdir()
    for name in (*gone, *stays):
        (tmp_path / "deep" / name).touch()
    forgotten = tmp_path / "deep" / f".b.json.{there}.{dead}.tmp"  # of before a power cut, say
    for path in (forgotten, tmp_path / "deep" / stays[0], tmp_path / "deep" / "a.tmp"):
        path.touch()
        os.utime(path, times=(0, 0))
    assert sweep(tmp_path) == len(gone) + 1
    assert {path.name for path in (tmp_path / "deep").iterdir()} == set(stays)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".recipe.yaml.{here}.{dead}.tmp").write_text("killed at once")
    with Run(tmp_path / "run", "recipe", resume=True) as run:
        run.start()
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "recipe"


def test_two_machines_of_one_name_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is one that was started again: its old processes are not those of now."""
    found = set[str]()
    for start in ("first", "second", None):
        monkeypatch.setattr(processes, "BOOT", tmp_path / str(start))
        if start:
            processes.BOOT.write_text(start)
        machine.cache_clear()
        found |= {machine(), machine()}
    monkeypatch.undo()
    machine.cache_clear()
    assert len({*found, machine()}) == 4


def test_a_resumed_run_logs_nothing_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path / "run", "recipe") as run:
        run.start()
        for _ in range(2):  # two networks that are the same
            run.log("fit", epoch=1, loss=0.5)
    environment = load_json(run.folder / "environment.json")
    save_json(run.folder / "environment.json", environment | {"threads": environment["threads"] + 1})
    with Run(tmp_path / "run", "recipe", resume=True) as run:
        run.start()
        run.log("fit", epoch=1, loss=0.5)
        run.log("fit", epoch=2, loss=0.25)
    assert [entry["epoch"] for entry in read_lines(run.folder / "metrics.jsonl")] == [1, 1, 2]
    assert "its last digits may differ" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_line(Path("/dev/full"), {"a": 1})
    save_json(path := tmp_path / "a.json", {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'"):
        save_json(path, {"a": 2})
    assert load_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


CAUSES = {
    "mistake": (TrainingError("loss is not finite"), 2, "gmn: loss is not finite"),
    "full": (OSError(28, "No space left on device", "a"), 3, "gmn: No space left on device: a; what is finished is"),
    "read-only": (OSError(30, "Read-only file system", "a"), 3, "gmn: Read-only file system: a; what is finished is"),
    "no host": (
        URLError(OSError(-2, "Name not known")),
        2,
        "gmn: a connection failed: URLError: <urlopen error [Errno",
    ),
    "no server": (gaierror(-2, "Name not known"), 2, "gmn: a connection failed: gaierror: [Errno -2] Name not known"),
    "no page": (
        HTTPError("http://x", 404, "Not Found", Message(), None),
        2,
        "gmn: a connection failed: HTTPError: HTTP",
    ),
    "refused": (ConnectionRefusedError(111, "Refused"), 2, "gmn: a connection failed: ConnectionRefusedError: [Errno"),
    "hub": (LocalEntryNotFoundError("offline\nmore"), 2, "gmn: a connection failed: LocalEntryNotFoundError: offline"),
    "network disk": (TimeoutError(110, "Timed out", "a"), 3, "gmn: Timed out: a; what is finished is"),
    "no right": (PermissionError(13, "Permission denied", "a"), 3, "gmn: Permission denied: a; what is finished is"),
    "memory": (MemoryError(), 4, "gmn: out of memory; smaller batches"),
    "GPU": (torch.OutOfMemoryError("CUDA out of memory.\nMore"), 4, "gmn: out of memory: CUDA out of memory.; smaller"),
    "CPU": (RuntimeError("DefaultCPUAllocator: can't allocate"), 4, "gmn: out of memory: DefaultCPUAllocator: can't"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "gmn: stopped; what is finished is kept: go on with --resume"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cause: str
) -> None:
    error, code, line = CAUSES[cause]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "meta_train", fail)
    assert call(monkeypatch, "meta-train", "quickstart") == code
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(line)
    assert said.err.count("\n") == 1


def test_a_pipe_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    """As in `gmn zoo list | head`; rich and typer see to it, each in its own way."""
    for arguments in (["--help"], ["convert", "cifar.resnet8", "-o", "g.safetensors"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "gmn", *arguments]
        ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path)
        os.close(writing)
        assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(RuntimeError("odd")) is None
    assert verdict(Stopped()) == (130, "stopped")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(pipeline, "meta_train", fail)
    with pytest.raises(RuntimeError, match="odd"):
        call(monkeypatch, "meta-train", "quickstart")


@pytest.mark.parametrize("verb", [["meta-train"], ["prune", "--meta", "elsewhere"]])
def test_seed(monkeypatch: pytest.MonkeyPatch, verb: list[str]) -> None:
    seeds: list[int] = []
    for name in ("meta_train", "prune_recipe"):
        monkeypatch.setattr(pipeline, name, lambda recipe, *_, **__: seeds.append(recipe.seed))
    monkeypatch.setattr(report, "show", lambda *_: None)
    for options in ([], ["--seed", "7"], ["--set", "seed=3"]):
        assert call(monkeypatch, *verb, "quickstart", *options) == 0
    assert seeds == [0, 7, 3]
    assert {entry.seed for entry in load_recipe("matrix", seed=7).entries.values()} == {7}
    assert call(monkeypatch, *verb, "quickstart", "--seed", "-1") == 2


def test_a_visit_leaves_what_is_under_way(tmp_path: Path) -> None:
    """`gmn curve` and `gmn select` look at runs that others go on with."""
    state = tmp_path / "run" / "under-way" / "a.0.safetensors"
    for finished in (False, True):
        save_tensors(state, {"w": torch.zeros(1)}, {})
        save_json(tmp_path / "run" / "environment.json", {})
        (tmp_path / "run" / "recipe.yaml").write_text("recipe")
        if finished:
            save_json(tmp_path / "run" / "report.json", {})
        with Run(tmp_path / "run", "recipe", resume=True, visits=True) as run:
            run.start()
        assert state.is_file() is not finished


@pytest.mark.parametrize(
    "failure", [OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("DefaultCPUAllocator: no memory")]
)
def test_a_failing_machine_damages_no_file(tmp_path: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or memory that fails says nothing of what is in a file: it is not made again, the command ends."""
    save_model(tmp_path, built(CNN), CNN)

    def failing(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(safetensors, "safe_open", failing)
    with pytest.raises(type(failure)):
        saved_facts(tmp_path)
    with pytest.raises(type(failure)):
        load_sound(tmp_path / "weights.safetensors")


def test_a_file_that_may_not_be_read_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(PermissionError):
        load_json(tmp_path / "a.json")


def test_memory_that_fails_says_nothing_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that it cannot be exported, nor that it has no graph."""

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.export, "export", failing)
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    for made in (
        lambda: export_model(torch.nn.Linear(2, 3), torch.ones(1, 2), tmp_path),
        lambda: to_graph(scripted, torch.ones(1, 2)),
    ):
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            made()
