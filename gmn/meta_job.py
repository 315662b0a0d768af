"""A metanetwork recipe at work: data models, meta-training, the choice of a checkpoint, rewriting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from gmn.builder import Layout
from gmn.checkpoint import (
    load_metanetwork,
    load_sound,
    optimizer_tensors,
    restore_optimizer,
    save_metanetwork,
)
from gmn.convert import to_model
from gmn.costs import cost
from gmn.criteria import Importance, refuse_no_loss
from gmn.data import Data
from gmn.distributed import team
from gmn.errors import MALFORMED, CheckpointError, RecipeError, of_machine, one_line
from gmn.groups import couplings
from gmn.learnt import Learnt, adopt, further, named
from gmn.library_pruner import prune_with
from gmn.limits import kept_whole
from gmn.meta_shares import shares_of
from gmn.meta_train import TITLE, DataModel, train_metanetwork
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.progress import say, track
from gmn.prune_job import PruneJob
from gmn.replicas import refuse_uneven
from gmn.run import METANETWORK_FILE, Run
from gmn.settings import Fit, Recipe
from gmn.stages import stage
from gmn.trace import clone
from gmn.training import epoch_and_batch, evaluate, make_optimizer
from gmn.weight_masks import WeightSparsity, reasons


class MetaJob(PruneJob):
    """A metanetwork recipe at work in a run folder.

    Args:
        recipe: What to do.
        run: The run folder.
        learnt: The metanetwork of another run, to prune with.
        data: The recipe's data, if they are loaded already.
        learns: Whether it meta-trains one.

    Raises:
        GmnError: if a network, the metanetwork, the target or the criterion do not go together.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        learnt: Learnt | None = None,
        data: Data | None = None,
        *,
        learns: bool = False,
    ) -> None:
        if (learns or "sparse" in recipe.report.baselines) and recipe.prune.of_channels:  # both have a sparsity loss
            refuse_no_loss(recipe.criterion)
        super().__init__(recipe, run, data)
        self._refuse_uneven(learns)
        self.further = further(recipe, run)
        self._rehearse(learnt)
        run.start()
        for label, path in recipe.report.metanetworks.items():
            adopt(run, label, path)

    def _refuse_uneven(self, learns: bool) -> None:
        """TrainingError if several processes cannot share a training of the recipe, before the first one begins."""
        models, tuning = self.recipe.data_models, self.recipe.finetune
        fits = {"data_models.fit": models.fit, "data_models.initial_fit": models.initial_fit}
        fits |= {"finetune.after_meta": tuning.after_meta, "finetune.after_prune": tuning.after_prune}
        for name, settings in fits.items():
            if settings:
                refuse_uneven(epoch_and_batch(settings, len(self.data.train))[1], name)
        if learns:
            shares_of(self.recipe.meta_train, team())

    def _rehearse(self, learnt: Learnt | None) -> None:
        """Build, convert, prune, and meet the metanetwork once, before hours of training end in an error."""
        model = self.built(0)
        before = cost(model, self.example)
        if learnt:
            learnt[0].check(self.graph(model, learnt[1]).spec)
        for label, (metanetwork, layout) in self.further.items():
            with named(label):
                metanetwork.check(self.graph(model, layout).spec)
        targets, initial = self.recipe.targets, self.recipe.data_models.initial_speed_up
        most = targets[-1]
        if most is not None and any(row.startswith("torch-pruning") for row in self.recipe.report.baselines):
            prune_with(self.library_pruner(clone(model)), self.example, most, before, self.recipe.prune)
        if initial != "auto" and initial > 1:  # what auto may find lies on the way to the target
            model = self._cut(model, initial)[0].model
        for target in targets:
            self._cut(model, target, before)
        self._find_weights(model)
        if self.dense:
            say(f"stay dense: {reasons(self.dense)}")

    def data_model(self, index: int) -> nn.Module:
        """A network for the metanetwork to learn on."""
        return self.keep(f"data-models/{index}", lambda: self.initially_pruned(self.unpruned(index), index))

    def unpruned(self, index: int) -> nn.Module:
        """Network `index` before any pruning; kept where fine-tuning in the choice of a checkpoint distils from it."""
        tuning = self.recipe.finetune.after_meta or self.recipe.finetune.after_prune  # see `brief`
        if tuning and tuning.distill:
            return self.keep(f"data-models/{index}-unpruned", lambda: self.trained(index))
        return self.trained(index)

    @cached_property
    def judges(self) -> dict[int, nn.Module]:
        """The data models that choose a checkpoint, by number: held out, if the recipe has such."""
        learners, held_out = self.recipe.data_models.train, self.recipe.data_models.val
        numbers = range(learners, learners + held_out) if held_out else range(learners)
        return {index: self.data_model(index) for index in numbers}

    def subject(self, model: nn.Module) -> DataModel:
        """A data model with its graph and its scores' bookkeeping."""
        graph = self.graph(model)
        if not self.recipe.prune.of_channels:
            return DataModel(model, graph, WeightSparsity(self.axes, self.recipe.prune.n_of_m))
        coupled = kept_whole(graph.spec, couplings(graph.spec), self.recipe.prune)
        importance = Importance(graph.spec, coupled, self.criterion)
        return DataModel(model, graph, importance)

    def checkpoint(self, epoch: int) -> Path:
        """Where the metanetwork of an epoch is saved."""
        return self.run.folder / "checkpoints" / f"epoch-{epoch:03d}.safetensors"

    def checkpoints(self) -> list[int]:
        """The epochs whose metanetwork is saved."""
        return [epoch for epoch in range(1, self.recipe.meta_train.epochs + 1) if self.checkpoint(epoch).is_file()]

    def learn(self) -> None:
        """Meta-train; one checkpoint per epoch. A stopped run goes on after the last, and makes damaged ones again."""
        subjects: list[DataModel] = []
        for start, end in self._missing():
            if start < end and not self._no_better(start):
                subjects = subjects or [self.subject(self.data_model(i)) for i in range(self.recipe.data_models.train)]
                self._learn(subjects, start, end)

    def _missing(self) -> Iterator[tuple[int, int]]:
        """Ranges of epochs without a sound checkpoint: the last one before, and the last of them."""
        epochs = self.recipe.meta_train.epochs
        sound = [epoch for epoch in range(1, epochs + 1) if load_sound(self.checkpoint(epoch))]
        gaps = [(start, end - 1) for start, end in pairwise([0, *sound]) if end - start > 1]
        for gap in gaps:
            self.run.forget()  # what is under way there is of a later epoch
            yield gap
        yield max(sound, default=0), epochs

    def _learn(self, subjects: list[DataModel], start: int, end: int) -> None:
        """Meta-train from the checkpoint of one epoch to that of another."""
        metanetwork = self.new_metanetwork(subjects).train()
        optimizer = make_optimizer(metanetwork, self.recipe.meta_train)
        if start:
            self._go_on(start, metanetwork, optimizer)

        def save(epoch: int, optimizer: Optimizer) -> bool:
            epoch_done(epoch=epoch + 1)
            state = optimizer_tensors(optimizer)
            save_metanetwork(self.checkpoint(epoch + 1), metanetwork, self.layout, **state)
            return self._no_better(epoch + 1) or epoch + 1 == end

        with stage(self.run.log, "meta-training") as epoch_done:
            train_metanetwork(
                metanetwork,
                subjects,
                self.data.train,
                self.recipe.meta_train,
                seed=self.recipe.seed,
                augment=self.augment,
                start=start,
                optimizer=optimizer,
                log=self.run.logger("meta-train"),
                after_epoch=save,
                bookmark=self.bookmark(TITLE),
            )

    def _go_on(self, epoch: int, metanetwork: MetaNetwork, optimizer: Optimizer) -> None:
        """Fill metanetwork and optimizer from the checkpoint of an epoch."""
        path = self.checkpoint(epoch)
        saved, _, tensors = load_metanetwork(path)
        try:
            metanetwork.load_state_dict(saved.state_dict())
            restore_optimizer(optimizer, tensors)
        except MALFORMED as error:
            if of_machine(error):
                raise
            hint = "delete it, and the one before it is taken"
            raise CheckpointError("not of this run", got=one_line(error), where=str(path), hint=hint) from error
        say(f"meta-training goes on after epoch {epoch}")

    def new_metanetwork(self, subjects: list[DataModel]) -> MetaNetwork:
        """An untrained metanetwork with an encoder for every kind of edge in the data models."""
        kinds: dict[str, int] = {}
        for subject in subjects:
            kinds |= subject.graph.spec.edge_kinds
        size = self.recipe.metanetwork.model_dump()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            network = MetaNetwork(MetaNetworkConfig(len(self.layout.columns), kinds, **size))
        return network.to(self.device)

    def _no_better(self, done: int) -> bool:
        """Look at the checkpoints so far as the recipe says; whether its patience is at an end."""
        settings = self.recipe.meta_train
        looks = range(settings.eval_every, done + 1, settings.eval_every) if settings.eval_every else ()
        scores = [self.score(epoch) for epoch in looks]
        best = max(range(len(scores)), key=scores.__getitem__, default=0)
        over = bool(settings.patience) and len(scores) - 1 - best >= settings.patience
        if over and done < settings.epochs:
            say(f"meta-training stops after epoch {done}: no better than epoch {looks[best]}")
        return over

    def select(self) -> Learnt:
        """The checkpoint whose networks have the best validation accuracy when pruned, before the last fine-tuning.

        Checkpoint 0 is no metanetwork: it is measured for comparison and never chosen.
        """
        target = self.run.folder / METANETWORK_FILE
        if load_sound(target, "the checkpoint is chosen again") is None:
            scores: dict[int, float] = {}
            epochs = [0, *self.checkpoints()]
            with track("choosing the checkpoint", len(epochs)) as advance:
                for epoch in epochs:
                    scores[epoch] = self.score(epoch)
                    advance(f"epoch {epoch}: {scores[epoch]:.1%}")
            best = max(epochs[1:], key=lambda epoch: scores[epoch])
            say(
                f"checkpoint {best}: {scores[best]:.2%} after pruning, without metanetwork {scores[0]:.2%} (validation)"
            )
            metanetwork, layout, _ = load_metanetwork(self.checkpoint(best))
            save_metanetwork(target, metanetwork, layout)
        metanetwork, layout, _ = load_metanetwork(target)
        return metanetwork.to(self.device), layout

    def score(self, epoch: int) -> float:
        """Mean validation accuracy of the judges: rewritten by a checkpoint, fine-tuned as the recipe says, pruned.

        It is logged, and looked up when it is asked for again.
        """

        def look() -> dict[str, float]:
            with stage(self.run.log, "choosing", checkpoint=epoch):
                models = [self.rewritten(index, epoch, self.recipe.finetune.after_meta) for index in self.judges]
                accuracies = [evaluate(self.pruned_to_target(model), self.data.val).accuracy for model in models]
            return {"validation_accuracy": sum(accuracies) / len(accuracies)}

        return self.run.recorded("select", {"epoch": epoch}, look)["validation_accuracy"]

    def rewritten(self, index: int, epoch: int, tuning: Fit | None) -> nn.Module:
        """A judge as a checkpoint makes it, fine-tuned; checkpoint 0 is no metanetwork."""
        metanetwork = load_metanetwork(self.checkpoint(epoch))[0].to(self.device) if epoch else None
        model = self.rewrite(self.judges[index], metanetwork, self.layout)
        if tuning:
            teacher = self.unpruned(index) if tuning.distill else None
            self.fit(model, tuning, 400, f"fine-tuning after checkpoint {epoch}", teacher=teacher)
        return model

    def brief(self, images: int) -> Fit | None:
        """A fine-tuning as in the recipe on so many images; 0: none."""
        if not images:
            return None
        usual = self.recipe.finetune.after_meta or self.recipe.finetune.after_prune
        if usual is None:
            hint = "leave --finetune-images out, or give 0"
            raise RecipeError("the recipe has no fine-tuning to be brief with", where=self.recipe.name, hint=hint)
        steps = max(1, images // min(usual.batch_size, len(self.data.train)))
        change = {"epochs": 1, "iterations": steps, "milestones": [], "images_per_epoch": None}
        change["warmup"] = usual.warmup / usual.epochs  # the same share of the steps
        return usual.model_copy(update=change)

    def pruned_to_target(self, model: nn.Module) -> nn.Module:
        """A data model pruned as far as the recipe says; its initial pruning lies behind it."""
        target = self.recipe.prune.speed_up
        return self.prune(model, target and max(target / self.initial_speed_up, 1.01)).model

    def rewrite(self, model: nn.Module, metanetwork: MetaNetwork | None, layout: Layout) -> nn.Module:
        """Network -> graph -> metanetwork -> graph -> network.

        The batch norms keep their running statistics, unless the recipe recalibrates them after the metanetwork.
        """
        graph = self.graph(model, layout)
        if metanetwork is None:
            return to_model(graph)
        with torch.no_grad():
            model = to_model(metanetwork(graph))
        self.recalibrate(model, self.recipe.finetune.recalibrate_after_meta)
        return model
