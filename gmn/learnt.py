"""Metanetworks that a run takes from elsewhere: found before anything is trained, and kept in the run's own folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from gmn.api import metanetwork_path
from gmn.builder import Layout
from gmn.checkpoint import load_metanetwork
from gmn.errors import CheckpointError, within
from gmn.metanetwork import MetaNetwork
from gmn.run import METANETWORK_FILE, Run, is_run, reading
from gmn.run_cost import LEARNT, METANETWORK, meta_training
from gmn.settings import Recipe

__all__ = ["METANETWORK", "adopt", "further", "named"]

Learnt = tuple[MetaNetwork, Layout]
"""A metanetwork, and how networks become graphs for it."""


def further(recipe: Recipe, run: Run) -> dict[str, Learnt]:
    """The metanetworks of the recipe's further rows, by label; a resumed run goes on with its own copies.

    Raises:
        CheckpointError: if one is not found or cannot be read, or `overwrite` would delete it.
    """
    found: dict[str, Learnt] = {}
    for label, path in recipe.report.metanetworks.items():
        with named(label):
            metanetwork, layout, _ = load_metanetwork(_source(run, label, path))
            found[label] = metanetwork, layout
    return found


def adopt(run: Run, row: str, path: Path) -> None:
    """Keep a copy of a row's metanetwork, and note where it came from and what it cost there.

    Raises:
        GmnError: if the run was begun with another one.
    """
    source = _source(run, row, path)
    run.adopt(source, _place(row))
    run.recorded(LEARNT, {"row": row}, lambda: {"from": str(path), "parts": _costs(source, run.folder)})


def named(label: str) -> AbstractContextManager[None]:
    """Errors inside name the recipe's further row."""
    return within(f"report.metanetworks, {label!r}")


def _costs(metanetwork: Path, mine: Path) -> dict[str, dict[str, float]]:
    """Of the run that the file lies in, itself or in its checkpoints; nothing if it lies in none, or in this one."""
    origin = next((folder for folder in metanetwork.resolve().parents[:2] if is_run(folder)), None)
    if origin is None or origin == mine.resolve():
        return {}
    with reading(origin / "metrics.jsonl"):
        return {name: vars(spent) for name, spent in meta_training(origin).items()}


def _source(run: Run, row: str, path: Path) -> Path:
    """The run's own copy of a further row's metanetwork, or else where the user says."""
    mine = run.folder / _place(row)
    if row != METANETWORK and mine.is_file() and not run.replaces:
        return mine
    source = metanetwork_path(path)
    if run.replaces and source.resolve().is_relative_to(run.folder.resolve()):
        hint = "give another folder with --run"
        raise CheckpointError("it lies in the run folder that is to be replaced", got=str(path), hint=hint)
    return source


def _place(row: str) -> str:
    return METANETWORK_FILE if row == METANETWORK else f"metanetworks/{row}.safetensors"
