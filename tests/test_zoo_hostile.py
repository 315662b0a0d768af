"""A zoo that a stranger wrote: it runs nothing, reads nothing outside its folder, allocates nothing it only claims.

Every refusal is a GmnError that names the file; listing leaves out what is malformed and says so.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo_tasks import ABOUT, change, filled, found, names, path_of, planned

from gmn.errors import CheckpointError, GmnError
from gmn.zoo import Zoo
from gmn.zoo_format import LARGEST, read


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("whole") / "zoo").folder


@pytest.fixture
def zoo(whole: Path, tmp_path: Path) -> Zoo:
    return Zoo.open(shutil.copytree(whole, tmp_path / "zoo"))


# -- the index ---------------------------------------------------------------------------------------------------------


def overwrite(path: Path, start: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[start : start + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "not the index of a zoo"),
        (lambda path: path.write_bytes(b"no database at all" * 100), "cannot read the zoo's index"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot read the zoo's index"),
        (lambda path: overwrite(path, 100, b"\xff" * 300), "cannot read the zoo's index"),
        (lambda path: path.unlink(), "no zoo here"),
        (lambda path: (path.unlink(), path.mkdir()), "unsafe file"),
    ],
    ids=["empty", "text", "torn", "overwritten", "missing", "folder"],
)
def test_a_damaged_index_is_named(zoo: Zoo, damage: Callable[[Path], object], message: str) -> None:
    path = zoo.folder / "index.sqlite"
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        Zoo.open(zoo.folder)
    assert str(zoo.folder) in str(error.value)
    with pytest.raises(CheckpointError):
        zoo.tasks()
    with pytest.raises(CheckpointError):
        zoo.add(planned(8), *found(8))
    assert len(names(zoo.folder / "tasks")) == 3


def test_a_damaged_page_is_found(zoo: Zoo) -> None:
    path = zoo.folder / "index.sqlite"
    rows = path.read_bytes().index(b"task-2")  # on the page of the rows
    overwrite(path, rows // 4096 * 4096, b"\xee" * 64)
    problems = zoo.verify()
    assert problems
    assert {problem.file for problem in problems} == {str(path)}


def test_another_version_and_another_file(zoo: Zoo) -> None:
    change(zoo, "PRAGMA user_version = 2")
    with pytest.raises(CheckpointError, match=r"a zoo of a newer gmn: expected version 1 at most; got 2; .*update gmn"):
        Zoo.open(zoo.folder)
    change(zoo, "PRAGMA user_version = 0")
    with pytest.raises(CheckpointError, match="not the tables of a zoo"):
        Zoo.open(zoo.folder)
    change(zoo, "PRAGMA application_id = 0")
    with pytest.raises(CheckpointError, match="another SQLite file"):
        Zoo.open(zoo.folder)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON claims BEGIN DELETE FROM tasks; END",
        "CREATE TRIGGER tasks AFTER INSERT ON claims BEGIN DELETE FROM tasks; END",
        "CREATE VIEW v AS SELECT * FROM tasks",
        "CREATE VIRTUAL TABLE v USING fts5(x)",
        "ALTER TABLE tasks ADD COLUMN more GENERATED ALWAYS AS (hex(zeroblob(1000000000)))",
        "DROP TABLE claims",
    ],
)
def test_nothing_of_a_schema_runs_that_is_not_ours(zoo: Zoo, statement: str) -> None:
    change(zoo, statement)
    for use in (lambda: Zoo.open(zoo.folder), zoo.tasks, lambda: zoo.claim("a"), zoo.counts):
        with pytest.raises(CheckpointError, match="not the tables of a zoo"):
            use()


@pytest.mark.parametrize("name", ["index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "tasks"])
def test_links_are_refused(zoo: Zoo, tmp_path: Path, name: str) -> None:
    path, away = zoo.folder / name, tmp_path / "away"
    if path.exists():
        path.rename(away)
    path.symlink_to(away)
    with pytest.raises(CheckpointError, match="unsafe") as error:
        Zoo.open(zoo.folder)
    assert str(path) in str(error.value)
    if name == "tasks":
        with pytest.raises(CheckpointError, match="no link"):
            zoo.load("task-1")


def hot_journal(victim: Path, pages: int) -> bytes:
    """A rollback journal that changes nothing and ends in the name of a file, which SQLite (3.40) then deletes."""
    magic, name = bytes.fromhex("d9d505f920a163d7"), os.fsencode(victim)
    numbers = (0, 0, pages, 512, 4096)  # records, nonce, pages, size of a sector and of a page
    header = (magic + b"".join(number.to_bytes(4, "big") for number in numbers)).ljust(512, b"\0")
    lock_page = 2**30 // 4096 + 1
    return header + b"".join(
        [lock_page.to_bytes(4, "big"), name, len(name).to_bytes(4, "big"), sum(name).to_bytes(4, "big"), magic]
    )


def test_a_rollback_journal_is_not_played_back(zoo: Zoo, tmp_path: Path) -> None:
    index, victim = zoo.folder / "index.sqlite", tmp_path / "victim"
    victim.write_bytes(b"precious")
    journal = hot_journal(victim, index.stat().st_size // 4096)
    index.with_name("index.sqlite-journal").write_bytes(journal)
    for use in (lambda: Zoo.open(zoo.folder), zoo.tasks, lambda: zoo.claim("a")):
        with pytest.raises(CheckpointError, match="no rollback journal"):
            use()
    assert victim.exists()


def test_a_description_of_any_form(zoo: Zoo) -> None:
    for value, message in [
        ("[" * 100_000, "malformed"),
        ("1" * 2_000_000, "too large"),
        ("-3", "nodes"),
        ("x", "JSON"),
    ]:
        change(zoo, "UPDATE about SET value = ? WHERE key = 'nodes'", value)
        with pytest.raises(GmnError, match=rf"(?i){message}|malformed"):
            Zoo.open(zoo.folder)


def test_a_zoo_that_is_read_only(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    other = Zoo.open(zoo.folder)
    assert len(other.tasks()) == 3
    assert other.verify() == []
    assert torch.equal(other.load("task-1")[1].keep, found(1)[0])
    with pytest.raises(PermissionError, match="cannot be written to"):
        other.claim("a")
    assert names(zoo.folder) == ["index.sqlite", "tasks"]


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("file", bad) for bad in ("../../secret.safetensors", "/etc/passwd", "a/b", "C:\\x", ".", "", None, 3)),
        *(("file", bad) for bad in ("task-2.00000000.safetensors", "task-1.0000000g.safetensors", b"task-1", "CON")),
        *(("classes", bad) for bad in ("[", "[1]", '["1", 2]', "{}", "[" * 100_000, "[NaN, 1]", b"\xff", "1" * 5000)),
        *(("class_names", bad) for bad in ('["a", "\\u001b[2J"]', '["a"]', "[1, 2]", '["a", "\\ud800"]')),
        *(("metrics", bad) for bad in ('{"accuracy": NaN}', '{"accuracy": "1"}', '{"\\u001b": 1}', "[]", '{"a": {}}')),
        *(("seed", "x"), ("seed", 1.5), ("flops", "many"), ("flops", float("inf")), ("bytes", -1), ("bytes", b"")),
        *(("split", "train"), ("sha256", "0"), ("error", "\x1b[2J"), ("name", "a\x1b[2Jb"), ("name", b"\xff\x00")),
        *(("name", "../task-1"), ("mask", None), ("mask", b""), ("created", "now"), ("parameters", 1e300)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_rows_are_left_out(zoo: Zoo, capsys: pytest.CaptureFixture[str], column: str, value: Any) -> None:
    try:
        change(zoo, f"UPDATE tasks SET {column} = ? WHERE name = 'task-1'", value)
    except sqlite3.IntegrityError:  # NOT NULL
        return
    assert [task.name for task in zoo.tasks()] == ["task-0", "task-2"]
    said = capsys.readouterr().err
    assert "index.sqlite" in said
    assert said.count("\n") == 1
    assert "\x1b" not in said
    if column != "name":
        with pytest.raises(CheckpointError):
            zoo.load("task-1")
    problems = zoo.verify()
    assert problems
    assert all(str(problem).isprintable() for problem in problems)
    assert [task.name for task, _, _ in zoo.load_all(["task-0", "task-2"])] == ["task-0", "task-2"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "dangling"])
def test_a_file_must_be_a_file(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    path = path_of(zoo, "task-1")
    outside = tmp_path / "outside.safetensors"
    path.rename(outside)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(outside if kind == "link" else tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="a link or no file") as error:
        zoo.load("task-1")
    assert str(path) in str(error.value)
    with pytest.raises(CheckpointError):
        zoo.load_extra("task-1")
    assert [problem.task for problem in zoo.verify()] == ["task-1"]


# -- files -------------------------------------------------------------------------------------------------------------


def content_of(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def forged(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_headers_that_claim_too_much(zoo: Zoo, tmp_path: Path) -> None:
    header, data = content_of(path_of(zoo, "task-1"))
    path, room = tmp_path / "forged.safetensors", len(data)
    assert read(forged(path, header, data)).task.name == "task-1"
    for length in (2**63, 2**64 - 1, 10**12, 0, len(json.dumps(header)) + room + 1):
        with pytest.raises(CheckpointError, match="not a sound safetensors file: got a header of"):
            read(forged(path, header, data, length))
    claims = [
        *(entry([2**38], 0, 2**40), entry([2**40], room, room + 2**42), entry([2**40, 2**40], 0, room)),
        *(entry([1], -4, 0), entry([1], 0, 8), entry([-1], 0, 4), entry([1.0], 0, 4), entry([True], 0, 4)),
        *(entry([0] * 17, 0, 0), entry([0, 2**60], 0, 0), entry([1], "0", "4"), entry([1], 0, 4, "F99")),
        *({}, {"dtype": "F32"}, [], None, "x", entry([4], 0, 4, ["F32"])),  # type: ignore[arg-type]
    ]
    for claim in claims:
        with pytest.raises(CheckpointError, match="not a sound safetensors file"):
            read(forged(path, {**header, "weight.more": claim}, data))
    for text in (b"[" * 200_000, b"{", b"[]", b"\xff\xfe", b'{"a": ' + b"9" * 10_000 + b"}"):
        with pytest.raises(CheckpointError):
            read(forged(path, text, data))
    with pytest.raises(CheckpointError, match="tensors of"):
        read(forged(path, header, data + b"hidden"))


def test_a_file_that_is_too_large_is_not_read(zoo: Zoo) -> None:
    path = path_of(zoo, "task-1")
    os.truncate(path, LARGEST + 1)  # a hole: it takes no room
    change(zoo, "UPDATE tasks SET bytes = ? WHERE name = 'task-1'", LARGEST + 1)
    with pytest.raises(CheckpointError, match="the file is too large"):
        zoo.load("task-1")
    assert "too large" in zoo.verify()[0].what


def test_descriptions_in_files(zoo: Zoo, tmp_path: Path) -> None:
    header, data = content_of(path_of(zoo, "task-1"))
    meta = json.loads(header["__metadata__"]["gmn"])
    task, identity = meta["content"]["task"], meta["content"]["identity"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"task": {**task, "name": "../x"}}, "malformed task: name"),
        ({"task": {**task, "name": 3}}, "malformed task: name"),
        ({"task": {**task, "more": 3}}, "malformed task"),
        ({"task": {**task, "class_names": ["a", "\x1b"]}}, "malformed task: class_names"),
        ({"task": {key: task[key] for key in task if key != "classes"}}, "malformed task: classes"),
        ({"task": []}, "not a task"),
        ({"kind": "model"}, "not a task"),
        ({"identity": {**identity, "nodes": 10**9}}, "another length"),
        ({"identity": {**identity, "nodes": "21"}}, "no sound mask"),
        ({"identity": {**identity, "nodes": 17}}, "behind the last node|another network"),
        ({"identity": {**identity, "network": {"name": "cifar.resnet20"}}}, "another network: expected network"),
    ]
    target = Zoo.create(tmp_path / "target", ABOUT)
    for changes, message in bad:
        text = json.dumps({**meta, "content": {**meta["content"], **changes}})
        path = forged(tmp_path / "f.safetensors", {**header, "__metadata__": {"gmn": text}}, data)
        with pytest.raises(GmnError, match=message) as error:
            target.add_file(path)
        assert str(error.value).isprintable()
    for text in ("null", "[" * 100_000, "{}", "x"):
        with pytest.raises(CheckpointError, match="not a task"):
            target.add_file(forged(tmp_path / "f.safetensors", {**header, "__metadata__": {"gmn": text}}, data))
    assert target.tasks() == []
    assert names(target.folder / "tasks") == []


def test_bytes_that_are_neither_true_nor_false(zoo: Zoo, tmp_path: Path) -> None:
    header, data = content_of(path_of(zoo, "task-1"))
    header["weight.flag"] = entry([1], len(data), len(data) + 1, "BOOL")
    path = tmp_path / "f.safetensors"
    assert bool(read(forged(path, header, data + b"\1")).weights["flag"])
    with pytest.raises(CheckpointError, match="neither true nor false"):
        read(forged(path, header, data + b"\2"))


def test_a_row_with_its_own_checksum_of_another_tasks_file(zoo: Zoo) -> None:
    """The checksum fits, the content does not: a file says whose it is."""
    columns = "sha256, bytes"
    query = f"UPDATE tasks SET ({columns}) = (SELECT {columns} FROM tasks WHERE name = 'task-2') WHERE name = 'task-1'"
    path_of(zoo, "task-1").write_bytes(path_of(zoo, "task-2").read_bytes())
    change(zoo, query)
    with pytest.raises(CheckpointError, match="another task's or network's: expected name 'task-1'; got 'task-2'"):
        zoo.load("task-1")
    assert "describes another task" in zoo.verify()[0].what
