"""The index of a zoo: an SQLite file, opened anew for every operation, so that forks and threads share nothing.

It may be a stranger's. Its schema has to be ours to the letter, so no trigger and no view runs; a rollback journal,
which could name files elsewhere, is refused (the index is in WAL mode and never has one); so are links.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gmn.checkpoint import flush_folder
from gmn.errors import CheckpointError, GmnError
from gmn.processes import temporary_name
from gmn.zoo_task import to_text

INDEX = "index.sqlite"
VERSION = 1  # of the schema
OURS = 0x676D6E7A  # "gmnz", the application id in the SQLite header
PATIENCE = 60.0  # seconds to wait for other processes
LARGEST_ABOUT = 1_000_000  # characters of JSON

SCHEMA = {
    "about": "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "tasks": """CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    classes TEXT NOT NULL,
    class_names TEXT NOT NULL,
    split TEXT NOT NULL,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL,
    metrics TEXT NOT NULL,
    flops REAL NOT NULL,
    parameters INTEGER NOT NULL,
    created REAL NOT NULL,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    error TEXT NOT NULL,
    mask_crc INTEGER,
    mask BLOB
)""",  # the mask last: listing the tasks does not read it
    "tasks_by_status": "CREATE INDEX tasks_by_status ON tasks (status, split)",
    "claims": """CREATE TABLE claims (
    task INTEGER PRIMARY KEY REFERENCES tasks (id) ON DELETE CASCADE,
    worker TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started INTEGER NOT NULL,
    machine TEXT NOT NULL,
    since REAL NOT NULL
)""",
}
NO_ROOM = 2**20  # bytes: with fewer free SQLite's "disk I/O error" is a full disk, where its shared memory has no place
SAFE = ("trusted_schema = OFF", "cell_size_check = ON", "foreign_keys = ON", "synchronous = FULL")


class Index:
    """The SQLite file of a zoo.

    Args:
        folder: The folder of the zoo.

    Raises:
        CheckpointError: if it is missing, damaged, a link, of a newer version, or not the index of a zoo.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / INDEX
        self.writable = os.access(folder, os.W_OK) and (not self.path.exists() or os.access(self.path, os.W_OK))
        with self.read() as db:
            if self.writable:
                db.execute("PRAGMA journal_mode = WAL")  # a copy made by another tool may have lost it

    @classmethod
    def create(cls, folder: Path, about: Mapping[str, Any]) -> Index:
        """Make an index, unless there is one already, perhaps that of another process that was faster."""
        if not (folder / INDEX).exists():
            temporary = temporary_name(folder / f"{INDEX}.{secrets.token_hex(4)}")  # threads make one each
            try:
                _build(temporary, about)
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, folder / INDEX)  # unlike a rename it replaces nothing
            except sqlite3.Error as error:
                raise _problem(error, folder / INDEX) from error
            finally:
                for end in ("", "-wal", "-shm"):
                    temporary.with_name(f"{temporary.name}{end}").unlink(missing_ok=True)
            flush_folder(folder)
        return cls(folder)

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection that is closed afterwards; CheckpointError if the file is damaged."""
        self._check_files()
        try:
            with contextlib.closing(_connect(self._address())) as db:
                self._check_schema(db)
                yield db
        except sqlite3.Error as error:
            raise _problem(error, self.path) from error

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds off all other writers; nothing of it stays if its body raises."""
        if not self.writable:
            raise PermissionError(errno.EACCES, "the zoo cannot be written to; copy it", str(self.path))
        with self.read() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:  # Ctrl-C too: half a transaction would hold off all other writers
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def about(self) -> dict[str, Any]:
        """What the zoo is about, as it was given when the zoo was made."""
        with self.read() as db:
            size = db.execute("SELECT total(length(value)) FROM about").fetchone()[0]
            if size > LARGEST_ABOUT:
                expected, got = f"{LARGEST_ABOUT:,} characters", f"{size:,.0f}"
                raise CheckpointError("the description is too large", expected=expected, got=got, where=str(self.path))
            rows = db.execute("SELECT key, value FROM about").fetchall()
        try:
            return {key: json.loads(value) for key, value in rows}
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError("malformed description of a zoo", got=str(error), where=str(self.path)) from error

    def damages(self) -> list[str]:
        """What SQLite finds wrong with the file, a line each."""
        try:
            with self.read() as db:
                return [text for (text,) in db.execute("PRAGMA quick_check(10)") if text != "ok"]
        except CheckpointError as error:
            return [str(error)]

    def _address(self) -> str:
        """Never makes a file; a finished zoo on a read-only disk needs no lock."""
        address = self.path.absolute().as_uri()
        if self.writable:
            return f"{address}?mode=rw"
        alone = not self.path.with_name(f"{INDEX}-wal").exists()
        return f"{address}?mode=ro" + ("&immutable=1" if alone else "")

    def _check_files(self) -> None:
        """Regular files only, and no rollback journal, whose end could name a file to delete."""
        if not self.path.parent.is_dir() or not os.path.lexists(self.path):
            where = str(self.path.parent)
            raise CheckpointError("no zoo here", expected=f"a folder with {INDEX}", got=where)
        for name in (INDEX, f"{INDEX}-wal", f"{INDEX}-shm", f"{INDEX}-journal"):
            path = self.path.with_name(name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(mode) or name.endswith("-journal"):
                expected = "regular files, and no rollback journal"
                raise CheckpointError("unsafe file in a zoo", expected=expected, got=str(path))

    def _check_schema(self, db: sqlite3.Connection) -> None:
        """Before anything else is read: ours, of this version, and nothing more in it than what we put there."""
        ours, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if ours != OURS:
            raise CheckpointError("not the index of a zoo", got="another SQLite file", where=str(self.path))
        if version > VERSION:
            expected, where = f"version {VERSION} at most", str(self.path)
            raise CheckpointError(
                "a zoo of a newer gmn", expected=expected, got=str(version), where=where, hint="update gmn"
            )
        rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100").fetchall()
        if version != VERSION or len(rows) != len(SCHEMA) or dict(rows) != SCHEMA:
            raise CheckpointError("not the tables of a zoo", expected=f"version {VERSION}", where=str(self.path))


def _problem(error: sqlite3.Error, path: Path) -> GmnError | OSError:
    where, got = str(path), to_text(error)
    if "disk is full" in got or ("disk I/O error" in got and shutil.disk_usage(path.parent).free < NO_ROOM):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
    if "locked" in got:
        return GmnError("the zoo is busy", got=got, where=where, hint="other processes write to it; try again")
    return CheckpointError("cannot read the zoo's index", got=got, where=where)


def _connect(address: str) -> sqlite3.Connection:
    db = sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)
    try:
        db.text_factory = _decoded
        for pragma in SAFE:
            db.execute(f"PRAGMA {pragma}")
    except BaseException:  # Ctrl-C too: nobody else could close it
        db.close()
        raise
    return db


def _decoded(text: bytes) -> str:
    """Bytes that are no UTF-8 must not end the listing of all other rows."""
    return text.decode("utf-8", "replace")


def _build(path: Path, about: Mapping[str, Any]) -> None:
    """A whole index under a temporary name; closed, so that it is one file."""
    with contextlib.closing(sqlite3.connect(path.absolute().as_uri(), uri=True, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN")
        for statement in SCHEMA.values():
            db.execute(statement)
        db.executemany("INSERT INTO about VALUES (?, ?)", [(key, json.dumps(value)) for key, value in about.items()])
        db.execute(f"PRAGMA application_id = {OURS}")
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # closing would do it too, but says nothing when the disk is full


def zoo_path(path: Path) -> Path | None:
    """The zoo that a path means: itself, or `zoo` in a run folder; None if there is none."""
    return next((folder for folder in (path, path / "zoo") if (folder / INDEX).is_file()), None)
