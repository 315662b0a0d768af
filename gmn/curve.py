"""Accuracy against speed-up: prune a little, evaluate, repeat, without fine-tuning in between (GMN, section 4).

The paper fine-tunes once before, after the metanetwork; `Choices.finetune_images` does, and 0 is the default. The
weights' statistics of a run (`statistics.json`) are those before any fine-tuning too.

The flatter the curve, the easier a network is to prune. Its turning point is the speed-up at which accuracy falls
under a threshold. Validation images only, batch norms recalibrated as the recipe says. Where single weights go, the
share of the parameters that is left stands in place of the speed-up; of N:M there are M points: all, M - 1 of M, ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gmn.checkpoint import save_json
from gmn.costs import Cost
from gmn.errors import GmnError
from gmn.meta_job import MetaJob
from gmn.progress import Advance, track
from gmn.surgery import remove, settled
from gmn.trace import clone
from gmn.training import evaluate

POINTS = 8
IMAGES = 2000
Point = tuple[float, float]


@dataclass(frozen=True)
class Choices:
    """What is drawn: `drop` is how much accuracy may be lost before the turning point, `images` judge a point.

    `finetune_images`: how many each network is fine-tuned on after the metanetwork and before its curve; 0: none.
    """

    checkpoints: Sequence[int]
    points: int = 12
    images: int = IMAGES
    drop: float = 0.02
    finetune_images: int = 0


def curve_of(
    job: MetaJob, model: nn.Module, before: Cost, advance: Advance, *, points: int = POINTS, images: int = IMAGES
) -> list[Point]:
    """(speed-up, validation accuracy) of the whole network, and with `points` masks down to the last one.

    Where single weights go, (share of the parameters that is left, validation accuracy).
    """
    channels = job.recipe.prune.of_channels
    found: list[Point] = []
    for smaller in itertools.chain([clone(model)], (_cut if channels else _masked)(job, model, points)):
        job.recalibrate(smaller)
        accuracy, after = evaluate(smaller, job.data.val, limit=images).accuracy, job.cost(smaller)
        place = before.flops / after.flops if channels else after.parameters / before.parameters
        found.append((place, accuracy))
        advance(f"{place:.1f}x: {accuracy:.1%}" if channels else f"{place:.1%} left: {accuracy:.1%}")
    return found


def _cut(job: MetaJob, model: nn.Module, points: int) -> Iterator[nn.Module]:
    graph = job.graph(model)
    coupled = settled(model, graph.spec, job.example)
    masks = job.masks(model, graph.spec, coupled)
    for number in torch.linspace(0, len(masks) - 1, points).round().int().tolist():
        yield remove(model, graph.spec, masks[number], job.example, coupled=coupled)


def _masked(job: MetaJob, model: nn.Module, points: int) -> Iterator[nn.Module]:
    for mask in job.weight_masks(model, points):
        mask.apply(smaller := clone(model))
        yield smaller


def turning_point(points: Sequence[Point], threshold: float) -> float | None:
    """The speed-up at which accuracy first falls under a threshold, on straight lines between points; None: nowhere.

    Where points say what is left, the share that is left there.

    >>> turning_point([(1.0, 0.9), (2.0, 0.8), (4.0, 0.4)], 0.6)
    3.0
    >>> turning_point([(1.0, 0.9), (0.5, 0.8), (0.25, 0.4)], 0.6)
    0.375
    >>> turning_point([(1.0, 0.9), (2.0, 0.8)], 0.6) is None
    True
    """
    if points and points[0][1] < threshold:
        return points[0][0]
    for (speed, high), (faster, low) in itertools.pairwise(points):
        if low < threshold:
            return speed + (faster - speed) * (high - threshold) / (high - low)
    return None


def study(job: MetaJob, choices: Choices) -> dict[str, Any]:
    """Curves of a run's checkpoints on the network that judges them, also as `curves/curve.json`.

    Checkpoint 0 is no metanetwork. Speed-ups count from before an initial pruning. The threshold is the accuracy of
    that network less `drop`, with batch norms recalibrated like those of every point.

    Raises:
        GmnError: if the run has no checkpoints, or one is not there.
    """
    known = [0, *job.checkpoints()]
    if len(known) == 1:
        hint = "give the run of gmn meta-train that learnt the metanetwork"
        raise GmnError("the run has no checkpoints", where=str(job.run.folder), hint=hint)
    for epoch in choices.checkpoints:
        if epoch not in known:
            got, expected = str(epoch), f"one of {', '.join(map(str, known))}"
            raise GmnError("no such checkpoint", expected=expected, got=got, where=str(job.run.folder))
    index, judge = next(iter(job.judges.items()))
    job.recalibrate(usual := clone(judge))
    threshold = evaluate(usual, job.data.val, limit=choices.images).accuracy - choices.drop
    before = job.cost(job.built(index))
    found: dict[int, list[Point]] = {}
    axis = job.recipe.prune.measure
    with track(f"accuracy against {axis}", len(choices.checkpoints) * (choices.points + 1)) as advance:
        for epoch in choices.checkpoints:
            model = job.rewritten(index, job.at(epoch), job.brief(choices.finetune_images), f"checkpoint {epoch}")
            size = {"points": choices.points, "images": choices.images}
            found[epoch] = curve_of(job, model, before, advance, **size)
    turns = {epoch: turning_point(points, threshold) for epoch, points in found.items()}
    content = {
        "axis": axis,
        "threshold": threshold,
        "images": min(choices.images, len(job.data.val)),
        "finetune_images": choices.finetune_images,
        "curves": [{"checkpoint": e, "turning_point": turns[e], "points": points} for e, points in found.items()],
    }
    save_json(job.run.folder / "curves" / "curve.json", content)
    return content
