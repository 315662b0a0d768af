"""Who works on which task of a zoo, so that processes share the work and a killed one loses only its own task.

A claim names the process by its id and the moment it started, and the machine, as a digest, by its name and the
space that process ids are counted in: inside it one can tell whether the process still lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

DEAD, UNKNOWN = 0, 1  # when a process started


def claim(db: sqlite3.Connection, name: str, worker: str) -> None:
    """Note that this process works on a task that nobody else works on."""
    pid = os.getpid()
    query = "INSERT INTO claims SELECT id, ?, ?, ?, ?, ? FROM tasks WHERE name = ?"
    db.execute(query, [worker, pid, started(pid), machine(), time.time(), name])


def unclaimed(db: sqlite3.Connection) -> Iterator[str]:
    """The planned tasks that nobody works on, in the order in which they were planned."""
    query = "SELECT name FROM tasks WHERE status = 'planned' AND id NOT IN (SELECT task FROM claims) ORDER BY id"
    return (name for (name,) in db.execute(query))


def release(db: sqlite3.Connection, name: str) -> None:
    """Nobody works on a task any more."""
    db.execute("DELETE FROM claims WHERE task IN (SELECT id FROM tasks WHERE name = ?)", [name])


def release_dead(db: sqlite3.Connection) -> int:
    """Free the tasks of processes that have died on this machine; how many."""
    query = "SELECT task, pid, started FROM claims WHERE machine = ?"
    dead = [[task] for task, pid, since in db.execute(query, [machine()]).fetchall() if not is_alive(pid, since)]
    db.executemany("DELETE FROM claims WHERE task = ?", dead)
    return len(dead)


def release_old(db: sqlite3.Connection, seconds: float) -> int:
    """Free the tasks that were claimed so long ago, whoever works on them; how many."""
    return db.execute("DELETE FROM claims WHERE since <= ?", [time.time() - seconds]).rowcount


def is_alive(pid: object, since: object = None) -> bool:
    """Whether a process of this machine lives; with `since`, whether it is still the one that started then."""
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    now = started(pid)
    return now == UNKNOWN or (now != DEAD and since in (None, now))


def started(pid: int) -> int:
    """When a process of this machine started, in whatever unit; `DEAD` if it has ended, `UNKNOWN` if it hides."""
    with contextlib.suppress(OSError, LookupError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return DEAD if fields[0] in ("Z", "X") else int(fields[19])  # Z: killed, and not yet waited for
    if os.name == "posix":  # elsewhere os.kill would kill
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return DEAD
    return UNKNOWN


@cache
def machine() -> str:
    """A digest of what process ids are unique in."""
    space = ""
    with contextlib.suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:16]
