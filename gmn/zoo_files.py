"""The files of a zoo: one per task, written once under a name that no other file has, and never changed.

What the index says is not trusted: a file is a regular file with a plain name in the folder of the zoo.
"""

from __future__ import annotations

import os
import reprlib
import secrets
import stat
from pathlib import Path

from gmn.checkpoint import digest_of, save_bytes
from gmn.errors import CheckpointError
from gmn.processes import temporary_name
from gmn.zoo_format import Stored, encode, size_of
from gmn.zoo_task import FILE, Task, to_text


def new_name(name: str) -> str:
    """A file name that no other attempt at the task has."""
    return f"{name}.{secrets.token_hex(4)}.safetensors"


def save_task(path: str | Path, stored: Stored) -> None:
    """Write a task's file outside of any zoo, for `gmn zoo add`."""
    save_bytes(Path(path), encode(stored))


def write_pending(path: Path, content: bytes) -> Path:
    """Write and flush under a temporary name beside `path`, which says whose it is; the caller renames it."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # Ctrl-C and a full disk too: no half-written file stays
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def locate(folder: Path, file: str) -> Path:
    """The path of a row's file.

    Raises:
        CheckpointError: unless it is the plain name of a regular file, no link, in a folder that is no link.
    """
    path = folder / file
    if not FILE.fullmatch(file):
        raise CheckpointError("not the name of a task's file", got=reprlib.repr(file), where=str(folder))
    if not folder.is_dir() or folder.is_symlink():
        raise CheckpointError("no folder with the zoo's files", expected="a folder, no link", got=str(folder))
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise CheckpointError("the task's file is missing", got=str(path)) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError("the task's file is a link or no file", expected="a regular file", got=str(path))
    return path


def check_file(path: Path, task: Task) -> None:
    """CheckpointError if a file is too large, or has not the size or not the checksum that the index says."""
    try:
        size = size_of(path)
        found = digest_of(path) if size == task.bytes else task.sha256
    except OSError as error:  # no permission, a bad disk
        raise CheckpointError("cannot read the file", got=to_text(error), where=str(path)) from error
    if size != task.bytes:
        expected, got = f"{task.bytes:,} bytes", f"{size:,}"
        raise CheckpointError("the file has another size", expected=expected, got=got, where=str(path))
    if found != task.sha256:
        expected, got = f"{task.sha256[:16]}...", f"{found[:16]}..."
        raise CheckpointError("the file has another checksum", expected=expected, got=got, where=str(path))
