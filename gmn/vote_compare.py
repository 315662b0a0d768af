"""The comparison of the vote with its baselines: every method on every target task, at the same number of steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gmn.checkpoint import save_json, save_model
from gmn.jsonl import append_line, read_lines
from gmn.progress import say, track
from gmn.spread import spread
from gmn.trials import Finished, Trial, plan, run_trial
from gmn.vote_job import VoteJob
from gmn.zoo import save_task
from gmn.zoo_build import stored

KEYS = [field.name for field in dataclasses.fields(Trial)]
Result = dict[str, Any]


def compare_votes(job: VoteJob) -> dict[str, Any]:
    """Run all methods on all targets, measure, and save report.json; finished trials are not run again."""
    recipe = job.recipe
    results = measured(job, planned(job), "comparing")
    built = job.zoo.tasks(split="zoo")
    report = {
        "method": "vote",
        "recipe": recipe.name,
        "ratio": recipe.ratio,
        "similarity": recipe.similarity.name,
        "long": recipe.report.long,
        "targets": {task.name: list(task.class_names) for task in job.targets},
        "base": job.price(),
        "zoo": {"tasks": len(built), "training_flops": sum(task.metrics.get("training_flops", 0.0) for task in built)},
        "validation_images": len(job.data.val),
        "test_images": len(job.data.test),
        "results": results,
    }
    save_json(job.run.folder / "report.json", report)
    return report


def planned(job: VoteJob) -> list[Trial]:
    """The trials of the comparison: every method on every target, for every seed."""
    rows, seeds = ["vote", *job.recipe.report.baselines], range(job.recipe.report.seeds)
    return [plan(job, row, target, seed) for target in job.targets for row in rows for seed in seeds]


def measured(job: VoteJob, wanted: Sequence[Trial], title: str) -> list[Result]:
    """The results of trials, from results.jsonl where they are there, else run now and kept there.

    The file is read before every trial: another process may have finished it, working from the other end.
    """
    path = job.run.folder / "results.jsonl"
    results: list[Result] = []
    with track(title, len(wanted)) as advance:
        for trial in wanted:
            result = _known(path).get(_key(dataclasses.asdict(trial)))
            if result is None:
                finished, result = run_trial(job, trial)
                if job.foreign:
                    _save(job, trial, finished, result)
                append_line(path, result)
            results.append(result)
            advance(f"{trial.row} on {trial.target}: {result['validation_accuracy']:.1%}")
    return results


def _known(path: Path) -> dict[tuple[Any, ...], Result]:
    return {_key(result): result for result in read_lines(path) if set(KEYS) <= result.keys()}


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in KEYS)


def _save(job: VoteJob, trial: Trial, finished: Finished, result: Result) -> None:
    """Keep the network; that of the vote also as a task that `gmn zoo add` takes."""
    (target,) = job.targets
    source = {**job.source, "num_classes": len(target.classes)}
    facts = {"class_names": list(target.class_names), "input_shape": job.data.input_shape}
    save_model(job.run.folder / "models" / f"{trial.row}-seed{trial.seed}", finished.model, source, **facts, **result)
    if trial.row == "vote":
        path = job.run.folder / f"task-seed{trial.seed}.safetensors"
        classes = hashlib.sha256(json.dumps(target.class_names).encode()).hexdigest()[:8]
        name = f"target-{classes}-seed{job.seed(trial.seed)}"  # two targets, two names: both can join a zoo
        task = dataclasses.replace(target, name=name, split="zoo", seed=job.seed(trial.seed))
        save_task(path, stored(job.backbone, job.zoo.identity, job.data_of(target), task, finished.shrunk()))
        say(f"to let it vote next time: gmn zoo add {job.folder} {path}")


def summarise(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One entry per method: means over targets and seeds, their spread, and the paired difference from the vote."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result["row"], []).append(result)
    vote = {(r["target"], r["seed"]): r["test_accuracy"] for r in rows.get("vote", [])}
    entries = []
    for row, found in rows.items():
        mean = {key: statistics.fmean(r[key] for r in found) for key in MEANS}
        apart = [r["test_accuracy"] - vote[r["target"], r["seed"]] for r in found if (r["target"], r["seed"]) in vote]
        apart_by = {"spread": spread([r["test_accuracy"] for r in found]), "difference_spread": spread(apart)}
        difference = statistics.fmean(apart) if apart else 0.0
        entries.append({"row": row, "trials": len(found), **mean, **apart_by, "difference": difference})
    return entries


MEANS = (
    *("validation_accuracy", "test_accuracy", "iterations", "neighbours"),
    *("training_flops", "search_flops", "flops", "parameters"),
)
