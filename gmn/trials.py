"""One network made smaller for one task: every method, every number of steps and of neighbours is a trial.

    vote      the nearest tasks vote, their means are the start
    nearest   the same with one neighbour
    random    units drawn at random, pre-trained weights
    reptile   one pruned meta-initialisation for all tasks
    short     the zoo's pruner within the same steps
    long      the zoo's pruner with many times the steps

A trial has two parts. What needs the zoo begins it: neighbours are found, they vote, a network is cut out. What needs
the images of the task alone, training and measuring, may be done on another machine. Validation images choose nothing
in it; test images are read once, at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gmn.costs import cost, training_flops
from gmn.data import Augment, Data
from gmn.errors import GmnError
from gmn.groups import KeepMask
from gmn.settings import Fit
from gmn.tasks import task_data, with_head
from gmn.training import evaluate, fit
from gmn.vote import draw
from gmn.vote_job import VoteJob
from gmn.vote_prune import cut_out, vote_for
from gmn.zoo import Task
from gmn.zoo_build import CPU, Device, Pruner, pruner


@dataclass(frozen=True)
class Trial:
    """What decides a trial, beside the recipe.

    Attributes:
        row: The method.
        target: Name of the task.
        seed: Repetition.
        iterations: Steps of fine-tuning, or of pruning and fine-tuning.
        neighbours: How many tasks vote; 0 where none do.
        similarity: How they are found.
        group: Which fifth of the similarities they are from, 1 the nearest; 0: the nearest of all.
        zoo: Which tasks they were chosen among, see `gmn.neighbours.electorate`; empty where none vote.
    """

    row: str
    target: str
    seed: int
    iterations: int
    neighbours: int = 0
    similarity: str = ""
    group: int = 0
    zoo: str = ""


Training = Callable[[nn.Module, Data, int], tuple[nn.Module, float]]
"""Of a network on a task's data, with a seed; what comes out, and the FLOPs it took. It may travel."""


@dataclass(frozen=True)
class Begun:
    """A trial whose network is chosen.

    Attributes:
        model: With a head for the task, before its training.
        keep: The nodes of the full network that it has; None where the training decides.
        search_flops: What it took to find the neighbours.
        voters: How many tasks voted; of a group there may be fewer than the trial asks for.
    """

    trial: Trial
    task: Task
    seed: int
    model: nn.Module
    train: Training
    keep: KeepMask | None = None
    search_flops: float = 0.0
    voters: int = 0


@dataclass(frozen=True)
class Finished:
    """A network at the end of a trial, and what was measured."""

    model: nn.Module
    result: dict[str, Any]


def plan(job: VoteJob, row: str, target: Task, seed: int, **more: Any) -> Trial:
    """A trial as the recipe has it, but for what is said."""
    recipe = job.recipe
    steps = (recipe.vote.fit.iterations or 0) * (recipe.report.long if row == "long" else 1)
    trial = Trial(row, target.name, seed, more.pop("iterations", steps))
    if row in ("vote", "nearest"):
        own = {"neighbours": recipe.vote.neighbours if row == "vote" else 1, "similarity": recipe.similarity.name}
        trial = dataclasses.replace(trial, **{**own, **more}, zoo=job.electorate)
    return trial


def begin(job: VoteJob, trial: Trial) -> Begun:
    """Choose the network of a trial.

    Raises:
        GmnError: if the method cannot be applied, such as to a zoo without enough sound neighbours.
    """
    task = next(task for task in job.targets if task.name == trial.target)
    return ROWS[trial.row](job, trial, task)


def finish(data: Data, device: Device | None, begun: Begun) -> Finished:
    """Train the network of a trial, and measure it.

    Args:
        data: All images; the task's are taken out of them.
        device: Says in a worker elsewhere where to train; what comes back is on the CPU.

    Raises:
        GmnError: if the training cannot go on.
    """
    at = None if device is None else device()
    own = task_data(data if at is None else data.to(at), begun.task.classes)
    model, spent = begun.train(begun.model if at is None else begun.model.to(at), own, begun.seed)
    after = cost(model, own.example_inputs())
    result = {
        **dataclasses.asdict(begun.trial),
        "validation_accuracy": evaluate(model, own.val).accuracy,
        "test_accuracy": evaluate(model, own.test).accuracy,
        "training_flops": spent,
        "search_flops": begun.search_flops,
        "voters": begun.voters,
        **dataclasses.asdict(after),
    }
    return Finished(model if at is None else model.to(CPU), result)


# -- the methods -------------------------------------------------------------------------------------------------------


def _vote(job: VoteJob, trial: Trial, task: Task) -> Begun:
    found, seed, own = job.ranking(task, trial.similarity), _seed(job, trial, task), job.recipe.vote
    names = found.nearest(trial.neighbours) if not trial.group else _some(found.group(trial.group), trial, seed)
    options: dict[str, Any] = {"ratio": job.recipe.ratio, "tau": own.tau, "ties": own.ties, "seed": seed}
    model, mask = vote_for(job.backbone, job.zoo, names, job.data_of(task), None, **options)
    return Begun(trial, task, seed, model, _tuning(job, trial), mask, found.flops, len(names))


def _seed(job: VoteJob, trial: Trial, task: Task) -> int:
    """Of everything random in a trial: another one for every target, so that a draw is not the same for all."""
    return job.seed(trial.seed) + 1_000_003 * task.seed


def _some(names: list[str], trial: Trial, seed: int) -> list[str]:
    """As many of a group, drawn by the trial's seed, in their order; all if there are fewer."""
    if not names:
        raise GmnError("no task of the zoo is that similar", got=f"group {trial.group} of {trial.target}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return [names[index] for index in sorted(order[: trial.neighbours].tolist())]


def _random(job: VoteJob, trial: Trial, task: Task) -> Begun:
    coupled, seed = job.backbone.coupled, _seed(job, trial, task)
    generator = torch.Generator().manual_seed(seed)
    keep = draw(torch.zeros(coupled.num_channels), coupled, job.recipe.ratio, generator, tau=1.0)
    mask = KeepMask(coupled.nodes(keep))
    model = cut_out(job.backbone, job.backbone.model.state_dict(), mask, len(task.classes), seed=seed)
    return Begun(trial, task, seed, model, _tuning(job, trial), mask)


def _reptile(job: VoteJob, trial: Trial, task: Task) -> Begun:
    seed = _seed(job, trial, task)
    model = with_head(job.reptile_network, job.backbone.head, len(task.classes), seed=seed)
    return Begun(trial, task, seed, model, _tuning(job, trial))


def _pruned(job: VoteJob, trial: Trial, task: Task) -> Begun:
    seed, recipe = _seed(job, trial, task), job.recipe
    prune = pruner(recipe.zoo.pruning.within(trial.iterations), job.example, recipe.ratio, augment=job.augment)
    return Begun(trial, task, seed, job.backbone.with_head(len(task.classes), seed=seed), partial(_prune, prune))


def _prune(prune: Pruner, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float]:
    shrunk = prune(model, data.train, seed)
    return shrunk.model, shrunk.training_flops


def _tuning(job: VoteJob, trial: Trial) -> Training:
    config = job.recipe.vote.fit.model_copy(update={"iterations": trial.iterations})
    return partial(_tune, config, job.augment, trial.row)


def _tune(
    config: Fit, augment: Augment, title: str, model: nn.Module, data: Data, seed: int
) -> tuple[nn.Module, float]:
    fit(model, data.train, config, seed=seed, augment=augment, title=title)
    images = (config.iterations or 0) * min(config.batch_size, len(data.train))
    return model.eval(), training_flops(model, data.example_inputs(), images)


Method = Callable[[VoteJob, Trial, Task], Begun]
ROWS: dict[str, Method] = {
    **{"vote": _vote, "nearest": _vote, "random": _random, "reptile": _reptile},
    **{"short": _pruned, "long": _pruned},
}
