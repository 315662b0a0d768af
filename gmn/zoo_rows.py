"""The rows of a zoo's index: one per task, with its mask a bit per node."""

from __future__ import annotations

import json
import reprlib
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from gmn.errors import CheckpointError
from gmn.zoo_task import Task, to_task

TEXTS = ("classes", "class_names", "metrics")  # JSON in their columns
COLUMNS = (
    *("name", "classes", "class_names", "split", "seed", "status", "metrics", "flops", "parameters", "created"),
    *("file", "sha256", "bytes", "error"),
)
AT_ONCE = 500  # names in one query

Row = tuple[Any, ...]


def select(db: sqlite3.Connection, *, status: str | None = None, split: str | None = None) -> Iterator[Row]:
    """Rows in the order in which they were planned: the columns, then the length of the mask."""
    wanted = {"status": status, "split": split}
    conditions = " AND ".join(f"{key} = :{key}" for key, value in wanted.items() if value is not None) or "TRUE"
    query = f"SELECT {', '.join(COLUMNS)}, length(mask) FROM tasks WHERE {conditions} ORDER BY id"
    return iter(db.execute(query, wanted))


def find(db: sqlite3.Connection, name: str) -> Row | None:
    """The row of a task; None if there is none."""
    query = f"SELECT {', '.join(COLUMNS)}, length(mask) FROM tasks WHERE name = ?"
    row: Row | None = db.execute(query, [name]).fetchone()
    return row


def put(db: sqlite3.Connection, task: Task, mask: bytes | None = None) -> None:
    """Write the row of a task, new or not."""
    values = {key: getattr(task, key) for key in COLUMNS}
    values |= {key: json.dumps(values[key], ensure_ascii=False, allow_nan=False) for key in TEXTS}
    values |= {key: float(values[key]) for key in ("flops", "created")}
    values |= {"mask_crc": None if mask is None else zlib.crc32(mask), "mask": mask}
    marks = ", ".join(f":{key}" for key in values)
    changes = ", ".join(f"{key} = excluded.{key}" for key in values)
    db.execute(
        f"INSERT INTO tasks ({', '.join(values)}) VALUES ({marks}) ON CONFLICT (name) DO UPDATE SET {changes}", values
    )


def parse(row: Row, nodes: int, where: str) -> Task:
    """The task of a row; CheckpointError if a value is malformed, or its mask is not of N nodes."""
    values = dict(zip(COLUMNS, row, strict=False))
    where = f"{where}, task {reprlib.repr(values['name'])}"
    try:
        values |= {key: json.loads(values[key]) for key in TEXTS}
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError("malformed row", got=reprlib.repr(str(error)), where=where) from error
    task, width = to_task(values, where), (nodes + 7) // 8
    if task.status == "done" and row[-1] != width:
        raise CheckpointError("a mask of another length", expected=f"{width} bytes", got=str(row[-1]), where=where)
    return task


def masks(db: sqlite3.Connection, names: Sequence[str], nodes: int, where: str) -> dict[str, bytes]:
    """The packed masks of those tasks that are done; CheckpointError if one is damaged."""
    found: dict[str, bytes] = {}
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        marks = ", ".join("?" * len(some))
        query = f"SELECT name, mask, mask_crc FROM tasks WHERE status = 'done' AND name IN ({marks})"
        for name, mask, checksum in db.execute(query, some):
            if not isinstance(mask, bytes) or zlib.crc32(mask) != checksum or len(mask) != (nodes + 7) // 8:
                raise CheckpointError("a damaged mask in the index", where=f"{where}, task {reprlib.repr(name)}")
            found[name] = mask
    return found
