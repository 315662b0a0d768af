"""Changed files of every kind: the short part of `make soak`.

* each case ends in a GmnError of one line or in a valid result: no other exception, no hang, no 2 GB
* the watcher finds a case that raises, hangs or kills its process, and goes on with the next
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import mutate
import soak
from kinds import KINDS

CASES = 4


def test_every_case_ends_in_an_error_of_ours_or_a_valid_result() -> None:
    outcomes = soak.soak(list(KINDS), CASES, seed=1)
    assert {own.cases for own in outcomes.values()} == {CASES}
    assert {own.kind: own.found for own in outcomes.values() if own.found} == {}
    assert max(own.peak_mb for own in outcomes.values()) < soak.MEMORY / 2**20
    assert all(own.errors for own in outcomes.values())
    assert sum(own.valid for own in outcomes.values()) > CASES // 2  # not all of them end in the parser


def test_the_same_seed_gives_the_same_changes(tmp_path: Path) -> None:
    whole = b'{"a": [1, 2.5, "text"], "name": {"b": null}}'
    for change in (mutate.bytes_of, mutate.json_of):
        made = [[change(whole, random.Random(f"{seed}")) for seed in range(20)] for _ in range(2)]
        assert made[0] == made[1]
        assert len(set(made[0])) > 15


BAD = """
import os
from pathlib import Path
from types import SimpleNamespace

LATER, COUNT = [], Path(__file__).with_name("count")

def broken(folder, kind, rng):
    (folder / "number").write_text(COUNT.read_text() if COUNT.exists() else "0")
    COUNT.write_text(str(int((folder / "number").read_text()) + 1))

def use(folder):
    number = int((folder / "number").read_text()) if (folder / "number").exists() else 0
    if number == 1:
        raise KeyError("not ours")
    if number == 2:
        os._exit(7)
    while number == 3:
        pass

KINDS = {"bad": SimpleNamespace(make=lambda folder: None, use=use)}
"""


def test_the_watcher_finds_what_goes_wrong(tmp_path: Path) -> None:
    (tmp_path / "kinds.py").write_text(BAD)
    (own,) = soak.soak(["bad"], 5, folder=tmp_path, seconds=0.5).values()
    assert (own.cases, own.valid, own.errors) == (5, 2, 0)
    found = "\n".join(sorted(own.found))
    assert re.search(r"KeyError in the test: 'not ours' \(case 1\)", found)
    assert "case 2: ended with code 7" in found
    assert re.search(r"TimeUp .*\(case 3\)", found)
    assert "| bad | 5 | 0 | 2 | 3 |" in soak.table({"bad": own})
