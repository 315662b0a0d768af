"""Small tasks for the tests of the zoo; imported by worker processes, so it imports little."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmn.zoo import Task, Zoo

NODES = 21
ABOUT: dict[str, Any] = {"nodes": NODES, "fingerprint": "abc", "network": {"name": "cifar.resnet8"}, "ratio": 0.9}


def planned(number: int, **more: Any) -> Task:
    pair = number % 7, number % 7 + 1
    return Task(f"task-{number}", pair, tuple(f"class {c}" for c in pair), **{"seed": number, **more})


def found(number: int, nodes: int = NODES) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Mask, weights and prototypes; other ones for every number."""
    generator = torch.Generator().manual_seed(number)
    weights = {"conv.weight": torch.randn(4, 3, 3, 3, generator=generator), "steps": torch.tensor(number)}
    return torch.rand(nodes, generator=generator) > 0.5, weights, {"prototypes": torch.randn(2, 5, generator=generator)}


def filled(folder: Path, count: int = 3) -> Zoo:
    """A zoo with tasks 0 to count - 1 done."""
    zoo = Zoo.create(folder, ABOUT)
    for number in range(count):
        task = planned(number, metrics={"accuracy": 0.5 + number / 100}, flops=1e6 - number, parameters=1000)
        zoo.add(task, *found(number))
    return zoo


def path_of(zoo: Zoo, name: str) -> Path:
    return zoo.folder / "tasks" / zoo.task(name).file


def change(zoo: Zoo, statement: str, *values: object) -> None:
    """What a stranger could write into the index."""
    db = sqlite3.connect(zoo.folder / "index.sqlite")
    with db:
        db.execute(statement, values)
    db.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
