"""The rows of the comparison, each a way from the unpruned network to a small one with the same fine-tuning budget.

    metanetwork           [initial pruning] -> metanetwork -> fine-tune -> prune -> fine-tune
    same-schedule         the same without the metanetwork
    sparse                the same, and the first fine-tuning adds report.sparse_reg * our sparsity loss
    torch-pruning-sparse  the same, with GroupNormPruner of torch-pruning, which regularizes and prunes
    direct                prune at once, then all of the fine-tuning: what a user would run, and the harder one to beat
    torch-pruning         the same, pruned by torch-pruning
    random                the same, by a random ranking, another one for each seed: what the criterion is worth

`sparse` is the control: a metanetwork that is not ahead of it does not earn its cost. Rows of `report.metanetworks` do
what `metanetwork` does, each with its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import nn

from gmn.budget import merged
from gmn.builder import Layout
from gmn.checkpoint import load_checked, load_model, save_model, saved_facts
from gmn.costs import Cost
from gmn.library_pruner import prune_with
from gmn.meta_job import MetaJob
from gmn.metanetwork import MetaNetwork
from gmn.progress import say
from gmn.settings import Fit
from gmn.stages import stage
from gmn.state_dict import checksum
from gmn.trace import clone
from gmn.training import evaluate
from gmn.weight_masks import WeightMask

Regularize = Callable[[], None]
DIGEST = "metanetwork_sha256"
"""Of a row, in its `model.json`: the digest of the metanetwork that it was made with; a row without one has none."""


def digest(metanetwork: MetaNetwork) -> str:
    """What tells a metanetwork from others."""
    return checksum(metanetwork.state_dict())


@dataclass(frozen=True)
class Trial:
    """One row with one fine-tuning seed, pruned to one speed-up.

    Attributes:
        job: The recipe at work.
        base: The network before any pruning; the one to distil from.
        start: The network after the initial pruning.
        metanetwork, layout: What was learnt.
        row, seed: Which row, and its number.
        stages: Validation accuracies on the way, which the row fills in.
        speed_up: The target; None: the recipe's `prune.speed_up`.
    """

    job: MetaJob
    base: nn.Module
    start: nn.Module
    metanetwork: MetaNetwork | None
    layout: Layout
    row: str
    seed: int
    stages: dict[str, float] = field(default_factory=dict)
    speed_up: float | None = None

    @property
    def target(self) -> float | None:
        """The speed-up to prune to; None where single weights go."""
        return self.speed_up or self.job.recipe.prune.speed_up

    @property
    def folder(self) -> Path:
        """Where its network is kept; those of further speed-ups have a folder each."""
        further = self.target != self.job.recipe.prune.speed_up
        return self._models / f"{self.target:g}x" / self._name if further else self._models / self._name

    @property
    def first(self) -> Path:
        """Where the network before pruning is kept if there are several speed-ups, which share it."""
        return self._models / "first" / self._name

    @property
    def _models(self) -> Path:
        return self.job.run.folder / "models"

    @property
    def _name(self) -> str:
        return f"{self.row}-seed{self.seed}"

    @property
    def _several(self) -> bool:
        return len(self.job.recipe.targets) > 1

    @cached_property
    def learnt(self) -> dict[str, str]:
        """The digest of this row's metanetwork, if it is a row with one."""
        learns = ROWS.get(self.row, metanetwork) is metanetwork
        return {DIGEST: digest(self.metanetwork)} if learns and self.metanetwork else {}

    def made(self, folder: Path) -> bool:
        """Whether a folder holds this row's network: `gmn select --use` may have changed the metanetwork since."""
        if (facts := saved_facts(folder)) is None:
            return False
        stated = facts.get(DIGEST)
        if stated is None or stated == self.learnt.get(DIGEST):  # an older gmn did not state it
            return True
        say(f"{folder.relative_to(self._models.parent)}: of another metanetwork than the run's; it is made again")
        return False

    @cached_property
    def before(self) -> Cost:
        """What the speed-up counts from."""
        return self.job.cost(self.base)

    @property
    def whole_budget(self) -> Fit | None:
        """All fine-tuning of the recipe as one."""
        return merged(self.job.recipe, len(self.job.data.train))

    def begin(self, metanetwork: MetaNetwork | None = None) -> nn.Module:
        """The network that the first fine-tuning starts from."""
        with self._stage("rewriting"):
            model = self.job.rewrite(self.start, metanetwork, self.layout)
        return self._noted("rewritten", model)

    def tune(self, model: nn.Module, regularize: Regularize | None = None) -> nn.Module:
        """The first fine-tuning, in place, if the recipe has one."""
        if settings := self.job.recipe.finetune.after_meta:
            title = f"{self.row} seed {self.seed}: fine-tuning"
            with self._stage("first fine-tuning"):
                self.job.fit(model, settings, 500 + self.seed, title, teacher=self.base, regularize=regularize)
            self._noted("fine-tuned", model)
        return model

    def once(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The network before pruning; with several speed-ups it is made for the first of them, and kept."""
        if not self._several:
            return make()
        if not self.made(self.first):
            model, facts = make().eval(), {"stages": self.stages, **self.learnt}
            save_model(self.first, model, self.job.source, **facts, input_shape=self.job.data.input_shape)
            self.job.run.forget()
        self.stages.update(load_checked(self.first / "model.json", {"stages": dict})["stages"])
        return load_model(self.first).to(self.job.device)

    def prune_and_end(self, model: nn.Module, settings: Fit | None = None, *, chance: int | None = None) -> nn.Module:
        """Prune with our scores, or by a random ranking of that seed; then the last fine-tuning."""
        with self._stage("pruning", speed_up=self.target):
            pruned = self.job.prune(model, self.target, self.before, chance=chance)
        return self.end(pruned.model, settings, pruned.weights)

    def prune_with_library(self, model: nn.Module, *, sparse: bool = False) -> nn.Module:
        """The network, pruned in place with torch-pruning's scores."""
        assert self.target is not None  # recipes refuse these rows with other patterns
        with self._stage("pruning", speed_up=self.target):
            pruner = self.job.library_pruner(model, sparse=sparse)
            model = prune_with(pruner, self.job.example, self.target, self.before, self.job.recipe.prune)
            self.job.recalibrate(model)
        return model

    def end(self, model: nn.Module, settings: Fit | None = None, mask: WeightMask | None = None) -> nn.Module:
        """The last fine-tuning, of a pruned network; default: the recipe's, if it has one. The mask stays."""
        where = f", {self.target:g}x" if self._several else ""
        title = f"{self.row} seed {self.seed}{where}: fine-tuning after pruning"
        settings = settings or self.job.recipe.finetune.after_prune
        self._noted("pruned", model)
        with self._stage("last fine-tuning", speed_up=self.target):
            if settings:
                self.job.fit(model, settings, 600 + self.seed, title, teacher=self.base, mask=mask)
        return model

    def _stage(self, name: str, **labels: float | None) -> AbstractContextManager[object]:
        return stage(self.job.run.log, name, row=self.row, seed=self.seed, **labels)

    def _noted(self, stage: str, model: nn.Module) -> nn.Module:
        self.stages[stage] = evaluate(model, self.job.data.val).accuracy
        return model


def metanetwork(trial: Trial) -> nn.Module:
    """The method itself."""
    return _schedule(trial, trial.metanetwork)


def same_schedule(trial: Trial) -> nn.Module:
    """Without the metanetwork."""
    return _schedule(trial, None)


def sparse(trial: Trial) -> nn.Module:
    """The paper's sparse training, with the loss that the metanetwork is trained with."""

    def train() -> nn.Module:
        model, recipe = trial.begin(), trial.job.recipe
        importance = trial.job.subject(model).importance

        def regularize() -> None:
            own = model.state_dict(keep_vars=True)
            loss = importance.sparsity_loss(own, scale_invariant=recipe.meta_train.scale_invariant)
            (recipe.report.sparse_reg * loss).backward()

        return trial.tune(model, regularize)

    return trial.prune_and_end(trial.once(train))


def torch_pruning_sparse(trial: Trial) -> nn.Module:
    """As `sparse`, with torch-pruning's regularizer, scores and pruner."""

    def train() -> nn.Module:
        model = trial.begin()
        pruner = trial.job.library_pruner(model, sparse=True)
        return trial.tune(model, lambda: pruner.regularize(model))

    return trial.end(trial.prune_with_library(trial.once(train), sparse=True))


def direct(trial: Trial) -> nn.Module:
    """Everything after pruning."""
    return trial.prune_and_end(trial.base, trial.whole_budget)


def random(trial: Trial) -> nn.Module:
    """As `direct`, by chance."""
    return trial.prune_and_end(trial.base, trial.whole_budget, chance=trial.job.seed(700 + trial.seed))


def torch_pruning(trial: Trial) -> nn.Module:
    """As `direct`, with torch-pruning's scores and pruner."""
    return trial.end(trial.prune_with_library(clone(trial.base)), trial.whole_budget)


def _schedule(trial: Trial, metanetwork: MetaNetwork | None) -> nn.Module:
    return trial.prune_and_end(trial.once(lambda: trial.tune(trial.begin(metanetwork))))


ROWS: dict[str, Callable[[Trial], nn.Module]] = {
    "metanetwork": metanetwork,
    "same-schedule": same_schedule,
    "sparse": sparse,
    "direct": direct,
    "random": random,
    "torch-pruning": torch_pruning,
    "torch-pruning-sparse": torch_pruning_sparse,
}
