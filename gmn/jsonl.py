"""Files of JSON lines that survive a kill: lines are appended, and half a line at the end is ignored.

What a command goes on with may come from a stranger: `checked` compares the fields that are read with their types.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gmn.distributed import leader_writes
from gmn.errors import CheckpointError, naming, size_within

LARGEST = 100_000_000  # bytes


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
    """The entries of a file, torn lines left out; nothing if there is no file.

    Raises:
        CheckpointError: if the file has more than 100 MB.
    """
    if path.is_file():
        refuse_large(path)
        yield from entries(path.read_bytes())


class Tail:
    """What was added to a file of lines since the last look; other processes may append to it too.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The entries since the last call; of a line without an end, which may yet grow, again at the next.

        Raises:
            CheckpointError: if the file has more than 100 MB.
        """
        if not self.path.is_file():
            return
        refuse_large(self.path)
        with self.path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        self._read += content.rfind(b"\n") + 1
        yield from entries(content)


def entries(lines: bytes) -> Iterator[dict[str, Any]]:
    r"""What lines say, torn and empty ones left out.

    >>> list(entries(b'{"epo\n\n{"epoch": 2}\n'))
    [{'epoch': 2}]
    """
    for line in lines.decode(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the line a killed process was writing
        if isinstance(entry, dict):
            yield entry


def refuse_large(path: Path) -> None:
    """CheckpointError if a file of JSON has more than 100 MB; OSError if there is none."""
    size_within(path, LARGEST)


def checked(content: Any, fields: Mapping[str, type], where: Path) -> dict[str, Any]:
    """A mapping that has all these fields, each of its type; `float` is any finite number.

    Raises:
        CheckpointError: naming the field.

    >>> checked({"epoch": 3, "accuracy": True}, {"epoch": int, "accuracy": float}, Path("metrics.jsonl"))
    Traceback (most recent call last):
    gmn.errors.CheckpointError: malformed content: expected accuracy: float; got True; in metrics.jsonl
    """
    if not isinstance(content, dict):
        raise CheckpointError("malformed content", expected="a mapping", got=reprlib.repr(content), where=str(where))
    for name, kind in fields.items():
        if not _is(value := content.get(name), kind):
            expected, got = f"{name}: {kind.__name__}", reprlib.repr(value)
            raise CheckpointError("malformed content", expected=expected, got=got, where=str(where))
    return content


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300 and not math.isnan(value)  # type: ignore[arg-type]
    return type(value) is kind and (kind is not str or str(value).isprintable())
