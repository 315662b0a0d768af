"""A task of a zoo: what is known about it, and the rules for what comes out of a file.

A zoo may be a stranger's: names, numbers and texts are checked before anything is done with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from gmn.errors import CheckpointError, GmnError
from gmn.graph import GraphSpec

Split = Literal["zoo", "target"]
Status = Literal["planned", "done", "failed"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FILE = re.compile(NAME.pattern + r"\.[0-9a-f]{8}\.safetensors")
LARGEST_INTEGER = 2**63 - 1  # SQLite has no larger one
LONGEST_TEXT = 1000
MOST_NODES = 10**9
WEIGHTS = "weights_sha256"  # of the network that the tasks are cut from; zoos and files of an older gmn lack it
IDENTITY = ("fingerprint", "nodes", "network", WEIGHTS)  # what tasks must have in common to be compared


@dataclass(frozen=True)
class Task:
    """A classification task and the sub-network that was found for it.

    Attributes:
        name: Unique in a zoo; letters, digits, `.`, `_`, `-`, so that a file can have it.
        classes: Indices of the classes in the data set.
        class_names: Their names, as many.
        split: `zoo` for tasks that vote, `target` for tasks that are held out.
        seed: Seed of its training.
        status: `planned`, `done` or `failed`.
        metrics: What was measured, such as the accuracy; finite.
        flops, parameters: Cost of the sub-network.
        created: When it was done, in seconds since 1970; 0 before.
        file, sha256, bytes: Its file, the file's checksum and size; empty before it is done.
        error: Why it failed.

    Raises:
        GmnError: naming the field, what was expected and what was found.
    """

    name: str
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    split: Split = "zoo"
    seed: int = 0
    status: Status = "planned"
    metrics: dict[str, float] = field(default_factory=dict, hash=False)
    flops: float = 0.0
    parameters: int = 0
    created: float = 0.0
    file: str = ""
    sha256: str = ""
    bytes: int = 0
    error: str = ""

    def __post_init__(self) -> None:
        _expect("name", bool(NAME.fullmatch(self.name)), "letters, digits, . _ - (100 at most)", self.name)
        sound = len(set(self.classes)) == len(self.classes) > 0 and all(map(_is_count, self.classes))
        _expect("classes", sound, "different numbers from 0 on, at least one", self.classes)
        sound = len(self.class_names) == len(self.classes) and all(map(is_text, self.class_names))
        _expect("class_names", sound, f"{len(self.classes)} printable names", self.class_names)
        _expect("split", self.split in ("zoo", "target"), "zoo or target", self.split)
        _expect("status", self.status in ("planned", "done", "failed"), "planned, done or failed", self.status)
        sound = all(is_text(key) and _is_finite(value) for key, value in self.metrics.items())
        _expect("metrics", sound, "printable names, finite numbers", self.metrics)
        self._check_facts()

    def _check_facts(self) -> None:
        for key in ("seed", "parameters", "bytes"):
            _expect(key, _is_count(getattr(self, key)), "a whole number from 0 on, below 2^63", getattr(self, key))
        for key in ("flops", "created"):
            value = getattr(self, key)
            _expect(key, _is_finite(value) and value >= 0, "a finite number from 0 on", value)
        own = bool(FILE.fullmatch(self.file)) and self.file[: -len(".01234567.safetensors")] == self.name
        needed = self.status == "done"
        _expect("file", own or (not self.file and not needed), f"{self.name}.XXXXXXXX.safetensors", self.file)
        hexadecimal = bool(re.fullmatch("[0-9a-f]{64}", self.sha256))
        _expect("sha256", hexadecimal or (not self.sha256 and not needed), "64 hexadecimal digits", self.sha256)
        _expect("error", not self.error or is_text(self.error), f"{LONGEST_TEXT} printable characters", self.error)

    @property
    def plan(self) -> dict[str, Any]:
        """What was decided about the task before it was pruned."""
        return {key: getattr(self, key) for key in ("classes", "class_names", "split", "seed")}

    @property
    def description(self) -> dict[str, Any]:
        """What its file says about it: everything that does not depend on the zoo that it lies in."""
        own = ("status", "file", "sha256", "bytes", "error")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in own}


_ADAPTER = TypeAdapter(Task)


def to_task(values: Mapping[str, Any], where: str) -> Task:
    """A task from what a file says, every type checked; CheckpointError if it is no task.

    >>> to_task({"name": "t", "classes": [3], "class_names": ["cat"], "seed": "1"}, "index.sqlite")
    Traceback (most recent call last):
    gmn.errors.CheckpointError: malformed task: seed: expected valid integer; got '1'; in index.sqlite
    """
    unknown = values.keys() - {known.name for known in dataclasses.fields(Task)}
    if unknown:
        got = reprlib.repr(sorted(unknown))
        raise CheckpointError("malformed task", expected="the fields of a task", got=got, where=where)
    try:
        return _ADAPTER.validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        expected, got = first["msg"].removeprefix("Input should be ").removeprefix("a "), reprlib.repr(first["input"])
        message = f"malformed task: {to_text('.'.join(map(str, first['loc'])))}"
        raise CheckpointError(message, expected=expected, got=got, where=where) from None
    except (TypeError, RecursionError) as error:
        raise CheckpointError("malformed task", expected="JSON", got=to_text(error), where=where) from None
    except GmnError as error:
        raise CheckpointError(f"{where}: {error}") from None


def is_text(value: object) -> bool:
    """Whether it is a short line that a terminal can print: no control characters."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()


def to_text(value: object) -> str:
    """A short line that a terminal can print.

    >>> to_text("loss is nan" + chr(27) + chr(10))
    'loss is nan'
    """
    line = "".join(character if character.isprintable() else " " for character in str(value))
    return " ".join(line.split())[:LONGEST_TEXT]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_INTEGER


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300


def _expect(key: str, sound: bool, expected: str, got: object) -> None:
    if not sound:
        raise GmnError(f"malformed task: {key}", expected=expected, got=reprlib.repr(got))


# -- the network that the tasks share ----------------------------------------------------------------------------------


def fingerprint(spec: GraphSpec) -> str:
    """The SHA-256 of a graph's structure; the same for networks that differ in their numbers only."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(spec), sort_keys=True).encode()).hexdigest()


def check_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a zoo is about, as JSON reads it back: `nodes` (N) and `fingerprint` at least; GmnError if malformed."""
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise GmnError("what a zoo is about must be JSON", got=str(error)) from error
    nodes = result.get("nodes")
    if type(nodes) is not int or not 0 < nodes <= MOST_NODES:
        got = reprlib.repr(nodes)
        raise GmnError("malformed description of a zoo: nodes", expected="number of nodes of the graph", got=got)
    if not is_text(result.get("fingerprint")):
        got, hint = reprlib.repr(result.get("fingerprint")), "see gmn.zoo.fingerprint"
        raise GmnError("malformed description of a zoo: fingerprint", expected="a text", got=got, hint=hint)
    return result


def check_same(
    message: str, expected: Mapping[str, Any], got: Mapping[str, Any], where: object, error: type[GmnError] = GmnError
) -> None:
    """An error that names the first key of `expected` whose value differs in `got`; weights only where both know them.

    >>> check_same("the task is for another network", {"nodes": 7}, {"nodes": 8}, "t.safetensors")
    Traceback (most recent call last):
    gmn.errors.GmnError: the task is for another network: expected nodes 7; got 8; in t.safetensors
    """
    for key, value in expected.items():
        if key == WEIGHTS and key not in got:
            continue
        if got.get(key) != value:
            stated, found = f"{to_text(key)} {reprlib.repr(value)}", reprlib.repr(got.get(key))
            hint = "networks of one structure, with other weights" if key == WEIGHTS else None
            raise error(message, expected=stated, got=found, where=str(where), hint=hint)
