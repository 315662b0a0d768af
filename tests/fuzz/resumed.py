"""Runs of strangers that are gone on with: what lies in them was changed, then `--resume`, `gmn select`, `gmn study`.

The runs are whole but for their last results, and hold what every training has under way at its end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from changes import JSON, Kind, inside, json_lines, one_json_line, sealed, several, written
from mutate import safetensors_of

from gmn import checkpoint_search, pipeline, study_cli
from gmn.recipe import AnyRecipe, load_recipe
from gmn.run import Run

FIT = "{epochs: 1, lr: 0.01, batch_size: 20}"
SMALL = ["data.limit=60", "checkpoint_every=1e-9", "network.options={width: 4, shortcut: B}"]
META = [
    *(*SMALL, "data_models.train=1", "data_models.val=0", f"data_models.fit={FIT}", f"data_models.initial_fit={FIT}"),
    *("data_models.initial_speed_up=auto", "metanetwork.layers=1", "metanetwork.hidden=4", "meta_train.epochs=2"),
    *("meta_train.steps_per_epoch=1", "meta_train.batch_size=10", "meta_train.batches=1", "meta_train.milestones=[]"),
    *("prune.speed_up=2", "prune.recalibrate=20", "prune.steps=20", f"finetune.after_meta={FIT}"),
    *(f"finetune.after_prune={FIT}", "report.latency_batch=1", "report.seeds=1", "report.baselines=[direct]"),
]
PRUNING = "{iterations: 4, interval: 4, final_iterations: 1, lr: 0.02, batch_size: 10, score_images: 20}"
VOTE = [
    *(*SMALL, f"pretrain.fit={FIT}", "ratio=0.5", "zoo.tasks=3", "zoo.targets=1", "zoo.classes=[3]"),
    *(f"zoo.filters={PRUNING}", "similarity.images=20", "vote.neighbours=2", "report.seeds=1"),
    *("vote.fit={iterations: 2, lr: 0.02, schedule: cosine, batch_size: 10}", "report.baselines=[nearest, random]"),
]


def _recipe(name: str) -> AnyRecipe:
    return load_recipe(name, META if name == "quickstart" else VOTE)


def _made(name: str, lost: tuple[str, ...]) -> Callable[[Path], None]:
    """A run that keeps what is under way, and loses some of what it made."""

    def make(folder: Path) -> None:
        forget, Run.forget = Run.forget, lambda self: None  # type: ignore[method-assign]
        try:
            pipeline.meta_train(_recipe(name), folder / "run")
        finally:
            Run.forget = forget  # type: ignore[method-assign]
        for own in lost:
            path = folder / "run" / own
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        results = folder / "run" / "results.jsonl"
        if results.is_file():
            results.write_text("".join(results.read_text().splitlines(keepends=True)[:-1]))

    return make


def _meta(folder: Path) -> None:
    recipe = _recipe("quickstart")
    with several():
        job = pipeline.reopened_metanetwork(folder / "run")
        with job.run:
            checkpoint_search.search(job, 0.01, finetune_images=20)
    with several():
        pipeline.meta_train(recipe, folder / "run", resume=True)


def _vote(folder: Path) -> None:
    with several():
        pipeline.join(folder / "run")
    with several():
        pipeline.meta_train(_recipe("graph-mask-voting"), folder / "run", resume=True)
    with several():
        study_cli.study("iou", folder / "run", similarity=None, targets=3)


TENSORS = written(safetensors_of)
KINDS = {
    "unfinished runs": Kind(
        _made("quickstart", ("report.json", "models/direct-seed0", "metanetwork.safetensors", "data-models/0")),
        (
            *((".safetensors", sealed(change)) for change in (TENSORS, inside("gmn"), inside("gmn"))),
            *(("metrics.jsonl", written(change)) for change in (one_json_line, json_lines)),
            *((name, JSON) for name in ("initial.json", "environment.json", "model.json")),
        ),
        _meta,
        share=0.25,
    ),
    "unfinished votes": Kind(
        _made("graph-mask-voting", ("report.json",)),
        (
            *(("results.jsonl", written(change)) for change in (one_json_line, json_lines)),
            *((".safetensors", sealed(change)) for change in (TENSORS, inside("gmn"))),
            *(("metrics.jsonl", written(one_json_line)), ("model.json", JSON)),
        ),
        _vote,
        share=0.25,
    ),
}
