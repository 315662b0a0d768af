"""Everything that can be wrong with a zoo: its index, rows without file, files without row, damaged files."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gmn import zoo_rows
from gmn.errors import CheckpointError, GmnError
from gmn.processes import TEMPORARY, is_left_over
from gmn.progress import track
from gmn.zoo_files import check_file, locate
from gmn.zoo_format import check_finite, read, unpack
from gmn.zoo_index import Index
from gmn.zoo_task import Task, check_same, to_text


@dataclass(frozen=True)
class Problem:
    """Something wrong with a zoo.

    Attributes:
        task: The task concerned; empty if it is none's.
        file: The file concerned.
        what: What is wrong, as a line.
    """

    task: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.task or self.file}: {self.what}"


def verify(index: Index, files: Path, identity: Mapping[str, Any]) -> list[Problem]:
    """Check the index, every row, and every file from end to end.

    Args:
        index: The index.
        files: The folder of the tasks' files.
        identity: The network that all tasks must be cut from.
    """
    problems = [Problem("", str(index.path), to_text(damage)) for damage in index.damages()]
    try:
        rows, present = _snapshot(index, files)
    except CheckpointError as error:
        return problems or [Problem("", str(index.path), to_text(error))]
    tasks: list[Task] = []
    for row in rows:
        try:
            tasks.append(zoo_rows.parse(row, identity["nodes"], str(index.path)))
        except GmnError as error:
            problems.append(Problem(to_text(reprlib.repr(row[0])), str(index.path), to_text(error)))
    problems += _orphans(files, present - {str(row[zoo_rows.COLUMNS.index("file")]) for row in rows})
    done = [task for task in tasks if task.status == "done"]
    with track("gmn zoo verify", len(done)) as advance:
        for task in done:
            problems += _damages(task, index, files, identity)
            advance(task.name)
    return problems


def _snapshot(index: Index, files: Path) -> tuple[list[zoo_rows.Row], set[str]]:
    """All rows and the names of all files at one moment, in which no process is adding a task."""
    with index.write() if index.writable else index.read() as db:
        rows = list(zoo_rows.select(db))
        present = {path.name for path in files.iterdir()} if files.is_dir() and not files.is_symlink() else set()
    return rows, present


def _orphans(files: Path, names: set[str]) -> Iterator[Problem]:
    """Files that no row names; not those that a living process is about to hand in."""
    for name in sorted(names):
        pending = TEMPORARY.fullmatch(name)
        if pending and not is_left_over(name):
            continue
        what = "left by a process that was killed; delete it" if pending else "no task of the zoo has this file"
        yield Problem("", to_text(files / name), what)


def _damages(task: Task, index: Index, files: Path, identity: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        path = locate(files, task.file)
        check_file(path, task)
        stored = read(path)
        check_same("the file is for another network", identity, stored.identity, path)
        check_same("the file describes another task", task.description, stored.task.description, path)
        check_finite(stored.weights | stored.extra, str(path))
        with index.read() as db:
            masks = zoo_rows.masks(db, [task.name], len(stored.keep), str(index.path))
        if not torch.equal(unpack(masks.values(), len(stored.keep)), stored.keep[None]):
            raise CheckpointError("the mask in the index is not the one in the file", where=str(path))
    except GmnError as error:
        yield Problem(task.name, str(files / task.file), to_text(error))
