"""The comparison: one network pruned with a metanetwork and without, to the same FLOPs, with the same fine-tuning.

    metanetwork    [initial pruning] -> metanetwork -> fine-tune -> prune -> fine-tune
    same-schedule  the same without the metanetwork
    direct         prune at once, then all of the fine-tuning: the row a user would run, and the harder one to beat
    random         like direct, by a random ranking, another one for each seed: what the criterion is worth

Validation images choose; each finished network sees the test images once.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import nn

from gmn.builder import Layout
from gmn.checkpoint import load_json, load_model, save_json, save_model
from gmn.costs import Cost, cost, latency
from gmn.meta_job import MetaJob
from gmn.metanetwork import MetaNetwork
from gmn.progress import track
from gmn.settings import Fit
from gmn.spread import spread
from gmn.surgery import remove, settled
from gmn.training import evaluate, recalibrate

CURVE_POINTS = 8
CURVE_IMAGES = 2000


def compare(job: MetaJob, metanetwork: MetaNetwork, layout: Layout, *, seen: bool | None = None) -> dict[str, Any]:
    """Run all rows for all seeds, measure, and save report.json; finished rows are not run again.

    Args:
        seen: Whether the metanetwork learnt on this very network; None if that is not known.
    """
    recipe = job.recipe
    index = recipe.data_models.train + recipe.data_models.val if recipe.data_models.fit else 0
    base = job.keep("models/base", lambda: job.trained(index))
    start = base if not _initial(job) else job.keep("models/start", lambda: job.initially_pruned(base, index))
    rows = ["metanetwork", *recipe.report.baselines]
    results = [
        _row(job, row, seed, base, start, metanetwork if row == "metanetwork" else None, layout)
        for row in rows
        for seed in range(recipe.report.seeds)
    ]
    report = {
        "recipe": recipe.name,
        "seen": seen,
        "speed_up": recipe.prune.speed_up,
        "validation_images": len(job.data.val),
        "test_images": len(job.data.test),
        "finetune_images": _budget(job),
        "base": _measure(job, base, cost(base, job.example)),
        "results": results,
        "latency": _latency(job, base, rows),
        "curve": _curve(job, base, start, {"with metanetwork": metanetwork, "without": None}, layout),
        "select": list(job.run.events("select")),
        "meta_train": list(job.run.events("meta-train")),
    }
    save_json(job.run.folder / "report.json", report)
    return report


def _initial(job: MetaJob) -> bool:
    settings = job.recipe.data_models
    return settings.initial_speed_up > 1 or settings.initial_fit is not None


def _row(
    job: MetaJob,
    row: str,
    seed: int,
    base: nn.Module,
    start: nn.Module,
    metanetwork: MetaNetwork | None,
    layout: Layout,
) -> dict[str, Any]:
    """One finished network: its validation and test accuracy, and its cost."""
    folder = job.run.folder / "models" / f"{row}-seed{seed}"
    if not (folder / "model.json").is_file():
        before = cost(base, job.example)
        stages: dict[str, float] = {}
        if row in ("direct", "random"):
            chance = job.seed(700 + seed) if row == "random" else None
            model, tuning = job.prune(base, job.recipe.prune.speed_up, chance=chance).model, _merged(job)
            stages["pruned"] = evaluate(model, job.data.val).accuracy
        else:
            model = job.rewrite(start, metanetwork, layout)
            stages["rewritten"] = evaluate(model, job.data.val).accuracy
            if job.recipe.finetune.after_meta:
                job.fit(model, job.recipe.finetune.after_meta, 500 + seed, f"{row} seed {seed}: fine-tuning")
                stages["fine-tuned"] = evaluate(model, job.data.val).accuracy
            model = job.prune(model, job.recipe.prune.speed_up, before).model
            stages["pruned"] = evaluate(model, job.data.val).accuracy
            tuning = job.recipe.finetune.after_prune
        job.fit(model, tuning, 600 + seed, f"{row} seed {seed}: fine-tuning after pruning")
        facts = {"row": row, "seed": seed, "stages": stages, **_measure(job, model, before)}
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


def _images(job: MetaJob, settings: Fit | None) -> int:
    available = len(job.data.train)
    if settings and settings.iterations:
        return settings.iterations * min(settings.batch_size, available)
    return settings.epochs * min(settings.images_per_epoch or available, available) if settings else 0


def _budget(job: MetaJob) -> int:
    """Images that every row sees in fine-tuning."""
    recipe = job.recipe
    fits = (recipe.data_models.initial_fit, recipe.finetune.after_meta, recipe.finetune.after_prune)
    return sum(_images(job, settings) for settings in fits)


def _merged(job: MetaJob) -> Fit:
    """The whole budget as one fine-tuning: the last one's, with more epochs before its first milestone."""
    last = job.recipe.finetune.after_prune
    if last.iterations:
        return last.model_copy(update={"iterations": math.ceil(_budget(job) * last.iterations / _images(job, last))})
    epochs = math.ceil(_budget(job) / (_images(job, last) / last.epochs))  # a baseline never gets less
    shift = epochs - last.epochs
    return last.model_copy(update={"epochs": epochs, "milestones": [m + shift for m in last.milestones]})


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
    with track("accuracy against speed-up", len(metanetworks) * CURVE_POINTS) as advance:
        for name, metanetwork in metanetworks.items():
            model = job.rewrite(start, metanetwork, layout)
            curve[name] = _curve_of(job, model, cost(base, job.example), advance)
    return curve


def _curve_of(job: MetaJob, model: nn.Module, before: Cost, advance: Any) -> list[tuple[float, float]]:
    graph = job.graph(model)
    coupled = settled(model, graph.spec, job.example)
    masks = job.masks(model, graph.spec, coupled)
    points = [
        (before.flops / cost(model, job.example).flops, evaluate(model, job.data.val, limit=CURVE_IMAGES).accuracy)
    ]
    for number in torch.linspace(0, len(masks) - 1, CURVE_POINTS).round().int().tolist():
        smaller = remove(model, graph.spec, masks[number], job.example, coupled=coupled)
        recalibrate(smaller, job.data.train, job.recipe.prune.recalibrate, seed=job.recipe.seed)
        accuracy = evaluate(smaller, job.data.val, limit=CURVE_IMAGES).accuracy
        points.append((before.flops / cost(smaller, job.example).flops, accuracy))
        advance(f"{points[-1][0]:.1f}x: {accuracy:.1%}")
    return points


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
    for entry in entries:
        entry["latency"] = report["latency"][entry["row"]]
    return entries
