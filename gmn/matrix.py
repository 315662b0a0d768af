"""The transfer matrix: the network of every row with the metanetwork of every column (GMN, tables 4 and 5).

entries/LABEL/       an ordinary run: what `gmn meta-train` makes of the entry's recipe
cells/ROW/COLUMN/    an ordinary run: what `gmn prune ROW --meta COLUMN` makes, from the network that ROW's run trained

Entries depend on nothing and cells on two entries, through files alone; what has its report is not done again.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gmn.checkpoint import load_metanetwork, save_bytes, save_json
from gmn.compare import compare
from gmn.data import Data
from gmn.errors import ConversionError, GmnError
from gmn.learnt import Learnt
from gmn.meta_job import MetaJob
from gmn.progress import say
from gmn.recipe import dump_recipe
from gmn.run import Run, is_run, load_report
from gmn.settings import Recipe
from gmn.settings_matrix import MatrixRecipe

Report = dict[str, Any]

METANETWORK = "metanetwork.safetensors"
WEIGHTS_FIRST = ("weights.safetensors", "model.json")  # a folder with the second is whole
BEFORE = ("initial.json", *(f"models/{name}/{file}" for name in ("base", "start") for file in WEIGHTS_FIRST))
"""Files of a run that hold its network before the recipe's pruning."""
TARGET = ("speed_up", "pattern", "goal", "dense")
SHARED = (*TARGET, "initial_speed_up", "validation_images", "test_images", "finetune_images", "seen", "base")
"""What a report says of all its rows."""


class Matrix:
    """A matrix recipe at work in a run folder.

    Args:
        recipe: What to do.
        run: The run folder; it is started once every entry and every cell has proved to work.

    Raises:
        GmnError: if an entry cannot work, or a network does not fit a metanetwork.
    """

    def __init__(self, recipe: MatrixRecipe, run: Run) -> None:
        self.recipe, self.folder = recipe, run.folder
        self._data: dict[str, Data] = {}  # read once, whatever the number of cells
        if run.replaces or not is_run(run.folder):
            self._rehearse()
        run.start()

    def report(self) -> Report:
        """Do what is not done yet; returns the finished report, which is saved as report.json."""
        for label in self.recipe.used:
            self.entry(label)
        content = {
            "recipe": self.recipe.name,
            "method": "matrix",
            "columns": self.recipe.metanetworks,
            "networks": {row: self._network(row) for row in self.recipe.networks},
        }
        save_json(self.folder / "report.json", content)
        return content

    def entry(self, label: str) -> Path:
        """The run folder of an entry: its metanetwork if it is a column, its comparison if it is a row."""
        recipe, folder = self.recipe.entries[label], self.folder / "entries" / label
        column, row = label in self.recipe.metanetworks, label in self.recipe.networks
        if not (folder / ("report.json" if row else METANETWORK)).is_file():
            say(f"{label}: {' and '.join(['its metanetwork'] * column + ['its network'] * row)}")
            with Run(folder, dump_recipe(recipe), resume=True) as run:
                job = self._entry_job(label, run)
                if column:
                    job.learn()
                metanetwork, layout = job.select() if column else (None, job.layout)
                if row:
                    compare(job, metanetwork, layout, seen=recipe.data_models.fit is None if column else None)
        return folder

    def cell(self, row: str, column: str) -> Path:
        """The run folder of a network pruned with another entry's metanetwork; both entries must be done."""
        recipe, home, folder = self.recipe.entries[row], self.folder / "entries", self.folder / "cells" / row / column
        recipe = recipe.model_copy(update={"report": recipe.report.model_copy(update={"baselines": []})})
        with Run(folder, dump_recipe(recipe), resume=True) as run:
            run.start()
            run.adopt(home / column / METANETWORK)
            if not (folder / "report.json").is_file():
                say(f"{row} with the metanetwork of {column}")
                metanetwork, layout, _ = load_metanetwork(home / column / METANETWORK)
                for name in BEFORE:
                    if (home / row / name).is_file() and not (folder / name).is_file():
                        save_bytes(folder / name, (home / row / name).read_bytes())
                job = self._job(recipe, run, (metanetwork, layout))
                compare(job, metanetwork.to(job.device), layout)
        return folder

    def _network(self, row: str) -> Report:
        """The report of one network: as `compare` makes it, but every metanetwork has a row of its own."""
        own = load_report(self.folder / "entries" / row)
        results = [
            {**result, "row": column}
            for column in self.recipe.metanetworks
            for result in (own if column == row else load_report(self.cell(row, column)))["results"]
            if result["row"] == "metanetwork"
        ]
        baselines = [result for result in own["results"] if result["row"] != "metanetwork"]
        return {**{key: own[key] for key in SHARED if key in own}, "results": [*results, *baselines]}

    def _entry_job(self, label: str, run: Run) -> MetaJob:
        return self._job(self.recipe.entries[label], run, learns=label in self.recipe.metanetworks)

    def _job(self, recipe: Recipe, run: Run, learnt: Learnt | None = None, *, learns: bool = False) -> MetaJob:
        key = recipe.model_dump_json(include={"data", "seed", "device"})
        job = MetaJob(recipe, run, learnt, data=self._data.get(key), learns=learns)
        self._data[key] = job.data
        return job

    def _rehearse(self) -> None:
        """Meet every entry and every cell once, before hours of training end in an error."""
        jobs: dict[str, MetaJob] = {}
        with TemporaryDirectory() as folder:
            for label in self.recipe.used:
                try:
                    with Run(Path(folder) / label, "") as run:
                        jobs[label] = self._entry_job(label, run)
                except GmnError as error:
                    raise type(error)(f"entry {label}: {error}") from error
            for row, column in self.recipe.cells:
                _meet(row, jobs[row], column, jobs[column])


def _meet(row: str, network: MetaJob, column: str, learner: MetaJob) -> None:
    """Raise ConversionError unless a network fits the metanetwork that another recipe will learn."""
    metanetwork = learner.new_metanetwork([learner.subject(learner.built(0))])
    try:
        metanetwork.check(network.graph(network.built(0), learner.layout).spec)
    except ConversionError as error:
        hint = "give both graph.kernels: padded if their largest kernels are alike, or leave one out of rows or columns"
        message = f"the network of {row} does not fit the metanetwork of {column}"
        raise ConversionError(message, got=str(error), hint=hint) from error
