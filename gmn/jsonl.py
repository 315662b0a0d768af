"""Files of JSON lines that survive a kill: lines are appended, and half a line at the end is ignored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmn.distributed import leader_writes
from gmn.errors import naming


@leader_writes
def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add one line and flush it to disk; half a line that a killed process left is closed first.

    Raises:
        OSError: with the file's name, if the disk is full, read-only or broken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a+b", buffering=0) as file:  # one write: lines of several processes do not mix
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        line = ("\n" * torn + json.dumps(entry) + "\n").encode()
        while line:  # a disk that is nearly full takes a part
            line = line[file.write(line) :]
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a file, torn lines left out; nothing if there is no file."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the line a killed process was writing
        if isinstance(entry, dict):
            yield entry
