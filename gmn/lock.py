"""One process at a time in a run folder: a lock on the folder itself, which ends with the process however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gmn.errors import GmnError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

_held: dict[tuple[int, int], int] = {}  # how often this process holds a folder, by device and inode


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs; a process may hold it several times.

    A file system without locks gives none: the block runs all the same.

    Raises:
        GmnError: if another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    status = os.fstat(descriptor)
    key = status.st_dev, status.st_ino
    try:
        if not _held.get(key):
            _take(descriptor, folder)
        _held[key] = _held.get(key, 0) + 1
        try:
            yield
        finally:
            _held[key] -= 1
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        hint = "wait for it, or end it; a vote run is shared with gmn join"
        raise GmnError("another process works in the run folder", got=str(folder), hint=hint) from error
    except OSError:  # some network file systems
        return
