"""One mutator for files of every kind: it changes bytes, texts, or trees of JSON, the same for the same seed.

A change of a tree keeps the file readable, so that it reaches what is behind the parser.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 255, 256, 65_536, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    "",
    "a" * 10_000,
    "../../x",
    "/etc/passwd",
    "os:system",
    "os:",
    "\x1b[2J",
    "\x00",
    "\ud800",
    "é",
    "[/b]",
    "1e999",
    "null",
)
NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?")
WORD = re.compile(rb"[A-Za-z_]{3,}")


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    tree: Any = []
    for _ in range(depth):
        tree = [tree]
    return tree


# -- bytes -------------------------------------------------------------------------------------------------------------


def bytes_of(content: bytes, rng: random.Random) -> bytes:
    """Between one and four small changes anywhere; half of the time the length stays."""
    if rng.random() < 0.5:
        return _flipped(content, rng)
    for _ in range(rng.randint(1, 4)):
        content = rng.choice((_flipped, _cut, _repeated, _inserted, _numbered, _renamed))(content, rng)
    return content


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 2, 8, 100, len(content))))


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 32)) if content else 0):
        # headers are at the front, and small: half of the changes go there
        place = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 300))
        changed[place] = rng.choice((0, 255, changed[place] ^ 1 << rng.randrange(8)))
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    start, end = _span(content, rng)
    return content[:start] + content[end:]


def _repeated(content: bytes, rng: random.Random) -> bytes:
    start, end = _span(content, rng)
    return content[:end] + content[start:end] * rng.choice((1, 2, 50)) + content[end:]


def _inserted(content: bytes, rng: random.Random) -> bytes:
    start, _ = _span(content, rng)
    text = rng.choice(
        (rng.randbytes(8), b"[" * 5000, b'{"a":' * 5000, *(text.encode("utf-8", "replace") for text in TEXTS))
    )
    return content[:start] + text + content[start:]


def _numbered(content: bytes, rng: random.Random) -> bytes:
    found = list(NUMBER.finditer(content))
    return _exchanged(content, rng.choice(found), str(rng.choice(NUMBERS)).encode()) if found else content


def _renamed(content: bytes, rng: random.Random) -> bytes:
    found = list(WORD.finditer(content))
    if not found:
        return content
    other = rng.choice((rng.choice(found)[0], b"true", b"null", b"os:system"))
    return _exchanged(content, rng.choice(found), other)


def _exchanged(content: bytes, found: re.Match[bytes], other: bytes) -> bytes:
    return content[: found.start()] + other + content[found.end() :]


# -- trees of JSON -----------------------------------------------------------------------------------------------------


def tree_of(tree: Any, rng: random.Random) -> Any:
    """One to three values of a tree exchanged, for one of the same type or not, taken away, doubled, or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        owner, key = rng.choice(places)
        _change(owner, key, places, rng)
    return tree


def _places(tree: Any) -> Any:
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _change(owner: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    other_owner, other_key = rng.choice(places)
    values = (None, True, [], {}, nested(100), rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS))
    how = rng.randrange(10)
    if how >= 6:
        owner[key] = _alike(owner[key], rng)
    elif how <= 2:
        owner[key] = rng.choice(values)
    elif how == 3:
        owner[key] = copy.deepcopy(other_owner[other_key])
    elif how == 4:
        del owner[key]
    elif isinstance(owner, dict):
        owner[rng.choice((str(other_key), *TEXTS))] = owner.pop(key)
    else:
        owner.extend(copy.deepcopy(owner[key : key + 1]) * rng.choice((1, 20)))


def _alike(value: Any, rng: random.Random) -> Any:
    """Another value of the same type, often a near one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, value * 2, -value, rng.choice(NUMBERS)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + value[-1:], value.upper(), rng.choice(TEXTS)))
    return value[::-1] if isinstance(value, list) else value


def json_of(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with a changed tree; NaN and lone surrogates are written as Python writes them."""
    return json.dumps(tree_of(json.loads(content), rng)).encode("utf-8", "surrogatepass")


def safetensors_of(content: bytes, rng: random.Random, inside: str | None = None) -> bytes:
    """A safetensors file with a changed header, or a change of the JSON text `inside` its metadata."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if inside is not None:
        header["__metadata__"][inside] = json_of(header["__metadata__"][inside].encode(), rng).decode(
            "utf-8", "replace"
        )
    else:
        header = tree_of(header, rng)
    text = json.dumps(header).encode("utf-8", "replace")
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63, 2**64 - 1, len(text) + 1))
    return length.to_bytes(8, "little") + text + content[end:]


# -- other forms -------------------------------------------------------------------------------------------------------


def yaml_of(content: bytes, rng: random.Random) -> bytes:
    """A YAML file with a bomb, deep nesting, tags, or other bytes."""
    lines = content.decode().splitlines()
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    more = rng.choice(
        (
            bomb,
            [f"seed: {'[' * 5000}"],
            ["a: " + "{a: " * 300],
            ["name: !!python/object/apply:os.system [echo]"],
            ["loop: &l [*l]", "again: &m {m: *m}"],
            ["network: &n {<<: *n, name: x}"],
            ["- " * 2000 + "x"],
            [f"seed: {'9' * 6000}"],
            ["base: my.yaml"],
            ["? {a: b}\n: c", "? [1]\n: d"],
            ["data: {<<: [{name: digits}, {size: 8}]}"],
            ["seed: 2020-13-45", "seed: 0o9", "name: !!binary ====", "device: !!timestamp x"],
            ["report: {speed_ups: [.inf, -.inf, .nan]}"],
        )
    )
    place = rng.choice((0, len(lines), rng.randrange(len(lines) + 1)))
    return "\n".join([*lines[:place], *more, *lines[place:]]).encode()


def zip_of(content: bytes, rng: random.Random) -> bytes:
    """A zip, such as `torch.save` writes: one record changed, perhaps all compressed, or a record of zeros added."""
    target = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w", kind) as made:
        names = source.namelist()
        chosen = rng.choice([name for name in names if name.endswith(("data.pkl", "version", "byteorder"))] + names)
        for name in names:
            data = source.read(name)
            made.writestr(name, bytes_of(data, rng) if name == chosen else data)
        if kind == zipfile.ZIP_DEFLATED:
            made.writestr("archive/data/more", bytes(2**24))
    return target.getvalue()


def index_of(path: Path, rng: random.Random) -> None:
    """An SQLite file: one value of one row, or of all, exchanged; or a statement of a stranger."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        table = rng.choice(("about", "tasks", "tasks", "tasks"))
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        values = [
            *(n for n in NUMBERS if not isinstance(n, int) or abs(n) < 2**63),
            *(t.replace("\ud800", "?") for t in TEXTS),
        ]
        values += [b"\xff", bytes(10**6), None, json.dumps(nested(100)), "[" * 50_000, '{"a": NaN}', "1" * 2_000_000]
        statement = rng.choice(
            (
                *(f"UPDATE {table} SET {rng.choice(columns)} = ?",) * 12,
                *(f"UPDATE {table} SET {rng.choice(columns)} = ? WHERE rowid = 1",) * 12,
                f"DELETE FROM {table} WHERE ? IS NOT 0.25 AND rowid % 2",
                f"ALTER TABLE {table} ADD COLUMN more",
                f"CREATE VIEW v AS SELECT * FROM {table}",
                f"CREATE TRIGGER t AFTER UPDATE ON {table} BEGIN DELETE FROM claims; END",
                f"PRAGMA user_version = {rng.choice((0, 2, 2**31 - 1))}",
            )
        )
        db.execute(statement, [rng.choice(values)] * statement.count("?"))
    except sqlite3.Error:
        pass  # the database refuses some of them itself
    finally:
        db.close()
