"""The comparison: one network pruned with a metanetwork and without, to the same FLOPs, with the same fine-tuning.

`gmn.baselines` has the rows. Validation images choose; each finished network sees the test images once. With several
speed-ups the report is that of `prune.speed_up`, and has the `results` and the `latency` of the others in `further`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from gmn.baselines import DIGEST, Trial, digest
from gmn.budget import budget
from gmn.builder import Layout
from gmn.checkpoint import load_model, save_json
from gmn.compare_rows import measure, networks_of, pattern_of, result_of, share_rows, trials_of
from gmn.costs import Cost, latency
from gmn.curve import POINTS, curve_of
from gmn.engine import HERE, Engine
from gmn.gradients import loss_gradients
from gmn.meta_job import MetaJob
from gmn.metanetwork import MetaNetwork
from gmn.progress import track
from gmn.spread import spread
from gmn.weight_statistics import statistics_of

STATISTICS = "statistics.json"
"""In a run folder: the weights of every layer before and after the metanetwork."""


def compare(
    job: MetaJob,
    metanetwork: MetaNetwork | None,
    layout: Layout,
    *,
    seen: bool | None = None,
    engine: Engine = HERE,
) -> dict[str, Any]:
    """Run all rows for all seeds, measure, and save report.json; finished rows are not run again.

    Args:
        job: The recipe at work.
        metanetwork, layout: What was learnt; without a metanetwork only the recipe's baselines are run.
        seen: Whether the metanetwork learnt on this very network; None if that is not known.
        engine: Who makes the rows, each with each seed.
    """
    recipe, learnt = job.recipe, {} if metanetwork is None else {DIGEST: digest(metanetwork)}
    base, start = networks_of(job)
    trials = trials_of(job, base, start, (metanetwork, layout))
    if engine.remote:
        share_rows(job, engine, trials)
    by_target = {target: [trial for trial in trials if trial.target == target] for target in recipe.targets}
    tables = {target: _table(job, base, own) for target, own in by_target.items()}
    main = tables.pop(recipe.prune.speed_up)
    report = {
        "recipe": recipe.name,
        "seen": seen,
        **learnt,
        **_target(job, recipe.prune.speed_up),
        "validation_images": len(job.data.val),
        "test_images": len(job.data.test),
        "initial_speed_up": job.initial_speed_up,
        "finetune_images": budget(recipe, len(job.data.train)),
        "base": measure(job, base, job.cost(base)),
        "results": main["results"],
        "latency": main["latency"],
        "curve": _curve(job, job.cost(base), _before_pruning(by_target[recipe.prune.speed_up])),
        "select": list(job.run.events("select")),
        "meta_train": list(job.run.events("meta-train")),
        **({"further": list(tables.values())} if tables else {}),
        **({"metanetworks": {k: str(v) for k, v in paths.items()}} if (paths := recipe.report.metanetworks) else {}),
    }
    if metanetwork is not None:
        save_json(job.run.folder / STATISTICS, {**learnt, **_statistics(job, start, metanetwork, layout)})
    save_json(job.run.folder / "report.json", report)
    return report


def _target(job: MetaJob, speed_up: float | None) -> dict[str, Any]:
    """What the networks were pruned to: a speed-up, or a pattern of weights and the layers that it leaves dense."""
    settings = job.recipe.prune
    if settings.of_channels:
        return {"speed_up": speed_up}
    return {**pattern_of(job), "goal": settings.goal, "dense": job.dense}


def _table(job: MetaJob, base: nn.Module, trials: list[Trial]) -> dict[str, Any]:
    """All rows at one speed-up."""
    results = [result_of(job, trial) for trial in trials]
    return {**_target(job, trials[0].target), "results": results, "latency": _latency(job, base, trials)}


def _latency(job: MetaJob, base: nn.Module, trials: list[Trial]) -> dict[str, float]:
    """Milliseconds per batch, the networks of the first seed taking turns."""
    first = {trial.row: trial.folder for trial in trials if trial.seed == 0}
    names = ["base", *first]
    models = [base, *(load_model(folder).to(job.device) for folder in first.values())]
    batch = job.data.example_inputs(job.recipe.report.latency_batch)
    return {name: 1000 * s for name, s in zip(names, latency(models, batch), strict=True)}


def _before_pruning(trials: list[Trial]) -> dict[str, Callable[[], nn.Module]]:
    """What the curve shows: rewritten networks, and those of the first seed that were kept after their fine-tuning."""
    job, learners = trials[0].job, ("metanetwork", *trials[0].job.further)
    shown: dict[str, Callable[[], nn.Module]] = {}
    for trial in trials:
        if trial.seed == 0 and trial.row in learners:
            shown[f"with {trial.row}"] = partial(job.rewrite, trial.start, trial.metanetwork, trial.layout)
    shown["without"] = partial(job.rewrite, trials[0].start, None, trials[0].layout)
    for trial in trials:
        if trial.seed == 0 and job.recipe.finetune.after_meta and (trial.first / "model.json").is_file():
            shown[trial.row] = lambda trial=trial: load_model(trial.first).to(job.device)
    return shown


def _curve(
    job: MetaJob, before: Cost, networks: dict[str, Callable[[], nn.Module]]
) -> dict[str, list[tuple[float, float]]]:
    """Validation accuracy against speed-up, without fine-tuning, batch norms recalibrated."""
    with track(f"accuracy against {job.recipe.prune.measure}", len(networks) * (POINTS + 1)) as advance:
        return {name: curve_of(job, make(), before, advance) for name, make in networks.items()}


def _statistics(job: MetaJob, start: nn.Module, metanetwork: MetaNetwork, layout: Layout) -> dict[str, Any]:
    """The weights of every layer before and after the metanetwork."""
    found: dict[str, Any] = {}
    for side, model in {"before": start, "after": job.rewrite(start, metanetwork, layout)}.items():
        gradients = loss_gradients(model, job.data.train, seed=job.recipe.seed)
        found[side] = [asdict(layer) for layer in statistics_of(job.graph(model).spec, model.state_dict(), gradients)]
    return found


def tables_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A report for each of its speed-ups, the smallest first; runs of an older gmn have one.

    >>> [table["results"] for table in tables_of({"speed_up": 3, "results": [], "further": [{"speed_up": 2}]})]
    [[], []]
    """
    return sorted(
        ({**report, **own} for own in ({}, *report.get("further", []))), key=lambda own: own.get("speed_up") or 0
    )


def summarise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per row: mean and spread (standard deviation over seeds) of what was measured."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        rows.setdefault(result["row"], []).append(result)
    entries = [{"row": "base", "seeds": 1, "spread": 0.0, **report["base"]}]
    for row, results in rows.items():
        mean = {
            key: statistics.fmean(result[key] for result in results)
            for key in ("validation_accuracy", "test_accuracy", "flops", "parameters", "speed_up")
        }
        tests = [result["test_accuracy"] for result in results]
        entries.append({"row": row, "seeds": len(results), "spread": spread(tests), **mean})
    for entry in entries if "latency" in report else ():
        entry["latency"] = report["latency"][entry["row"]]
    return entries
