"""The networks of a comparison: each row with each seed, made in this process or by workers elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmn.away import share, weights_of, with_weights_in
from gmn.baselines import ROWS, Trial
from gmn.builder import Layout
from gmn.checkpoint import ABOUT_MODELS, load_checked, load_metanetwork, save_model
from gmn.costs import Cost
from gmn.data import Data
from gmn.engine import Engine
from gmn.job import choose_device
from gmn.meta_job import MetaJob
from gmn.metanetwork import MetaNetwork
from gmn.recipe import dump_recipe
from gmn.run import METANETWORK_FILE, Run
from gmn.settings import Recipe
from gmn.training import evaluate

Key = tuple[str, int]
"""A row and a seed: at all speed-ups, which share the way to the pruning."""


def networks_of(job: MetaJob) -> tuple[nn.Module, nn.Module]:
    """The network before any pruning, and after the initial pruning."""
    recipe = job.recipe
    index = recipe.data_models.train + recipe.data_models.val if recipe.data_models.fit else 0
    base = job.keep("models/base", lambda: job.trained(index))
    return base, base if not _initial(job) else job.keep("models/start", lambda: job.initially_pruned(base, index))


def trials_of(job: MetaJob, base: nn.Module, start: nn.Module, own: tuple[MetaNetwork | None, Layout]) -> list[Trial]:
    """Every row with every seed, at every speed-up."""
    learnt = {} if own[0] is None else {"metanetwork": own}
    learnt |= {label: (further.to(job.device), its_layout) for label, (further, its_layout) in job.further.items()}
    return [
        Trial(job, base, start, *learnt.get(row, own), row, seed, speed_up=speed_up)
        for speed_up in job.recipe.targets
        for row in [*learnt, *job.recipe.report.baselines]
        for seed in range(job.recipe.report.seeds)
    ]


def _initial(job: MetaJob) -> bool:
    settings = job.recipe.data_models
    return settings.initial_speed_up != 1 or settings.initial_fit is not None


def pattern_of(job: MetaJob) -> dict[str, str]:
    """What `model.json` says of a network in which single weights are zero."""
    return {} if job.recipe.prune.of_channels else {"pattern": job.recipe.prune.pattern}


def result_of(job: MetaJob, trial: Trial) -> dict[str, Any]:
    """One finished network: its validation and test accuracy, and its cost."""
    folder = trial.folder
    if not trial.made(folder):
        model = ROWS.get(trial.row, ROWS["metanetwork"])(trial)
        about = {"row": trial.row, "seed": trial.seed, "stages": trial.stages, **pattern_of(job), **trial.learnt}
        facts = {**about, **measure(job, model, trial.before)}
        job.run.log("result", **facts)
        save_model(folder, model, job.source, **facts, input_shape=job.data.input_shape)
        job.run.forget()
    content = load_checked(folder / "model.json", RESULT)
    return {key: value for key, value in content.items() if key not in ABOUT_MODELS}


RESULT: dict[str, type] = {
    **{"row": str, "seed": int, "stages": dict},
    **dict.fromkeys(("validation_accuracy", "test_accuracy", "flops", "parameters", "speed_up"), float),
}
"""Of what `model.json` says of a finished network."""


def measure(job: MetaJob, model: nn.Module, before: Cost) -> dict[str, float]:
    """What a report says of a network, the way it was made apart; this reads the test images."""
    after = job.cost(model)
    return {
        "validation_accuracy": evaluate(model, job.data.val).accuracy,
        "test_accuracy": evaluate(model, job.data.test).accuracy,
        "flops": after.flops,
        "parameters": after.parameters,
        "speed_up": before.flops / after.flops,
    }


BEFORE = (
    *("recipe.yaml", "environment.json", "metrics.jsonl"),
    *("initial.json", METANETWORK_FILE, "metanetworks", "models/base", "models/start"),
)
"""What all rows need of the run folder."""


def share_rows(job: MetaJob, engine: Engine, trials: Iterable[Trial]) -> None:
    """Let workers make the networks that are missing."""
    jobs: dict[Key, list[str]] = {}
    for trial in (trial for trial in trials if not trial.made(trial.folder)):
        paths = jobs.setdefault((trial.row, trial.seed), list(BEFORE))
        paths += [str(path.relative_to(job.run.folder)) for path in (trial.first, trial.folder)]
    work = partial(_elsewhere, job.recipe, job.data.to(torch.device("cpu")))
    share(engine, work, job.run.folder, jobs, "pruning the rows", outside=weights_of(job.recipe))


def _elsewhere(recipe: Recipe, data: Data, folder: Path, key: Key) -> None:
    """Make the networks of one row and seed in a copy of the run folder."""
    with Run(folder, dump_recipe(recipe), resume=True) as run:
        path = folder / METANETWORK_FILE
        metanetwork, layout = load_metanetwork(path)[:2] if path.is_file() else (None, None)
        data = data.to(choose_device(recipe.device))
        job = MetaJob(with_weights_in(folder, recipe), run, data=data)
        own = (metanetwork and metanetwork.to(job.device), layout or job.layout)
        for trial in trials_of(job, *networks_of(job), own):
            if (trial.row, trial.seed) == key:
                result_of(job, trial)
