"""Which checkpoint to use: the latest one whose networks are still accurate enough (GMN, section 4).

Later checkpoints make networks easier to prune and less accurate, so a binary search over epochs finds the last one
above a threshold. Each probe rewrites the networks that judge, fine-tunes them briefly and reads validation images.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from gmn.errors import GmnError
from gmn.meta_job import MetaJob
from gmn.progress import track
from gmn.stages import stage
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
    with track("choosing the checkpoint", len(epochs).bit_length()) as advance:

        def too_inaccurate(epoch: int) -> bool:
            probes.append(_probe(job, epoch, finetune_images))
            advance(f"epoch {epoch}: {probes[-1].accuracy:.2%}")
            return probes[-1].accuracy < min_accuracy

        enough = bisect_left(epochs, True, key=too_inaccurate)
    if not enough:
        best = max(probes, key=lambda probe: probe.accuracy)
        got = f"{best.accuracy:.2%} with checkpoint {best.epoch}, the best of {len(probes)} probes"
        hint = "lower --min-accuracy, give --finetune-images, or meta-train with a smaller pruner_reg"
        raise GmnError("no checkpoint is accurate enough", expected=f"{min_accuracy:.2%}", got=got, hint=hint)
    return epochs[enough - 1], probes


def _probe(job: MetaJob, epoch: int, finetune_images: int) -> Probe:
    def measure() -> dict[str, float]:
        with stage(job.run.log, "choosing", probe=epoch, finetune_images=finetune_images):
            tuned = list(job.judged(epoch, job.brief(finetune_images)))
            pruned = [(kind, kind.pruned_to_target(model)) for kind, model in tuned]
        return {
            key: sum(evaluate(model, kind.data.val).accuracy for kind, model in models) / len(models)
            for key, models in (("accuracy", tuned), ("pruned", pruned))
        }

    found = job.run.recorded("probe", {"checkpoint": epoch, "finetune_images": finetune_images}, measure)
    return Probe(epoch, found["accuracy"], found["pruned"])
