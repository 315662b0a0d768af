"""The networks of a run folder, the one it began with and those that its rows ended with, and networks to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gmn.api import NETWORK
from gmn.batches import tensors_in
from gmn.errors import CheckpointError, GmnError
from gmn.names import refuse_unknown
from gmn.pipeline import network_digest, voters
from gmn.run import is_run, load_report, open_run, reading
from gmn.subject import Choices, Named, named
from gmn.zoo_index import zoo_path


def finished(folder: Path) -> dict[Path, dict[str, Any]]:
    """Folder of every pruned network that a finished run kept, and what its report says of it.

    Raises:
        CheckpointError: if the run is not finished, or kept none.
    """
    with reading(open_run(folder) / "report.json"):
        report = load_report(folder)
        if report.get("method") == "matrix":
            expected, got = f"one of the runs in {folder / 'entries'} and {folder / 'cells'}", str(folder)
            raise CheckpointError("a matrix keeps its networks in other runs", expected=expected, got=got)
        results = [(f"{result['row']}-seed{result['seed']}", result) for result in report["results"]]
    found = {folder / "models" / name: result for name, result in results if name == Path(name).name}
    kept = {path: result for path, result in found.items() if (path / "model.json").is_file()}
    if not kept:
        hint = "a vote run keeps tasks; prune for one of them: gmn prune RECIPE --meta RUN"
        raise CheckpointError("the run kept no pruned network", got=str(folder), hint=hint)
    return kept


def best(folder: Path, row: str | None = None) -> Path:
    """The folder of the network with the best validation accuracy, of all rows or of one; the first of equals.

    Raises:
        GmnError: if there is no such row.
    """
    kept = finished(folder)
    if row is not None:
        refuse_unknown("row", row, dict.fromkeys(str(result["row"]) for result in kept.values()))
    mine = [path for path, result in kept.items() if row in (None, result["row"])]
    with reading(folder / "report.json"):
        return max(mine, key=lambda path: float(kept[path]["validation_accuracy"]))


def side_by_side(folder: Path) -> dict[str, Path]:
    """Names and folders of the network that a run began with, and of the first seed of each of its rows.

    Raises:
        CheckpointError: if one is missing.
    """
    found = {"base": _base(folder)}
    for path, result in finished(folder).items():
        found.setdefault(str(result["row"]), path)
    return found


def to_compare(names: Sequence[str], choices: Choices) -> dict[str, Named]:
    """The networks that the user names, by the names that a table gives them; of a run folder see `side_by_side`.

    The options that build a network are for those without a folder.

    Raises:
        GmnError: if one is not found, there are fewer than two, or they take different inputs.
    """
    places = {key: place for name in names for key, place in _places(name, alone=len(names) == 1).items()}
    if len(places) < 2:
        raise GmnError("nothing to compare with", expected="two networks or a run folder", got=", ".join(places))
    folders = choices
    if any(not place.is_dir() for place in places.values()):
        folders = dataclasses.replace(choices, classes=None, options=())
    found = {key: named(str(path), folders if path.is_dir() else choices) for key, path in places.items()}
    _check_inputs({key: [list(tensor.shape) for tensor in tensors_in(own.example)] for key, own in found.items()})
    return found


def _places(name: str, *, alone: bool) -> dict[str, Path]:
    if not is_run(Path(name)):
        return {name: Path(name)}
    return {key if alone else f"{name}: {key}": path for key, path in side_by_side(Path(name)).items()}


def _check_inputs(shapes: dict[str, list[list[int]]]) -> None:
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            expected, hint = f"{shapes[first]} as of {first}", "--input 3,32,32"
            raise GmnError("networks of different inputs", expected=expected, got=str(shape), where=name, hint=hint)


def _base(folder: Path) -> Path:
    base = next((path for path in _bases(folder) if (path / "model.json").is_file()), None)
    if base is None:
        raise CheckpointError("the network that the run began with is not there", where=str(folder))
    return base


def _bases(folder: Path) -> Iterator[Path]:
    yield folder / "models" / "base"
    found = voters(folder)
    zoo = found[0] if found else zoo_path(folder)
    if zoo is not None and (found is None or network_digest(zoo) == found[1]):
        yield zoo / NETWORK
