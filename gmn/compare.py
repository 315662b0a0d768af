"""The comparison: one network pruned with a metanetwork and without, to the same FLOPs, with the same fine-tuning.

`gmn.baselines` has the rows. Validation images choose; each finished network sees the test images once.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from torch import nn

from gmn.baselines import ROWS, Trial
from gmn.budget import budget
from gmn.builder import Layout
from gmn.checkpoint import load_json, load_model, save_json, save_model
from gmn.costs import Cost, cost, latency
from gmn.curve import POINTS, curve_of
from gmn.gradients import loss_gradients
from gmn.meta_job import MetaJob
from gmn.metanetwork import MetaNetwork
from gmn.progress import track
from gmn.spread import spread
from gmn.training import evaluate
from gmn.weight_statistics import statistics_of

STATISTICS = "statistics.json"
"""In a run folder: the weights of every layer before and after the metanetwork."""


def compare(
    job: MetaJob, metanetwork: MetaNetwork | None, layout: Layout, *, seen: bool | None = None
) -> dict[str, Any]:
    """Run all rows for all seeds, measure, and save report.json; finished rows are not run again.

    Args:
        job: The recipe at work.
        metanetwork, layout: What was learnt; without a metanetwork only the recipe's baselines are run.
        seen: Whether the metanetwork learnt on this very network; None if that is not known.
    """
    recipe = job.recipe
    index = recipe.data_models.train + recipe.data_models.val if recipe.data_models.fit else 0
    base = job.keep("models/base", lambda: job.trained(index))
    start = base if not _initial(job) else job.keep("models/start", lambda: job.initially_pruned(base, index))
    learnt: dict[str, MetaNetwork | None] = {} if metanetwork is None else {"with metanetwork": metanetwork}
    rows = [*(["metanetwork"] if learnt else []), *recipe.report.baselines]
    results = [
        _result(job, Trial(job, base, start, metanetwork, layout, row, seed))
        for row in rows
        for seed in range(recipe.report.seeds)
    ]
    report = {
        "recipe": recipe.name,
        "seen": seen,
        "speed_up": recipe.prune.speed_up,
        "validation_images": len(job.data.val),
        "test_images": len(job.data.test),
        "initial_speed_up": job.initial_speed_up,
        "finetune_images": budget(recipe, len(job.data.train)),
        "base": _measure(job, base, cost(base, job.example)),
        "results": results,
        "latency": _latency(job, base, rows),
        "curve": _curve(job, base, start, {**learnt, "without": None}, layout),
        "select": list(job.run.events("select")),
        "meta_train": list(job.run.events("meta-train")),
    }
    if metanetwork is not None:
        save_json(job.run.folder / STATISTICS, _statistics(job, start, metanetwork, layout))
    save_json(job.run.folder / "report.json", report)
    return report


def _initial(job: MetaJob) -> bool:
    settings = job.recipe.data_models
    return settings.initial_speed_up != 1 or settings.initial_fit is not None


def _result(job: MetaJob, trial: Trial) -> dict[str, Any]:
    """One finished network: its validation and test accuracy, and its cost."""
    folder = job.run.folder / "models" / f"{trial.row}-seed{trial.seed}"
    if not (folder / "model.json").is_file():
        model = ROWS[trial.row](trial)
        about = {"row": trial.row, "seed": trial.seed, "stages": trial.stages}
        facts = {**about, **_measure(job, model, trial.before)}
        save_model(folder, model, job.source, **facts, input_shape=job.data.input_shape)
        job.run.log("result", **facts)
    content = load_json(folder / "model.json")
    return {key: value for key, value in content.items() if key not in ("network", "format", "heads", "input_shape")}


def _measure(job: MetaJob, model: nn.Module, before: Cost) -> dict[str, float]:
    after = cost(model, job.example)
    return {
        "validation_accuracy": evaluate(model, job.data.val).accuracy,
        "test_accuracy": evaluate(model, job.data.test).accuracy,
        "flops": after.flops,
        "parameters": after.parameters,
        "speed_up": before.flops / after.flops,
    }


def _latency(job: MetaJob, base: nn.Module, rows: list[str]) -> dict[str, float]:
    """Milliseconds per batch, the networks taking turns."""
    names = ["base", *rows]
    models = [base, *(load_model(job.run.folder / "models" / f"{row}-seed0").to(job.device) for row in rows)]
    batch = job.data.example_inputs(job.recipe.report.latency_batch)
    return {name: 1000 * s for name, s in zip(names, latency(models, batch), strict=True)}


def _curve(
    job: MetaJob, base: nn.Module, start: nn.Module, metanetworks: dict[str, MetaNetwork | None], layout: Layout
) -> dict[str, list[tuple[float, float]]]:
    """Validation accuracy against speed-up, without fine-tuning, batch norms recalibrated."""
    curve: dict[str, list[tuple[float, float]]] = {}
    with track("accuracy against speed-up", len(metanetworks) * (POINTS + 1)) as advance:
        for name, metanetwork in metanetworks.items():
            model = job.rewrite(start, metanetwork, layout)
            curve[name] = curve_of(job, model, cost(base, job.example), advance)
    return curve


def _statistics(job: MetaJob, start: nn.Module, metanetwork: MetaNetwork, layout: Layout) -> dict[str, Any]:
    """The weights of every layer before and after the metanetwork."""
    found: dict[str, Any] = {}
    for side, model in {"before": start, "after": job.rewrite(start, metanetwork, layout)}.items():
        gradients = loss_gradients(model, job.data.train)
        found[side] = [asdict(layer) for layer in statistics_of(job.graph(model).spec, model.state_dict(), gradients)]
    return found


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
