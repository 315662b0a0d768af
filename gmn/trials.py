"""One network made smaller for one task: every method, every number of steps and of neighbours is a trial.

    vote      the nearest tasks vote, their means are the start
    nearest   the same with one neighbour
    random    units drawn at random, pre-trained weights
    reptile   one pruned meta-initialisation for all tasks
    short     the zoo's pruner within the same steps
    long      the zoo's pruner with many times the steps

A trial is finished once: validation images chose nothing in it, test images are read at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gmn.costs import cost, training_flops
from gmn.data import Data
from gmn.errors import GmnError
from gmn.filter_pruning import Shrunk
from gmn.groups import KeepMask
from gmn.settings import Fit
from gmn.tasks import with_layer
from gmn.training import evaluate, fit
from gmn.vote import draw
from gmn.vote_job import VoteJob
from gmn.vote_prune import cut_out, vote_for
from gmn.zoo import Task
from gmn.zoo_build import pruner


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
    """

    row: str
    target: str
    seed: int
    iterations: int
    neighbours: int = 0
    similarity: str = ""
    group: int = 0


@dataclass(frozen=True)
class Finished:
    """A network at the end of a trial."""

    model: nn.Module
    keep: KeepMask | None
    training_flops: float
    search_flops: float = 0.0

    def shrunk(self) -> Shrunk:
        """The same for a zoo."""
        if self.keep is None:
            raise GmnError("a network without a mask cannot join a zoo")
        return Shrunk(self.model, self.keep, self.training_flops)


def plan(job: VoteJob, row: str, target: Task, seed: int, **more: Any) -> Trial:
    """A trial as the recipe has it, but for what is said."""
    recipe = job.recipe
    steps = (recipe.vote.fit.iterations or 0) * (recipe.report.long if row == "long" else 1)
    trial = Trial(row, target.name, seed, more.pop("iterations", steps))
    if row in ("vote", "nearest"):
        own = {"neighbours": recipe.vote.neighbours if row == "vote" else 1, "similarity": recipe.similarity.name}
        trial = dataclasses.replace(trial, **{**own, **more})
    return trial


def run_trial(job: VoteJob, trial: Trial) -> tuple[Finished, dict[str, Any]]:
    """Make the network, and measure it.

    Raises:
        GmnError: if the method cannot be applied, such as to a zoo without enough sound neighbours.
    """
    task = next(task for task in job.targets if task.name == trial.target)
    data = job.data_of(task)
    finished = ROWS[trial.row](job, trial, task, data)
    after = cost(finished.model, job.example)
    return finished, {
        **dataclasses.asdict(trial),
        "validation_accuracy": evaluate(finished.model, data.val).accuracy,
        "test_accuracy": evaluate(finished.model, data.test).accuracy,
        "training_flops": finished.training_flops,
        "search_flops": finished.search_flops,
        **dataclasses.asdict(after),
    }


# -- the methods -------------------------------------------------------------------------------------------------------


def _vote(job: VoteJob, trial: Trial, task: Task, data: Data) -> Finished:
    found = job.ranking(task, trial.similarity)
    names = found.nearest(trial.neighbours) if not trial.group else _some(found.group(trial.group), trial)
    config, recipe = _tuning(job, trial), job.recipe
    model, mask = vote_for(
        job.backbone,
        job.zoo,
        names,
        data,
        config,
        ratio=recipe.ratio,
        tau=recipe.vote.tau,
        seed=job.seed(trial.seed),
        augment=job.augment,
    )
    return Finished(model, mask, _tuning_flops(job, model, config, data), found.flops)


def _some(names: list[str], trial: Trial) -> list[str]:
    """As many of a group, drawn by the trial's seed; all if there are fewer."""
    if not names:
        raise GmnError("no task of the zoo is that similar", got=f"group {trial.group} of {trial.target}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(trial.seed))
    return [names[index] for index in order[: trial.neighbours].tolist()]


def _random(job: VoteJob, trial: Trial, task: Task, data: Data) -> Finished:
    coupled, seed = job.backbone.coupled, job.seed(trial.seed)
    generator = torch.Generator().manual_seed(seed)
    keep = draw(torch.zeros(coupled.num_channels), coupled, job.recipe.ratio, generator, tau=1.0)
    mask = KeepMask(coupled.nodes(keep))
    model = cut_out(job.backbone, job.backbone.model.state_dict(), mask, data.num_classes, seed=seed)
    return _tuned(job, trial, model, mask, data)


def _reptile(job: VoteJob, trial: Trial, task: Task, data: Data) -> Finished:
    model = with_layer(job.reptile_network, job.backbone.head, data.num_classes, seed=job.seed(trial.seed))
    return _tuned(job, trial, model, None, data)


def _pruned(job: VoteJob, trial: Trial, task: Task, data: Data) -> Finished:
    seed = job.seed(trial.seed)
    model = job.backbone.with_head(data.num_classes, seed=seed)
    config = job.recipe.zoo.pruning.within(trial.iterations)
    shrunk = pruner(config, job.example, job.recipe.ratio, augment=job.augment)(model, data.train, seed)
    return Finished(shrunk.model, KeepMask(job.backbone.widened(shrunk.keep.keep)), shrunk.training_flops)


def _tuned(job: VoteJob, trial: Trial, model: nn.Module, mask: KeepMask | None, data: Data) -> Finished:
    config = _tuning(job, trial)
    fit(model, data.train, config, seed=job.seed(trial.seed), augment=job.augment, title=trial.row)
    return Finished(model, mask, _tuning_flops(job, model, config, data))


def _tuning(job: VoteJob, trial: Trial) -> Fit:
    return job.recipe.vote.fit.model_copy(update={"iterations": trial.iterations})


def _tuning_flops(job: VoteJob, model: nn.Module, config: Fit, data: Data) -> float:
    images = (config.iterations or 0) * min(config.batch_size, len(data.train))
    return training_flops(model, job.example, images)


Method = Callable[[VoteJob, Trial, Task, Data], Finished]
ROWS: dict[str, Method] = {
    **{"vote": _vote, "nearest": _vote, "random": _random, "reptile": _reptile},
    **{"short": _pruned, "long": _pruned},
}
