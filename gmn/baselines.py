"""The rows of the comparison, each a way from the unpruned network to a small one with the same fine-tuning budget.

    metanetwork           [initial pruning] -> metanetwork -> fine-tune -> prune -> fine-tune
    same-schedule         the same without the metanetwork
    sparse                the same, and the first fine-tuning adds report.sparse_reg * our sparsity loss
    torch-pruning-sparse  the same, with GroupNormPruner of torch-pruning, which regularizes and prunes
    direct                prune at once, then all of the fine-tuning: what a user would run, and the harder one to beat
    torch-pruning         the same, pruned by torch-pruning
    random                the same, by a random ranking, another one for each seed: what the criterion is worth

`sparse` is the control: a metanetwork that is not ahead of it does not earn its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from gmn.budget import merged
from gmn.builder import Layout
from gmn.costs import Cost, cost
from gmn.library_pruner import Pruner, prune_with
from gmn.meta_job import MetaJob
from gmn.metanetwork import MetaNetwork
from gmn.settings import Fit
from gmn.trace import clone
from gmn.training import evaluate, recalibrate

Regularize = Callable[[], None]


@dataclass(frozen=True)
class Trial:
    """One row with one fine-tuning seed.

    Attributes:
        job: The recipe at work.
        base: The network before any pruning; the one to distil from.
        start: The network after the initial pruning.
        metanetwork, layout: What was learnt.
        row, seed: Which row, and its number.
        stages: Validation accuracies on the way, which the row fills in.
    """

    job: MetaJob
    base: nn.Module
    start: nn.Module
    metanetwork: MetaNetwork | None
    layout: Layout
    row: str
    seed: int
    stages: dict[str, float] = field(default_factory=dict)

    @cached_property
    def before(self) -> Cost:
        """What the speed-up counts from."""
        return cost(self.base, self.job.example)

    @property
    def whole_budget(self) -> Fit:
        """All fine-tuning of the recipe as one."""
        return merged(self.job.recipe, len(self.job.data.train))

    def begin(self, metanetwork: MetaNetwork | None = None) -> nn.Module:
        """The network that the first fine-tuning starts from."""
        return self._noted("rewritten", self.job.rewrite(self.start, metanetwork, self.layout))

    def tune(self, model: nn.Module, regularize: Regularize | None = None) -> None:
        """The first fine-tuning, if the recipe has one."""
        if settings := self.job.recipe.finetune.after_meta:
            title = f"{self.row} seed {self.seed}: fine-tuning"
            self.job.fit(model, settings, 500 + self.seed, title, teacher=self.base, regularize=regularize)
            self._noted("fine-tuned", model)

    def prune(self, model: nn.Module, *, chance: int | None = None) -> nn.Module:
        """The smaller network, with our scores, or by a random ranking of that seed."""
        return self.job.prune(model, self.job.recipe.prune.speed_up, self.before, chance=chance).model

    def prune_with(self, pruner: Pruner) -> nn.Module:
        """The smaller network, with torch-pruning's scores."""
        recipe = self.job.recipe
        model = prune_with(pruner, self.job.example, recipe.prune.speed_up, self.before)
        recalibrate(model, self.job.data.train, recipe.prune.recalibrate, seed=recipe.seed)
        return model

    def end(self, model: nn.Module, settings: Fit | None = None) -> nn.Module:
        """The last fine-tuning, of a pruned network; default: the recipe's."""
        title = f"{self.row} seed {self.seed}: fine-tuning after pruning"
        settings = settings or self.job.recipe.finetune.after_prune
        self.job.fit(self._noted("pruned", model), settings, 600 + self.seed, title, teacher=self.base)
        return model

    def _noted(self, stage: str, model: nn.Module) -> nn.Module:
        self.stages[stage] = evaluate(model, self.job.data.val).accuracy
        return model


def metanetwork(trial: Trial) -> nn.Module:
    """The method itself."""
    return _schedule(trial, trial.begin(trial.metanetwork))


def same_schedule(trial: Trial) -> nn.Module:
    """Without the metanetwork."""
    return _schedule(trial, trial.begin())


def sparse(trial: Trial) -> nn.Module:
    """The paper's sparse training, with the loss that the metanetwork is trained with."""
    model, recipe = trial.begin(), trial.job.recipe
    importance = trial.job.subject(model).importance

    def regularize() -> None:
        own = model.state_dict(keep_vars=True)
        loss = importance.sparsity_loss(own, scale_invariant=recipe.meta_train.scale_invariant)
        (recipe.report.sparse_reg * loss).backward()

    return _schedule(trial, model, regularize)


def torch_pruning_sparse(trial: Trial) -> nn.Module:
    """As `sparse`, with torch-pruning's regularizer, scores and pruner."""
    model = trial.begin()
    pruner = trial.job.library_pruner(model, sparse=True)
    trial.tune(model, lambda: pruner.regularize(model))
    return trial.end(trial.prune_with(pruner))


def direct(trial: Trial) -> nn.Module:
    """Everything after pruning."""
    return trial.end(trial.prune(trial.base), trial.whole_budget)


def random(trial: Trial) -> nn.Module:
    """As `direct`, by chance."""
    return trial.end(trial.prune(trial.base, chance=trial.job.seed(700 + trial.seed)), trial.whole_budget)


def torch_pruning(trial: Trial) -> nn.Module:
    """As `direct`, with torch-pruning's scores and pruner."""
    return trial.end(trial.prune_with(trial.job.library_pruner(clone(trial.base))), trial.whole_budget)


def _schedule(trial: Trial, model: nn.Module, regularize: Regularize | None = None) -> nn.Module:
    trial.tune(model, regularize)
    return trial.end(trial.prune(model))


ROWS: dict[str, Callable[[Trial], nn.Module]] = {
    "metanetwork": metanetwork,
    "same-schedule": same_schedule,
    "sparse": sparse,
    "direct": direct,
    "random": random,
    "torch-pruning": torch_pruning,
    "torch-pruning-sparse": torch_pruning_sparse,
}
