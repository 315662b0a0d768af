"""The networks of one kind that a metanetwork learns on and is judged by, on their way there and back."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from gmn.builder import Layout
from gmn.convert import to_model
from gmn.costs import Cost
from gmn.criteria import Importance
from gmn.errors import RecipeError
from gmn.groups import couplings
from gmn.limits import kept_whole
from gmn.meta_train import DataModel, Lesson
from gmn.metanetwork import MetaNetwork
from gmn.progress import say
from gmn.prune_job import PruneJob
from gmn.replicas import refuse_uneven
from gmn.settings import Fit
from gmn.training import epoch_and_batch
from gmn.weight_masks import WeightSparsity, reasons


class KindJob(PruneJob):
    """The data models of a recipe at work in a run folder: its own kind (`MetaJob`), or one of `data_models.also`."""

    def refuse_uneven(self) -> None:
        """TrainingError if several processes cannot share a training of the recipe, before the first one begins."""
        models, tuning = self.recipe.data_models, self.recipe.finetune
        fits = {"data_models.fit": models.fit, "data_models.initial_fit": models.initial_fit}
        fits |= {"finetune.after_meta": tuning.after_meta, "finetune.after_prune": tuning.after_prune}
        for name, settings in fits.items():
            if settings:
                refuse_uneven(epoch_and_batch(settings, len(self.data.train))[1], name)

    def rehearse(self, model: nn.Module, before: Cost) -> None:
        """Convert and prune a network once, before hours of training end in an error."""
        initial = self.recipe.data_models.initial_speed_up
        if initial != "auto" and initial > 1:  # what auto may find lies on the way to the target
            model = self._cut(model, initial)[0].model
        for target in self.recipe.targets:
            self._cut(model, target, before)
        self._find_weights(model)
        if self.dense:
            say(self.titled(f"stay dense: {reasons(self.dense)}"))

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

    def subjects(self) -> list[DataModel]:
        """All that there are to learn on, with what is learnt from on them."""
        lesson = Lesson(self.data.train, self.augment, self.recipe.meta_train.pruner_reg)
        models = map(self.data_model, range(self.recipe.data_models.train))
        return [replace(self.subject(model), lesson=lesson) for model in models]

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

    def rewritten(self, index: int, metanetwork: MetaNetwork | None, tuning: Fit | None, name: str) -> nn.Module:
        """A judge as a metanetwork makes it, fine-tuned; `name` says in the log which metanetwork it is."""
        model = self.rewrite(self.judges[index], metanetwork, self.layout)
        if tuning:
            teacher = self.unpruned(index) if tuning.distill else None
            self.fit(model, tuning, 400, f"fine-tuning after {name}", teacher=teacher)
        return model
