"""Processes that live or have died, and the temporary files that say whose they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from functools import cache
from pathlib import Path

DEAD, UNKNOWN = 0, 1  # when a process started
TEMPORARY = re.compile(r"\..*?\.(?:([0-9a-f]{16})\.)?(\d{1,10})\.tmp(?:-wal|-shm|-journal)?")
"""Names of files that are being written, with the machine and the process; those at the end are SQLite's."""


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


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f".{path.name}.{machine()}.{os.getpid()}.tmp")


def is_left_over(name: str) -> bool:
    """Whether a file's name is that of a temporary file of a process of this machine that has died.

    >>> is_left_over(temporary_name(Path("a.json")).name), is_left_over("a.json")
    (False, False)
    """
    found = TEMPORARY.fullmatch(name)
    return found is not None and found[1] in (None, machine()) and not is_alive(int(found[2]))


def sweep(folder: Path) -> int:
    """Delete the temporary files that killed processes of this machine left in a folder; how many."""
    count = 0
    for place, _, names in os.walk(folder):  # links are not followed
        for name in filter(is_left_over, names):
            (Path(place) / name).unlink(missing_ok=True)
            count += 1
    return count
