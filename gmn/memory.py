"""The memory of this process and of the machine, as the system tells it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from gmn.errors import size_within

UNKNOWN = 64 * 2**10
"""The memory, in MB, of a machine that does not say how much it has."""


def machine_memory() -> float | None:
    """The memory of the machine in MB; None where the system does not say."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def refuse_too_large(path: Path) -> None:
    """CheckpointError if a file of tensors cannot be read here: it takes no disk to claim any size, with a hole.

    Half of the machine's memory is the bound, since a network and the tensors it is filled with are there together.
    """
    most = int((machine_memory() or UNKNOWN) * 2**20) // 2
    size_within(path, most, for_whom=" for this machine", since=", half of the memory")


def memory_now() -> float:
    """What this process holds, in MB; from here on its peak counts anew where the system allows that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        if (held := _status("VmRSS")) is not None:
            return held
    return peak_memory() or 0.0


def _status(field: str) -> float | None:
    """A field of what Linux says of this process, in MB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else None


def peak_memory() -> float | None:
    """The most memory that this process has held, in MB; None where the system does not say."""
    if Path("/proc/self/status").is_file():  # the other source counts, on Linux, what the parent held
        peak = _status("VmHWM")
        return None if peak is None else round(peak, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def limit_memory(megabytes: float) -> None:
    """Let this process fail at an allocation beyond the limit, before the system kills another one."""
    with suppress(ImportError, ValueError, OSError):  # where the system knows no such limit
        import resource

        limit = int(megabytes * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
