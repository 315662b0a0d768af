"""A run folder: everything a run was told, everything it measured, everything it made.

recipe.yaml        the resolved recipe          metrics.jsonl    what was measured, a line each
environment.json   versions, machine            checkpoints/     metanetworks, one per epoch
data-models/ models/                            networks, each `model.json` and `weights.safetensors`
models/first/ models/2x/                        of several speed-ups: what they share, and the further ones
also/LABEL/data-models/                         networks of other kinds that were learnt on
initial.json                                    the initial speed-up, if it was found
metanetwork.safetensors                         the chosen metanetwork
metanetworks/                                   those of further rows
under-way/                                      trainings that are not finished (`gmn.bookmark`)
report.json report.md plots/                    what `gmn report` shows
entries/ cells/                                 the runs that a transfer matrix is made of
"""

from __future__ import annotations

import filecmp
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gmn.checkpoint import load_checked, load_json, make_folder, save_bytes, save_json, save_text
from gmn.distributed import leader_writes, team
from gmn.errors import MALFORMED, CheckpointError, GmnError, one_line
from gmn.jsonl import append_line, checked, read_lines, refuse_large
from gmn.launch import processes
from gmn.lock import alone
from gmn.names import printable
from gmn.permission import allow_code
from gmn.processes import is_left_over, sweep
from gmn.progress import say

PACKAGES = ("gmn", "torch", "torchvision", "torch-geometric", "torch-pruning", "timm")
UNDER_WAY = "under-way"
METANETWORK_FILE = "metanetwork.safetensors"
READ_BACK: dict[str, dict[str, type]] = {
    "meta-train": {"epoch": int},
    "select": {"epoch": int, "validation_accuracy": float},
    "probe": {"checkpoint": int, "finetune_images": int, "accuracy": float, "pruned": float},
}
"""Events of the log that a run goes on with, the fields they must have; all others are numbers too."""


class Run:
    """A run folder; nothing is written before `start`. In a `with` statement it is let go of at the end.

    Args:
        folder: Where it is.
        recipe: Text of the resolved recipe.
        resume: Go on with what the folder holds; its recipe must be the same.
        overwrite: Delete what the folder holds, if it is a run folder.
        shared: Beside other processes, which then share the work; otherwise there is one at a time.
        visits: To look at it; should it not be finished, what is under way stays for who goes on with it.

    Raises:
        GmnError: if the folder exists and neither was asked for, or the recipe differs.
    """

    def __init__(
        self,
        folder: Path,
        recipe: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        shared: bool = False,
        visits: bool = False,
    ) -> None:
        self.folder, self.recipe, self.shared, self.visits, self._resumes = folder, recipe, shared, visits, resume
        self._held, self._known, self._started = ExitStack(), set[str](), False
        saved = folder / "recipe.yaml"
        if saved.is_file() and not overwrite:
            refuse_links(folder)
        if resume and overwrite:
            raise GmnError("--resume and --overwrite exclude each other", where=str(folder))
        if folder.exists() and not folder.is_dir():
            raise GmnError("the run folder is a file", got=str(folder), hint="give another with --run")
        self.replaces = saved.is_file() and overwrite
        if folder.exists() and not saved.is_file() and not all(is_left_over(path.name) for path in folder.iterdir()):
            hint = "give another with --run"
            raise GmnError("the folder is not a run folder, and not empty", got=str(folder), hint=hint)
        if saved.is_file() and not resume and not overwrite:
            hint = "go on with --resume, replace it with --overwrite, or give another with --run"
            raise GmnError("the run folder exists", got=str(folder), hint=hint)
        if saved.is_file() and resume and not _same(saved, recipe):
            difference, hint = _first_difference(saved, recipe), "start anew with --overwrite"
            raise GmnError("cannot resume with another recipe", got=difference, where=str(folder), hint=hint)

    def start(self) -> None:
        """Make the folder, once the recipe has proved to work, and clean up after a process that was killed in it.

        Raises:
            GmnError: if another process works in it.
        """
        if not self._started:
            leader_writes(self._prepare)()
            # in all processes, or one would wait in `log` for what the first leaves out
            self._known = {_said(entry) for entry in read_lines(self.folder / "metrics.jsonl")}
            self._started = True
            self._compare_threads()

    def _prepare(self) -> None:
        make_folder(self.folder)
        if not self.shared:
            self._held.enter_context(alone(self.folder))
        if self.replaces:
            _empty(self.folder)
        if is_run(self.folder) and not self._resumes:  # made while the recipe was tried out
            hint = "go on with --resume, or give another with --run"
            raise GmnError("another process works in the run folder", got=str(self.folder), hint=hint)
        sweep(self.folder)
        if not is_run(self.folder):
            save_text(self.folder / "recipe.yaml", self.recipe)  # first: it marks the folder as a run's
        if not (self.folder / "environment.json").is_file():
            save_json(self.folder / "environment.json", environment())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.forget()
        self._held.close()

    def forget(self) -> None:
        """Delete the trainings under way: what they were part of is finished and kept. Not those of others."""
        needed = self.visits and not (self.folder / "report.json").is_file()
        if not self.shared and not needed and team().leads:
            shutil.rmtree(self.folder / UNDER_WAY, ignore_errors=True)

    def _compare_threads(self) -> None:
        path, now = self.folder / "environment.json", torch.get_num_threads()
        before = load_checked(path, {}).get("threads")
        if type(before) is int and before != now:
            say(f"warning: the run was begun with {before} threads and goes on with {now}: its last digits may differ")

    def adopt(self, metanetwork: Path, name: str = METANETWORK_FILE) -> None:
        """Keep a copy of the metanetwork; GmnError if the run was begun with another one."""
        mine = self.folder / name
        if not mine.is_file():
            save_bytes(mine, metanetwork.read_bytes())
        elif not filecmp.cmp(mine, metanetwork, shallow=False):
            hint = "start anew with --overwrite"
            raise GmnError("cannot resume with another metanetwork", got=str(metanetwork), hint=hint)

    def log(self, event: str, **values: Any) -> None:
        """Append a line to metrics.jsonl; not what a resumed run logged before and has now done again."""
        if _said(entry := {"time": round(time.time(), 3), "event": event, **values}) not in self._known:
            append_line(self.folder / "metrics.jsonl", entry)

    def logger(self, event: str, **labels: Any) -> Callable[[dict[str, float]], None]:
        """A function that logs metrics under an event and fixed labels."""
        return lambda metrics: self.log(event, **labels, **metrics)

    def recorded(self, event: str, labels: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under an event and its labels; made and logged if nothing was."""
        for entry in self.events(event):
            if all(entry.get(key) == value for key, value in labels.items()):
                return entry
        self.log(event, **labels, **(made := make()))
        return made

    def events(self, event: str) -> Iterator[dict[str, Any]]:
        """The lines of one event; after a resume, the later line of the same epoch stands.

        Raises:
            CheckpointError: if a line is not what gmn would have written.
        """
        latest: dict[Any, dict[str, Any]] = {}
        path, fields = self.folder / "metrics.jsonl", READ_BACK.get(event)
        for number, entry in enumerate(read_lines(path)):
            if entry.get("event") != event:
                continue
            if fields is not None:
                checked(entry, {**dict.fromkeys(entry.keys() - {"event", "time"}, float), **fields}, path)
            latest[entry["epoch"] if fields and "epoch" in fields else -number] = entry
        yield from latest.values()


def _said(entry: dict[str, Any]) -> str:
    """What a line of the log says, without its time."""
    return json.dumps({key: value for key, value in entry.items() if key != "time"}, sort_keys=True)


def _empty(folder: Path) -> None:
    """Delete what a run folder holds; it is a run folder until all else is gone."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "recipe.yaml"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / "recipe.yaml").is_file()


def open_run(folder: str | Path) -> Path:
    """The folder, if it is a run folder and nothing in it leads out of it; CheckpointError otherwise."""
    folder = Path(folder)
    if not is_run(folder):
        hint = f"did you mean {Path('runs') / folder}?" if is_run(Path("runs") / folder) else None
        raise CheckpointError("not a run folder", expected="a folder with recipe.yaml", got=str(folder), hint=hint)
    refuse_links(folder)
    return folder


def one_of_its_runs(folder: Path) -> str | None:
    """Where the runs of a matrix are, as a hint; None for other folders."""
    return f"take a run of the matrix's {entries}" if (entries := folder / "entries").is_dir() else None


def refuse_links(folder: Path) -> None:
    """CheckpointError if a link leads out of a folder, or something in it is neither file nor folder.

    A run is gone on with by writing into it: through the links of a stranger's it would be elsewhere.
    """
    root = folder.resolve()
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink():
                _refuse_leaving(path, root)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise CheckpointError("neither file nor folder in a run folder", got=str(path))


def _refuse_leaving(link: Path, root: Path) -> None:
    try:
        with suppress(FileNotFoundError):
            link.stat()  # `resolve` finds circles in some versions of Python only
        inside = link.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:
        hint = "delete it, or put a file there"
        raise CheckpointError("a link that leads nowhere", got=one_line(error), hint=hint) from error
    if not inside:
        hint = "put what it leads to into the folder"
        raise CheckpointError("a link that leaves the run folder", got=str(link), hint=hint)


def load_report(folder: Path) -> dict[str, Any]:
    """The finished report of a run; CheckpointError if there is none, or it is no mapping of printable texts."""
    path = folder / "report.json"
    if not path.is_file():
        raise CheckpointError("the run has no report yet", where=str(folder), hint="go on with it: gmn ... --resume")
    with reading(path):
        report = load_json(path)
        if not isinstance(report, dict) or not printable(report):
            raise CheckpointError("malformed report", expected="a mapping, printable texts", where=str(path))
    return report


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside the `with`, content of another form than expected is a CheckpointError that names the file."""
    try:
        yield
    except MALFORMED as error:
        raise CheckpointError("malformed content", got=one_line(error), where=str(path)) from error


def environment() -> dict[str, Any]:
    """Versions and machine, without its name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }


def _same(saved: Path, recipe: str) -> bool:
    """Whether two recipes say the same; an older gmn did not spell out what is new and has its default."""
    from gmn.recipe import dump_recipe, load_recipe

    refuse_large(saved)
    if saved.read_bytes() == recipe.encode():
        return True
    try:
        with allow_code():  # it is compared, nothing else
            return dump_recipe(load_recipe(saved)) == recipe
    except GmnError:
        return False


def _first_difference(path: Path, recipe: str) -> str:
    old, new = path.read_text(encoding="utf-8", errors="replace").splitlines(), recipe.splitlines()
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    return f"'{pairs[0][1].strip()}' instead of '{pairs[0][0].strip()}'" if pairs else "other sections"
