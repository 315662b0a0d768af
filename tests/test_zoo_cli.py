"""`gmn zoo`: results on stdout, in a pipe a line each; mistakes are one line and exit code 2, problems exit code 1."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import test_cli
import torch
from test_cli import Here
from zoo_tasks import ABOUT, NODES, filled, flip, found, path_of, planned

from gmn.zoo import Stored, Zoo, save_task
from gmn.zoo_task import WEIGHTS

here = test_cli.here


def test_list(here: Here, tmp_path: Path) -> None:
    zoo = filled(tmp_path / "zoo")
    zoo.plan([planned(5, split="target")])
    code, out, err = here("zoo", "list", "zoo", "--sort", "accuracy", "--limit", "2")
    assert code == 0
    assert err == "zoo: 1 planned, 3 done, 0 failed; shown: 2 of 3\n"
    header, *lines = (line.split("\t") for line in out.splitlines())
    assert header == [*("task", "split", "status", "classes", "accuracy", "FLOPs", "parameters", "bytes", "error")]
    assert [line[:5] for line in lines] == [
        ["task-2", "zoo", "done", "class 2, class 3", "0.52"],
        ["task-1", "zoo", "done", "class 1, class 2", "0.51"],
    ]
    assert [line.split("\t")[0] for line in here("zoo", "list", "zoo", "--class", "class 3")[1].splitlines()[1:]] == [
        "task-2"
    ]
    assert here("zoo", "list", "zoo", "--split", "target", "--status", "all")[1].count("\n") == 2
    assert "did you mean 'class 3'" in here("zoo", "list", "zoo", "--class", "class3")[2]
    for wrong in (["nowhere"], ["zoo", "--split", "train"], ["zoo", "--limit", "-1"], ["zoo", "--sort", "x"]):
        code, out, err = here("zoo", "list", *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("gmn: ")


def test_a_table_on_a_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    from gmn.zoo_cli import show

    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    show(filled(tmp_path).tasks(), console)
    text = console.export_text()
    assert "class 1, class 2" in text
    assert "┃ accuracy ┃" in text
    assert "error" not in text


def test_verify(here: Here, tmp_path: Path) -> None:
    zoo = filled(tmp_path / "zoo")
    assert here("zoo", "verify", "zoo")[:2] == (0, "3 tasks, 0 problems\n")
    flip(path_of(zoo, "task-1"))
    (tmp_path / "zoo" / "tasks" / "notes.txt").touch()
    code, out, _ = here("zoo", "verify", "zoo")
    assert code == 1
    assert "notes.txt: no task of the zoo has this file" in out
    assert "task-1: the file has another checksum" in out
    assert "3 tasks, 2 problems" in out
    assert here("zoo", "verify", "nowhere")[0] == 2


def test_add(here: Here, tmp_path: Path) -> None:
    source, zoo = filled(tmp_path / "source"), Zoo.create(tmp_path / "zoo", {**ABOUT, "ratio": 0.5})
    path = str(path_of(source, "task-1"))
    code, out, err = here("zoo", "add", "zoo", path)
    assert (code, err) == (0, "")
    assert out.startswith("added task-1: class 1, class 2; ")
    own = ("file", "sha256")
    kept, original = (dataclasses.asdict(z.task("task-1")) for z in (zoo, source))
    assert {key: kept[key] for key in kept if key not in own} == {key: original[key] for key in kept if key not in own}
    assert torch.equal(zoo.load_extra("task-1")["prototypes"], found(1)[2]["prototypes"])
    assert zoo.verify() == []
    gentle = torch.ones(NODES, dtype=torch.bool)
    save_task(tmp_path / "gentle.safetensors", Stored(planned(7), zoo.identity, gentle, *found(7)[1:]))
    said = here("zoo", "add", "zoo", "gentle.safetensors")[2]
    assert f"it keeps {NODES} of {NODES} nodes, task-1 " in said
    assert "not pruned by the same ratio" in said

    other = {"nodes": NODES, "fingerprint": "another"}
    save_task(tmp_path / "other.safetensors", Stored(planned(9), other, *found(9)))
    (tmp_path / "foreign.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (tmp_path / "text").write_text(json.dumps({"no": "task"}))
    mistakes = {
        path: "the zoo has a task of this name already",
        "other.safetensors": "for another network: expected fingerprint 'abc'; got 'another'",
        "foreign.safetensors": "not a task of a zoo",
        "text": "not a sound safetensors file",
        "nowhere.safetensors": "no such file",
    }
    for file, message in mistakes.items():
        code, out, err = here("zoo", "add", "zoo", file)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert len(zoo.tasks()) == 2


def test_add_asks_for_the_weights_that_the_tasks_share(here: Here, tmp_path: Path) -> None:
    """A task of an older gmn does not say which, and a zoo of one does not ask."""
    zoo, old = (Zoo.create(tmp_path / name, {**ABOUT, **own}) for name, own in (("new", {WEIGHTS: "a"}), ("old", {})))
    for number, own in enumerate(({WEIGHTS: "a"}, {WEIGHTS: "b"}, {})):
        save_task(tmp_path / f"{number}.safetensors", Stored(planned(number), {**old.identity, **own}, *found(number)))
    assert [here("zoo", "add", "new", f"{number}.safetensors")[0] for number in range(3)] == [0, 2, 0]
    assert [here("zoo", "add", "old", f"{number}.safetensors")[0] for number in range(3)] == [0, 0, 0]
    said = here("zoo", "add", "new", "1.safetensors")[2]
    assert "for another network: expected weights_sha256 'a'; got 'b'" in said
    assert said.count("\n") == 1
    assert [one.verify() for one in (zoo, old)] == [[], []]


@pytest.mark.parametrize("name", ["list", "verify", "add"])
def test_help_has_an_example(here: Here, name: str) -> None:
    code, out, _ = here("zoo", name, "--help")
    assert code == 0
    assert "Example" in out
    assert f"gmn zoo {name}" in out
