"""How whole files are changed, and what a kind of files is; `kinds.py` and `resumed.py` have them."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mutate
import yaml
from seal import seal

from gmn.errors import GmnError

Change = Callable[[Path, random.Random], None]


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        make: Writes whole files into an empty folder.
        changes: What is done to one of them, by the end of its name; each is as likely as the others.
        use: Reads the folder; ends in a GmnError or in something valid.
        share: Of the cases that are asked for, where one takes long.
    """

    make: Callable[[Path], None]
    changes: tuple[tuple[str, Change], ...]
    use: Callable[[Path], object]
    share: float = 1.0


def written(change: Callable[[bytes, random.Random], bytes]) -> Change:
    """A change of a file's content."""

    def apply(path: Path, rng: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), rng))

    return apply


def sealed(change: Change) -> Change:
    """The same change, with the checksum that then belongs to it wherever there still is one."""

    def apply(path: Path, rng: random.Random) -> None:
        change(path, rng)
        with contextlib.suppress(Exception):
            seal(path)

    return apply


def inside(field: str) -> Change:
    return written(lambda content, rng: mutate.safetensors_of(content, rng, field))


def tree_of_yaml(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutate.tree_of(yaml.safe_load(content), rng), indent=1).encode("utf-8", "replace")  # YAML too


BYTES, JSON, HEADER = written(mutate.bytes_of), written(mutate.json_of), written(mutate.safetensors_of)


@contextlib.contextmanager
def several() -> Iterator[None]:
    """The other files are read too; the error is kept for the end."""
    try:
        yield
    except GmnError as error:
        LATER.append(error)


LATER: list[GmnError] = []


def one_json_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    lines[number] = json_lines(lines[number], rng) + b"\n"
    return b"".join(lines)


def json_lines(content: bytes, rng: random.Random) -> bytes:
    lines = [json.dumps(mutate.tree_of(json.loads(line), rng)) for line in content.splitlines()]
    return "\n".join(lines).encode("utf-8", "replace")
