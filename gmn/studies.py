"""The studies of the MVP papers on a finished zoo: what similar tasks share, and what the vote makes of it.

iou         kept units that two tasks share, per layer and similarity        MVP figures 1, 2; MVP-SSL figure 3
recall      units with a votes that the task's own pruned network keeps      MVP-SSL figures 4, 8
neighbours  accuracy of the vote against the number of neighbours            MVP figure 5
iterations  accuracy against the steps, of the vote and without it           MVP figure 4
similarity  accuracy of the vote with near and with far neighbours           MVP figure 4
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from gmn import study_plots
from gmn.checkpoint import save_json
from gmn.errors import GmnError
from gmn.neighbours import Ranking
from gmn.overlap import iou, layer_names, recall
from gmn.plots import save_figure
from gmn.progress import track
from gmn.spread import spread
from gmn.trials import plan
from gmn.vote_compare import Result, measured
from gmn.vote_job import VoteJob
from gmn.vote_report import TITLES
from gmn.zoo import Task

FIFTHS = ("1", "2", "3", "4", "5")
VOTERS = 10  # of the recall study
Study = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """What a study is made of.

    Attributes:
        similarities: How near tasks are found; the study of near and far neighbours may compare several.
        targets: How many tasks it is averaged over.
        neighbours: Numbers of neighbours that vote.
        iterations: Numbers of steps.
    """

    similarities: Sequence[str]
    targets: int
    neighbours: Sequence[int]
    iterations: Sequence[int]

    @property
    def similarity(self) -> str:
        """The first of them."""
        return self.similarities[0]


def study(job: VoteJob, name: str, choices: Choices) -> Path:
    """Make a study of a run's zoo: studies/NAME.json and its pictures; returns the first picture.

    Raises:
        GmnError: if there is no such study, or too few tasks for it.
    """
    make, draw = STUDIES[name]
    content = {
        "study": name,
        "recipe": job.recipe.name,
        "similarity": ", ".join(choices.similarities),
        **make(job, choices),
    }
    folder = job.run.folder / "studies"
    save_json(folder / f"{name}.json", content)
    paths = [save_figure(figure(content), folder / file) for figure, file in draw]
    return paths[0]


# -- what tasks share --------------------------------------------------------------------------------------------------


def _iou(job: VoteJob, choices: Choices) -> Study:
    pairs: dict[str, list[Tensor]] = {group: [] for group in FIFTHS}
    for target, others in _zoo_targets(job, choices):
        own = job.zoo.masks([target.name])[0]
        for group in FIFTHS:
            if names := others.group(int(group)):
                pairs[group] += iou(own, job.zoo.masks(names), job.backbone.coupled).unbind()
    title = f"Shared units of two tasks, by {choices.similarity} ({job.recipe.ratio:.0%} pruned)"
    groups = {group: {**_moments(found), "pairs": len(found)} for group, found in pairs.items() if found}
    return {"title": title, "layers": layer_names(job.backbone.coupled), "groups": groups}


def _recall(job: VoteJob, choices: Choices) -> Study:
    b: dict[str, list[Tensor]] = {group: [] for group in FIFTHS}
    d: dict[str, list[Tensor]] = {group: [] for group in FIFTHS}
    for target, others in _zoo_targets(job, choices):
        own = job.zoo.masks([target.name])[0]
        for group in FIFTHS:
            names = others.group(int(group))[:VOTERS]
            if len(names) == VOTERS:
                found = recall(own, job.zoo.masks(names), job.backbone.coupled)
                b[group].append(found.b)
                d[group].append(found.d.double())
    every = [values for found in b.values() for values in found]
    if not every:
        raise GmnError("too few tasks", expected=f"{VOTERS} of one similarity to a target", got="fewer in every group")
    b["all"], d["all"] = every, [values for found in d.values() for values in found]
    layers, names = torch.stack(every).nanmean(0), layer_names(job.backbone.coupled)
    return {
        "title": f"Units by the votes of {VOTERS} neighbours of one similarity ({choices.similarity})",
        "neighbours": VOTERS,
        "groups": {group: _of_votes(b[group], d[group]) for group in b if b[group]},
        "layers": {name: {"b_mean": _plain(row)} for name, row in zip(names, layers, strict=True)},
    }


def _of_votes(b: list[Tensor], d: list[Tensor]) -> dict[str, Any]:
    """Means over targets and layers, and the spread over layers of the means over targets."""
    shares, counts = torch.stack(b).nanmean(0), torch.stack(d).mean(0)
    return {
        "b_mean": _plain(shares.nanmean(0)),
        "b_std": [spread([v for v in column.tolist() if v == v]) for column in shares.T],
        "d_mean": _plain(counts.mean(0)),
    }


def _zoo_targets(job: VoteJob, choices: Choices) -> Iterable[tuple[Task, Ranking]]:
    """Tasks of the zoo as targets, each with all others by similarity; their own pruned networks are known."""
    tasks = job.zoo.tasks(split="zoo")[: choices.targets]
    with track("comparing masks", len(tasks)) as advance:
        for task in tasks:
            found = job.ranking(task, choices.similarity)
            others = [(n, s) for n, s in zip(found.names, found.scores, strict=True) if n != task.name]
            yield task, Ranking(tuple(n for n, _ in others), tuple(s for _, s in others), found.flops)
            advance(task.name)


# -- what the vote makes of it -----------------------------------------------------------------------------------------


def _neighbours(job: VoteJob, choices: Choices) -> Study:
    more = {"similarity": choices.similarity}
    series = {"vote": _curve(job, choices, "vote", "neighbours", choices.neighbours, **more)}
    title = f"Neighbours that vote ({job.recipe.vote.fit.iterations} steps)"
    return {
        **{"title": title, "xlabel": "neighbours N", "log": False, "x_ticks": list(choices.neighbours)},
        **{"series": series, "references": _references(job, choices)},
    }


def _iterations(job: VoteJob, choices: Choices) -> Study:
    rows = [row for row in ("vote", "short", "random") if row == "vote" or row in job.recipe.report.baselines]
    series = {}
    for row in rows:
        more = {"similarity": choices.similarity} if row == "vote" else {}
        series[TITLES[row]] = _curve(job, choices, row, "iterations", choices.iterations, **more)
    return {
        **{"title": "Steps for one target", "xlabel": "steps of SGD", "log": True},
        **{"x_ticks": list(choices.iterations), "series": series, "references": {}},
    }


def _similarity(job: VoteJob, choices: Choices) -> Study:
    series: dict[str, Any] = {}
    for name, steps in itertools.product(choices.similarities, choices.iterations):
        each = [
            [r["test_accuracy"] for r in _measure(job, choices, "vote", group=n, iterations=steps, similarity=name)]
            for n in range(1, len(FIFTHS) + 1)
        ]
        series[f"{steps} steps" if len(choices.similarities) == 1 else f"{name}, {steps} steps"] = {
            "mean": [statistics.fmean(found) if found else None for found in each],
            "std": [spread(found) if found else None for found in each],
        }
    return {
        "title": f"Near and far neighbours: five groups of equal intervals of {' or '.join(choices.similarities)}",
        "xlabel": "group of similarity",
        "groups": ["1 (nearest)", "2", "3", "4", "5 (farthest)"],
        "series": series,
        "references": _references(job, choices),
    }


def _curve(job: VoteJob, choices: Choices, row: str, key: str, values: Sequence[int], **more: Any) -> Study:
    found = [[r["test_accuracy"] for r in _measure(job, choices, row, **{key: value}, **more)] for value in values]
    return {"x": list(values), "mean": [statistics.fmean(v) for v in found], "std": [spread(v) for v in found]}


def _measure(job: VoteJob, choices: Choices, row: str, **more: Any) -> list[Result]:
    """The results of a method on the first targets, all seeds; those without a neighbour of the group are left out."""
    targets = job.targets[: choices.targets]
    if group := more.get("group"):
        targets = [task for task in targets if job.ranking(task, more["similarity"]).group(group)]
    trials = [plan(job, row, task, seed, **more) for task in targets for seed in range(job.recipe.report.seeds)]
    return measured(job, trials, " ".join([row, ", ".join(f"{key} {value}" for key, value in more.items())]).strip())


def _references(job: VoteJob, choices: Choices) -> dict[str, float]:
    """Mean accuracies of the run's baselines on the targets of the study."""
    found: dict[str, float] = {}
    for row in job.recipe.report.baselines:
        if row != "nearest":
            found[TITLES[row]] = statistics.fmean(r["test_accuracy"] for r in _measure(job, choices, row))
    return found


# -- numbers -----------------------------------------------------------------------------------------------------------


def _moments(found: Sequence[Tensor]) -> dict[str, Any]:
    """Mean and standard deviation per layer."""
    stacked = torch.stack(list(found))
    deviation = stacked.std(0) if len(found) > 1 else torch.zeros(stacked.shape[1])
    return {"mean": _plain(stacked.mean(0)), "std": _plain(deviation)}


def _plain(values: Tensor) -> list[float | None]:
    """JSON knows no NaN."""
    return [value if value == value else None for value in values.tolist()]


Make = Callable[[VoteJob, Choices], Study]
Draw = Callable[[study_plots.Study], Figure]
STUDIES: dict[str, tuple[Make, tuple[tuple[Draw, str], ...]]] = {
    "iou": (_iou, ((study_plots.iou_figure, "iou.png"),)),
    "recall": (
        _recall,
        ((study_plots.recall_figure, "recall.png"), (study_plots.recall_layers_figure, "recall-layers.png")),
    ),
    "neighbours": (_neighbours, ((study_plots.lines_figure, "neighbours.png"),)),
    "iterations": (_iterations, ((study_plots.lines_figure, "iterations.png"),)),
    "similarity": (_similarity, ((study_plots.bars_figure, "similarity.png"),)),
}
