"""The story of the whole program: what `gmn meta-train` and `gmn prune` do, step by step.

data models --meta-train--> checkpoints --select on validation--> metanetwork
network --[initial pruning]--> graph --metanetwork--> graph --> network' --fine-tune--> prune --fine-tune--> report
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmn.checkpoint import load_metanetwork
from gmn.compare import compare
from gmn.job import Job
from gmn.recipe import dump_recipe
from gmn.run import Run
from gmn.settings import Recipe


def meta_train(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Learn a metanetwork, then prune a network with it and without it; returns the report.

    Everything finished is kept in the run folder, so that `resume` goes on where a run stopped.
    """
    run = Run(folder, dump_recipe(recipe), resume=resume, overwrite=overwrite)
    job = Job(recipe, run)
    models = [job.data_model(index) for index in range(recipe.data_models.train + recipe.data_models.val)]
    learners, judges = models[: recipe.data_models.train], models[recipe.data_models.train :]
    job.learn([job.subject(model) for model in learners])
    metanetwork, layout = job.select([job.subject(model) for model in judges or learners])
    # with a training in the recipe the pruned network is one more, trained with a seed of its own
    return compare(job, metanetwork, layout, seen=recipe.data_models.fit is None)


def prune_recipe(
    recipe: Recipe, folder: Path, meta: Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Prune the recipe's network with a saved metanetwork; returns the report."""
    metanetwork, layout, _ = load_metanetwork(meta)
    run = Run(folder, dump_recipe(recipe), resume=resume, overwrite=overwrite)
    job = Job(recipe, run, (metanetwork, layout))
    run.adopt(meta)
    return compare(job, metanetwork.to(job.device), layout)
