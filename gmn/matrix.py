"""The transfer matrix: the network of every row with the metanetwork of every column (GMN, tables 4 and 5)."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gmn.away import OUTSIDE, share
from gmn.checkpoint import save_json
from gmn.engine import HERE, Engine
from gmn.errors import ConversionError, within
from gmn.matrix_runs import Key, Runs, elsewhere, outside_of, paths_of
from gmn.meta_job import MetaJob
from gmn.run import Run, is_run, load_report
from gmn.settings_matrix import MatrixRecipe

Report = dict[str, Any]

TARGET = ("speed_up", "pattern", "goal", "dense")
SHARED = (*TARGET, "initial_speed_up", "validation_images", "test_images", "finetune_images", "seen", "base")
"""What a report says of all its rows."""


class Matrix:
    """A matrix recipe at work in a run folder.

    Args:
        recipe: What to do.
        run: The run folder; it is started once every entry and every cell has proved to work.
        engine: Where entries and cells are made.

    Raises:
        GmnError: if an entry cannot work, or a network does not fit a metanetwork.
    """

    def __init__(self, recipe: MatrixRecipe, run: Run, engine: Engine = HERE) -> None:
        self.recipe, self.folder, self.engine = recipe, run.folder, engine
        self.runs = Runs(recipe, run.folder)
        if run.replaces or not is_run(run.folder):
            self._rehearse()
        run.start()
        shutil.rmtree(run.folder / OUTSIDE, ignore_errors=True)  # what jobs of a killed process read

    def report(self) -> Report:
        """Do what is not done yet; returns the finished report, which is saved as report.json."""
        if self.engine.remote:
            self._share()
        for label in self.recipe.used:
            self.runs.entry(label)
        networks = self.recipe.networks
        content = {
            "recipe": self.recipe.name,
            "method": "matrix",
            "columns": list(dict.fromkeys(title for row in networks for title in self.recipe.titles(row).values())),
            "networks": {row: self._network(row) for row in networks},
        }
        save_json(self.folder / "report.json", content)
        return content

    def _share(self) -> None:
        """Let workers make the runs that are missing: all entries, then all cells."""
        entries: list[Key] = [(label,) for label in self.recipe.used]
        done = {key for key in (*entries, *self.recipe.cells) if self.runs.is_done(key)}
        if len(done) == len(entries) + len(self.recipe.cells):
            return
        work, outside = partial(elsewhere, self.recipe, self.runs.data()), outside_of(self.recipe)
        for title, keys in (("entries", entries), ("cells", self.recipe.cells)):
            jobs = {key: paths_of(key) for key in keys if key not in done}
            share(self.engine, work, self.folder, jobs, title, outside=outside, in_place=True)

    def _network(self, row: str) -> Report:
        """The report of one network: as `compare` makes it, but every metanetwork has a row of its own."""
        own = load_report(self.folder / "entries" / row)
        results = [
            {**result, "row": title}
            for column, title in self.recipe.titles(row).items()
            for result in (own if column == row else load_report(self.runs.cell(row, column)))["results"]
            if result["row"] == "metanetwork"
        ]
        baselines = [result for result in own["results"] if result["row"] != "metanetwork"]
        return {**{key: own[key] for key in SHARED if key in own}, "results": [*results, *baselines]}

    def _rehearse(self) -> None:
        """Meet every entry and every cell once, before hours of training end in an error."""
        jobs: dict[str, MetaJob] = {}
        with TemporaryDirectory() as folder:
            for label in self.recipe.used:
                with within(f"entry {label}"), Run(Path(folder) / label, "") as run:
                    jobs[label] = self.runs.learner(label, run)
            for row, column in self.recipe.cells:
                _meet(row, jobs[row], column, jobs[column])


def _meet(row: str, network: MetaJob, column: str, learner: MetaJob) -> None:
    """Raise ConversionError unless a network fits the metanetwork that another recipe will learn."""
    metanetwork = learner.new_metanetwork([kind.subject(kind.built(0)) for kind in learner.kinds])
    try:
        metanetwork.check(network.graph(network.built(0), learner.layout).spec)
    except ConversionError as error:
        hint = "give both graph.kernels: padded if their largest kernels are alike, or leave one out of rows or columns"
        message = f"the network of {row} does not fit the metanetwork of {column}"
        raise ConversionError(message, got=str(error), hint=hint) from error
