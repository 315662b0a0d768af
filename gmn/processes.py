"""Processes that live or have died, and the temporary files that say whose they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import time
import uuid
from functools import cache
from pathlib import Path

DEAD, UNKNOWN = 0, 1  # when a process started
DAY = 86_400  # seconds
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


BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Linux draws it anew at every start."""


@cache
def machine() -> str:
    """A digest of what process ids are unique in: a start of a machine, and there a container.

    Names do not tell machines apart: two may both be `localhost`, and share a disk.
    """
    space, start = "", f"{uuid.getnode():x}"
    with contextlib.suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    with contextlib.suppress(OSError):
        start = BOOT.read_text().strip()
    return hashlib.sha256(f"{socket.gethostname()} {space} {start}".encode()).hexdigest()[:16]


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
    """Delete the temporary files that killed processes of this machine left in a folder; how many.

    Those of other machines, such as this one before it was started again, go when nobody has written them for a day.
    """
    count = 0
    for place, _, names in os.walk(folder):  # links are not followed
        for path in (Path(place) / name for name in names):
            if is_left_over(path.name) or _is_forgotten(path):
                path.unlink(missing_ok=True)
                count += 1
    return count


def _is_forgotten(path: Path) -> bool:
    found = TEMPORARY.fullmatch(path.name)
    if found is None or found[1] in (None, machine()):
        return False
    try:
        return time.time() - path.lstat().st_mtime > DAY
    except FileNotFoundError:  # another process sweeps
        return False
