"""Work in a run folder that is done elsewhere: the files it needs travel to a copy of the folder, what it makes back.

Workers share no disk with the caller. A job names what it reads and makes, files or folders, relative to the run
folder; nothing else travels. Logs only grow: their new lines are added to the caller's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

from gmn.checkpoint import save_bytes
from gmn.engine import Engine
from gmn.errors import GmnError
from gmn.jsonl import append_line, entries
from gmn.processes import is_left_over
from gmn.progress import say, track
from gmn.settings import Recipe

Job = TypeVar("Job")
Files = dict[str, bytes]
"""Contents by their path in the run folder."""
Changes = dict[str, bytes | None]
"""New contents, None where a file is gone; of a log, the new lines."""

LOG = ".jsonl"
OUTSIDE = "outside"
"""Folder of a copy, with the files that recipes take weights from."""


@dataclass(frozen=True)
class Parcel(Generic[Job]):
    """A job with its paths, and the files that are there."""

    job: Job
    paths: Sequence[str]
    files: Files


def share(
    engine: Engine,
    work: Callable[[Path, Job], object],
    folder: Path,
    jobs: Mapping[Job, Sequence[str]],
    title: str,
    *,
    outside: Files | None = None,
    in_place: bool = False,
) -> None:
    """Let an engine do jobs that know nothing of each other; what each makes is in the folder as soon as it is done.

    Args:
        engine: Whose workers may be on other machines.
        work: Gets the folder of a copy, and a job.
        folder: The run folder.
        jobs: With the paths that each needs or makes.
        title: Of the progress bar.
        outside: Further files that all of them need.
        in_place: Whether each works in the folder itself, where that is possible: then what is finished of a job stays
            when all is killed. Its paths must be its own.

    Raises:
        GmnError: the first of a job, when all others are done.
    """
    failed: list[GmnError] = []
    where = _at_home(folder, outside or {}) if in_place and engine.sees_disk else nullcontext()
    with where as home, track(title, len(jobs)) as advance:
        do = partial(in_copy, work, outside or {}) if home is None else partial(_in_place, work, home)
        parcels = (Parcel(job, paths, pack(folder, paths) if home is None else {}) for job, paths in jobs.items())
        for parcel, found in engine.map(do, parcels):
            if isinstance(found, GmnError):
                say(f"{_name(parcel.job)}: {found}")
                failed.append(found)
            else:
                apply(folder, found)
            advance(_name(parcel.job))
    if failed:
        raise failed[0]


def _name(job: object) -> str:
    return " ".join(str(part) for part in job) if isinstance(job, tuple) else str(job)


@contextmanager
def _at_home(folder: Path, outside: Files) -> Iterator[Path]:
    """The folder with the files from outside of it, which are gone at the end."""
    home = folder.absolute()  # workers may sit elsewhere
    _write(home, outside)
    try:
        yield home
    finally:
        shutil.rmtree(home / OUTSIDE, ignore_errors=True)


def _in_place(work: Callable[[Path, Job], object], home: Path, parcel: Parcel[Job]) -> Changes:
    work(home, parcel.job)
    return {}


def in_copy(work: Callable[[Path, Job], object], outside: Files, parcel: Parcel[Job]) -> Changes:
    """Do a job in a copy of the folder, with files from outside of it; what then differs."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, outside | parcel.files)
        work(folder, parcel.job)
        made = pack(folder, parcel.paths)
    changes: Changes = {path: made.get(path) for path in parcel.files.keys() | made.keys()}
    for path in (path for path in made if path.endswith(LOG)):
        changes[path] = made[path][len(parcel.files.get(path, b"")) :]
    return {path: content for path, content in changes.items() if content != parcel.files.get(path)}


def pack(folder: Path, paths: Sequence[str]) -> Files:
    """The files of that name, and all in folders of that name, that are there; none that somebody is writing."""
    named = [folder / path for path in paths]
    found = [inner for path in named for inner in (path.rglob("*") if path.is_dir() else [path])]
    whole = [path for path in found if path.is_file() and not is_left_over(path.name)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in whole}


def apply(folder: Path, changes: Changes) -> None:
    """Make a folder what the copy became."""
    _write(folder, {path: content for path, content in changes.items() if content is not None})
    for path in (path for path, content in changes.items() if content is None):
        (folder / path).unlink(missing_ok=True)


def _write(folder: Path, files: Files) -> None:
    for path in sorted(files, key=_order):
        target = folder / path
        if path.endswith(LOG) and target.is_file():
            for entry in entries(files[path]):  # the first line is empty where the worker closed a torn one
                append_line(target, entry)
        else:
            save_bytes(target, files[path])


def _order(path: str) -> tuple[int, str]:
    """A recipe makes a folder a run's, `model.json` says that a network is whole, a report that a run is."""
    return {"recipe.yaml": 0, "model.json": 2, "report.json": 3}.get(Path(path).name, 1), path


def weights_of(recipe: Recipe, label: str = "") -> Files:
    """The file that a recipe takes its network's weights from, if it does; to be sent along."""
    path = recipe.network.weights
    return {} if path is None else {str(_place(path, label)): Path(path).read_bytes()}


def with_weights_in(folder: Path, recipe: Recipe, label: str = "") -> Recipe:
    """The recipe, taking the weights from the copy."""
    path = recipe.network.weights
    if path is None:
        return recipe
    network = recipe.network.model_copy(update={"weights": folder / _place(path, label)})
    return recipe.model_copy(update={"network": network})


def _place(path: str | Path, label: str) -> Path:
    return Path(OUTSIDE, label, Path(path).name)
