"""The rows of a comparison: those that gmn has, and what a recipe may call its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar, get_args

T = TypeVar("T")
LABEL = re.compile(r"[^\W_][\w '.,+=()-]{0,39}(?<![ .])")  # it names a folder
Baseline = Literal["direct", "same-schedule", "sparse", "torch-pruning", "torch-pruning-sparse", "random"]
TITLES = ("base", "without", "same schedule", "sparse training", "torch-pruning, sparse")


def distinct(values: Sequence[T]) -> Sequence[T]:
    """Speed-ups or rows, if no two of them are written alike; ValueError otherwise.

    >>> distinct([2.0, 3.0])
    [2.0, 3.0]
    """
    texts = [value if isinstance(value, str) else f"{value:g}x" for value in values]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise ValueError(f"{twice} comes twice")
    return values


def labelled(rows: Mapping[str, T]) -> Mapping[str, T]:
    """The rows by label, if every label can name a folder and is not taken; ValueError otherwise.

    >>> labelled({"paper's gradient": 1})
    {"paper's gradient": 1}
    """
    taken = {name.casefold() for name in ("metanetwork", *get_args(Baseline), *TITLES)}
    for label in rows:
        if not LABEL.fullmatch(label):
            raise ValueError(f"a label is letters, digits and ' .,+=()-_, at most 40 in all; got {label!r}")
        if label.casefold() in taken or label.casefold().startswith("with "):  # what curves call rewritten networks
            raise ValueError(f"another row has the label {label!r} already")
        taken.add(label.casefold())
    return rows
