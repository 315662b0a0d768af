"""What a run leaves that must not depend on whether it was killed, and what it must not leave at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gmn.checkpoint import load_json, load_tensors
from gmn.jsonl import read_lines
from gmn.state_dict import checksum
from gmn.zoo import Zoo

RANDOM = re.compile(r"\.[0-9a-f]{8}\.safetensors")  # in the names of a zoo's files
TIMES = ("time", "latency", "created", "sha256", "bytes", "file")


def without_times(value: Any) -> Any:
    """JSON without clocks, and without what a zoo says of its files, whose headers have the time."""
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in TIMES}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def log_of(path: Path) -> list[str]:
    """The lines of a log in an order of their own, without times and costs; what is there twice stays so."""
    lines = [entry for entry in read_lines(path) if entry["event"] != "cost"]
    return sorted(json.dumps(without_times(entry), sort_keys=True) for entry in lines)


def logs_of(folder: Path) -> dict[str, list[str]]:
    """The log of a run, and those of the runs in it."""
    return {str(path.relative_to(folder)): log_of(path) for path in folder.rglob("metrics.jsonl")}


def torn_in(folder: Path) -> int:
    """How many lines of all logs and tables are none that gmn would have written whole."""
    paths = list(folder.rglob("*.jsonl"))
    lines = sum(bool(line.strip()) for path in paths for line in path.read_bytes().splitlines())
    return lines - sum(len(list(read_lines(path))) for path in paths)


def tensors_of(folder: Path) -> dict[str, str]:
    """A checksum of every file of tensors outside the zoo."""
    paths = [path for path in sorted(folder.rglob("*.safetensors")) if "tasks" not in path.parts]
    return {str(path.relative_to(folder)): checksum(*load_tensors(path)) for path in paths}


def files_of(folder: Path) -> set[str]:
    """The names of all files but the random part of those of a zoo, and SQLite's own."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {RANDOM.sub(".safetensors", name) for name in names if not name.endswith(("-wal", "-shm"))}


def evidence(folder: Path) -> dict[str, Any]:
    """Everything that has to be the same."""
    found = {
        "report": without_times(load_json(folder / "report.json")),
        "logs": logs_of(folder),
        "torn": torn_in(folder),
        "tensors": tensors_of(folder),
        "files": files_of(folder),
    }
    if (folder / "zoo").is_dir():
        zoo = Zoo.open(folder / "zoo")
        found["zoo"] = {
            task.name: (task.status, task.metrics, zoo.masks([task.name]).tolist(), checksum(zoo.load(task.name)[2]))
            for task in zoo.tasks()
        }
        found["problems"] = [str(problem) for problem in zoo.verify()]
    return found
