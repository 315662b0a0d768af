"""The runs that a transfer matrix is made of: entries learn, cells are pruned with what another entry learnt.

entries/LABEL/       an ordinary run: what `gmn meta-train` makes of the entry's recipe
cells/ROW/COLUMN/    an ordinary run: what `gmn prune ROW --meta COLUMN` makes, from the network that ROW's run trained

Entries depend on nothing and cells on two entries, through files alone; what has its report is not done again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gmn.api import metanetwork_path
from gmn.away import Files, weights_of, with_weights_in
from gmn.checkpoint import load_metanetwork, save_bytes
from gmn.compare import compare
from gmn.data import Data
from gmn.job import choose_device, load
from gmn.learnt import Learnt
from gmn.meta_job import MetaJob
from gmn.progress import say
from gmn.recipe import dump_recipe
from gmn.run import METANETWORK_FILE, Run
from gmn.settings import Recipe
from gmn.settings_matrix import MatrixRecipe

WEIGHTS_FIRST = ("weights.safetensors", "model.json")  # a folder with the second is whole
BEFORE = ("initial.json", *(f"models/{name}/{file}" for name in ("base", "start") for file in WEIGHTS_FIRST))
"""Files of a run that hold its network before the recipe's pruning."""

Key = tuple[str, ...]
"""A run of a matrix: (label,) is an entry, (row, column) a cell."""
Loaded = dict[str, Data]
"""By what tells the data of two entries apart."""


class Runs:
    """The runs of a matrix in a folder; each can be made where those that it needs are.

    Args:
        recipe: What to do.
        folder: The matrix's run folder, or a copy of parts of it.
        data: What is loaded already, as `data()` returns it.
        copied: Whether the folder has its own copy of the files that recipes take weights from.
    """

    def __init__(self, recipe: MatrixRecipe, folder: Path, data: Loaded | None = None, *, copied: bool = False) -> None:
        self.recipe, self.folder, self.copied = recipe, folder, copied
        self._loaded = {} if data is None else dict(data)  # read once, whatever the number of cells

    def is_done(self, key: Key) -> bool:
        """Whether the run of an entry or a cell has what it is made for."""
        if len(key) == 2:
            return (self.folder / "cells" / key[0] / key[1] / "report.json").is_file()
        last = "report.json" if key[0] in self.recipe.networks else METANETWORK_FILE
        return (self.folder / "entries" / key[0] / last).is_file()

    def entry(self, label: str) -> Path:
        """The run folder of an entry: its metanetwork if it is a column, its comparison if it is a row."""
        recipe, folder = self.recipe.entries[label], self.folder / "entries" / label
        column, row = label in self.recipe.metanetworks, label in self.recipe.networks
        if not self.is_done((label,)):
            say(f"{label}: {' and '.join(['its metanetwork'] * column + ['its network'] * row)}")
            with Run(folder, dump_recipe(recipe), resume=True) as run:
                job = self.learner(label, run)
                if column:
                    job.learn()
                metanetwork, layout = job.select() if column else (None, job.layout)
                if row:
                    compare(job, metanetwork, layout, seen=recipe.data_models.fit is None if column else None)
        return folder

    def cell(self, row: str, column: str) -> Path:
        """The run folder of a network pruned with another entry's metanetwork; both entries must be done."""
        recipe, home, folder = self.recipe.entries[row], self.folder / "entries", self.folder / "cells" / row / column
        alone = recipe.report.model_copy(update={"baselines": [], "metanetworks": {}})  # the entry has those rows
        recipe = recipe.model_copy(update={"report": alone})
        with Run(folder, dump_recipe(recipe), resume=True) as run:
            run.start()
            run.adopt(home / column / METANETWORK_FILE)
            if not self.is_done((row, column)):
                say(f"{row} with the metanetwork of {column}")
                metanetwork, layout, _ = load_metanetwork(home / column / METANETWORK_FILE)
                for name in BEFORE:
                    if (home / row / name).is_file() and not (folder / name).is_file():
                        save_bytes(folder / name, (home / row / name).read_bytes())
                job = self._job(recipe, row, run, (metanetwork, layout))
                compare(job, metanetwork.to(job.device), layout)
        return folder

    def learner(self, label: str, run: Run) -> MetaJob:
        """An entry at work."""
        return self._job(self.recipe.entries[label], label, run, learns=label in self.recipe.metanetworks)

    def _job(
        self, recipe: Recipe, label: str, run: Run, learnt: Learnt | None = None, *, learns: bool = False
    ) -> MetaJob:
        if self.copied:
            recipe = with_weights_in(self.folder, recipe, label)
            recipe = _with_kinds_in(self.folder, recipe, label) if learns else recipe
        device = choose_device(recipe.device)
        loaded = {kind: self._data_of(own).to(device) for kind, own in recipe.kinds.items()} if learns else {}
        return MetaJob(recipe, run, learnt, data=self._data_of(recipe).to(device), loaded=loaded, learns=learns)

    def data(self) -> Loaded:
        """What all entries need, on the CPU."""
        learners = [self.recipe.entries[label] for label in self.recipe.metanetworks]
        recipes = [self.recipe.entries[label] for label in self.recipe.used]
        recipes += [own for recipe in learners for own in recipe.kinds.values()]
        return {_key_of(recipe): self._data_of(recipe).to(torch.device("cpu")) for recipe in recipes}

    def _data_of(self, recipe: Recipe) -> Data:
        key = _key_of(recipe)
        if key not in self._loaded:
            self._loaded[key] = load(recipe, choose_device(recipe.device))
        return self._loaded[key]


def _key_of(recipe: Recipe) -> str:
    return recipe.model_dump_json(include={"data", "seed", "device"})


def _with_kinds_in(folder: Path, recipe: Recipe, label: str) -> Recipe:
    """The recipe, with its other kinds taking their weights from the copy."""
    there = {kind: with_weights_in(folder, own, f"{label}/{kind}").network for kind, own in recipe.kinds.items()}
    models = recipe.data_models
    also = {kind: own.model_copy(update={"network": there[kind]}) for kind, own in models.also.items()}
    return recipe.model_copy(update={"data_models": models.model_copy(update={"also": also})})


def elsewhere(recipe: MatrixRecipe, data: Loaded, folder: Path, key: Key) -> None:
    """Make one run in a copy of the folder."""
    runs = Runs(recipe, folder, data, copied=True)
    runs.entry(*key) if len(key) == 1 else runs.cell(*key)


def paths_of(key: Key) -> list[str]:
    """What a run reads and makes in the matrix's folder."""
    if len(key) == 1:
        return [f"entries/{key[0]}"]
    row, column = key
    before = [f"entries/{row}/{name}" for name in BEFORE]
    return [*before, f"entries/{column}/{METANETWORK_FILE}", f"cells/{row}/{column}"]


def outside_of(recipe: MatrixRecipe) -> Files:
    """The files that entries take from elsewhere: weights, and metanetworks of further rows."""
    files: Files = {}
    for label in recipe.used:
        own = recipe.entries[label]
        files |= weights_of(own, label)
        for kind, other in own.kinds.items() if label in recipe.metanetworks else ():
            files |= weights_of(other, f"{label}/{kind}")
        for row, path in own.report.metanetworks.items():
            files[f"entries/{label}/metanetworks/{row}.safetensors"] = metanetwork_path(path).read_bytes()
    return files
