"""Which checkpoint to use: the latest one whose networks are still accurate enough (GMN, section 4).

Later checkpoints make networks easier to prune and less accurate, so a binary search over epochs finds the last one
above a threshold. Each probe rewrites the networks that judge, fine-tunes them briefly and reads validation images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gmn.errors import GmnError
from gmn.meta_job import MetaJob
from gmn.progress import track
from gmn.training import evaluate


@dataclass(frozen=True)
class Probe:
    """A checkpoint, and the mean validation accuracy of the judges: fine-tuned, then pruned to the recipe's target."""

    epoch: int
    accuracy: float
    pruned: float


def search(job: MetaJob, min_accuracy: float, *, finetune_images: int) -> tuple[int, list[Probe]]:
    """The last checkpoint with `min_accuracy` after a brief fine-tuning, and all probes in their order.

    Probes are recorded in the run's metrics and are not made again.

    Raises:
        GmnError: if there is no checkpoint, or none is accurate enough.
    """
    epochs = job.checkpoints()
    if not epochs:
        raise GmnError("the run has no checkpoints", where=str(job.run.folder), hint="go on with it: gmn ... --resume")
    probes: list[Probe] = []
    low, high = 0, len(epochs)  # epochs[:low] are accurate enough, epochs[high:] are not
    with track("choosing the checkpoint", len(epochs).bit_length()) as advance:
        while low < high:
            middle = (low + high) // 2
            probes.append(_probe(job, epochs[middle], finetune_images))
            advance(f"epoch {epochs[middle]}: {probes[-1].accuracy:.2%}")
            low, high = (middle + 1, high) if probes[-1].accuracy >= min_accuracy else (low, middle)
    if not low:
        best = max(probes, key=lambda probe: probe.accuracy)
        got = f"{best.accuracy:.2%} with checkpoint {best.epoch}, the best of {len(probes)} probes"
        hint = "lower --min-accuracy, give --finetune-images, or meta-train with a smaller pruner_reg"
        raise GmnError("no checkpoint is accurate enough", expected=f"{min_accuracy:.2%}", got=got, hint=hint)
    return epochs[low - 1], probes


def _probe(job: MetaJob, epoch: int, finetune_images: int) -> Probe:
    what: dict[str, Any] = {"checkpoint": epoch, "finetune_images": finetune_images}
    for entry in job.run.events("probe"):
        if all(entry[key] == value for key, value in what.items()):
            return Probe(epoch, entry["accuracy"], entry["pruned"])
    found: list[tuple[float, float]] = []
    for index in job.judges:
        model = job.rewritten(index, epoch, job.brief(finetune_images))
        pruned = job.pruned_to_target(model)
        found.append((evaluate(model, job.data.val).accuracy, evaluate(pruned, job.data.val).accuracy))
    accuracy, pruned_accuracy = (sum(values) / len(found) for values in zip(*found, strict=True))
    job.run.log("probe", **what, accuracy=accuracy, pruned=pruned_accuracy)
    return Probe(epoch, accuracy, pruned_accuracy)
