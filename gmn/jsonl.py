"""Files of JSON lines that survive a kill: lines are appended, and half a line at the end is ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add one line; half a line that a killed process left is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(entry) + "\n")


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
