"""What `gmn curve` and `gmn select` do in the folder of a run that meta-trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gmn import checkpoint_search, plots
from gmn import curve as curves
from gmn.checkpoint import load_metanetwork, save_metanetwork
from gmn.cli_options import numbers
from gmn.consoles import plain_console
from gmn.errors import GmnError
from gmn.meta_job import MetaJob
from gmn.pipeline import reopened_metanetwork
from gmn.run import METANETWORK_FILE, reading


def curve(run: Path, *, checkpoints: str | None, points: int, images: int, drop: float, finetune_images: int) -> None:
    """Draw accuracy against speed-up for some checkpoints; default: none, the chosen one and the last."""
    job = reopened_metanetwork(run)
    with job.run:
        chosen = _usual(job) if checkpoints is None else numbers("--checkpoints", checkpoints, least=0)
        content = curves.study(job, curves.Choices(chosen, points, images, drop, finetune_images))
        _show(content)
        print(f"picture: {plots.curves(content, job.recipe.name, run / 'curves' / 'curve.png')}")


def select(run: Path, *, min_accuracy: float, finetune_images: int, use: bool) -> None:
    """Find the last checkpoint that is accurate enough; `use` makes it the run's metanetwork."""
    if not 0 < min_accuracy < 1:
        raise GmnError("not an accuracy", expected="such as 0.91", got=str(min_accuracy), where="--min-accuracy")
    job = reopened_metanetwork(run)
    with job.run:
        epoch, probes = checkpoint_search.search(job, min_accuracy, finetune_images=finetune_images)
        _show_probes(job, probes, finetune_images)
        path = job.checkpoint(epoch)
        if use:
            metanetwork, layout, _ = load_metanetwork(path)
            path = run / METANETWORK_FILE
            save_metanetwork(path, metanetwork, layout)
            job.run.log("use", checkpoint=epoch)
            print("rows that the run has made with another metanetwork are made again: gmn meta-train ... --resume")
    print(f"checkpoint {epoch}: gmn prune RECIPE --meta {path}")


def _show_probes(job: MetaJob, probes: Sequence[checkpoint_search.Probe], finetune_images: int) -> None:
    title = f"{job.recipe.name}: validation accuracy, {finetune_images:,} fine-tuning images"
    table = Table(title=title, caption="in the order of the search")
    for name in ("checkpoint", "fine-tuned %", f"pruned {job.recipe.prune.goal} %"):
        table.add_column(name, justify="right")
    for probe in probes:
        table.add_row(str(probe.epoch), f"{100 * probe.accuracy:.2f}", f"{100 * probe.pruned:.2f}")
    plain_console().print(table)


def _usual(job: MetaJob) -> list[int]:
    """No metanetwork, the checkpoint that was best when pruned, and the last one."""
    known = job.checkpoints()
    with reading(job.run.folder / "metrics.jsonl"):
        scores = {entry["epoch"]: float(entry["validation_accuracy"]) for entry in job.run.events("select")}
    best = [max(known, key=lambda epoch: scores[epoch])] if known and all(epoch in scores for epoch in known) else []
    return sorted({0, *best, *known[-1:]})


def _show(content: dict[str, Any]) -> None:
    weights = content["axis"] != "speed-up"
    place = lambda value: f"{value:.1%}" if weights else f"{value:.2f}x"  # noqa: E731
    tuned = f"{images:,} images of fine-tuning" if (images := content["finetune_images"]) else "not fine-tuned"
    title = f"{content['axis']} where accuracy falls under {100 * content['threshold']:.1f} % (validation, {tuned})"
    table = Table(title=title)
    for name in ("checkpoint", "turning point", "most", "accuracy there %"):
        table.add_column(name, justify="right")
    for entry in content["curves"]:
        turn, last = entry["turning_point"], entry["points"][-1]
        table.add_row(
            str(entry["checkpoint"]),
            place(turn) if turn else "not reached",
            f"{last[0]:.1%}" if weights else f"{last[0]:.1f}x",
            f"{100 * last[1]:.1f}",
        )
    plain_console().print(table)
