"""A metanetwork recipe at work: data models, meta-training, the choice of a checkpoint, rewriting, pruning."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gmn.api import zoo_path
from gmn.backbone import Backbone
from gmn.builder import Layout
from gmn.checkpoint import (
    load_metanetwork,
    optimizer_tensors,
    restore_optimizer,
    save_metanetwork,
)
from gmn.convert import layouts, to_graph, to_model
from gmn.costs import Cost, cost
from gmn.criteria import Importance, refuse_no_loss
from gmn.errors import GmnError
from gmn.gradients import gradients_for
from gmn.graph import GraphSpec, NetworkGraph
from gmn.groups import Couplings, KeepMask, couplings
from gmn.job import Job
from gmn.limits import kept_whole
from gmn.meta_train import DataModel, train_metanetwork
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.progress import say, track
from gmn.ranking import Pruned, masks_of, prune_to
from gmn.run import Run
from gmn.settings import Criterion, Recipe
from gmn.trace import clone
from gmn.training import evaluate, make_optimizer, recalibrate
from gmn.vote import prior
from gmn.zoo import Zoo


class MetaJob(Job):
    """A metanetwork recipe at work in a run folder."""

    def __init__(self, recipe: Recipe, run: Run, learnt: tuple[MetaNetwork, Layout] | None = None) -> None:
        if not learnt:  # meta-training has a sparsity loss
            refuse_no_loss(recipe.criterion)
        super().__init__(recipe, run)
        self.recipe = recipe
        self.criterion = recipe.criterion.seeded(recipe.seed)
        preset = layouts()[recipe.graph.layout]
        choices = recipe.graph.model_dump(include={"kernels", "identities"}, exclude_none=True)
        self.layout: Layout = dataclasses.replace(preset, **choices)
        self._rehearse(learnt)
        run.start()

    def graph(self, model: nn.Module, layout: Layout | None = None) -> NetworkGraph:
        """The graph of a network, in the recipe's layout or another one."""
        return to_graph(model, self.example, layout=layout or self.layout, on_unknown=self.recipe.graph.on_unknown)

    def _rehearse(self, learnt: tuple[MetaNetwork, Layout] | None) -> None:
        """Build, convert, prune, and meet the metanetwork once, before hours of training end in an error."""
        model = self.built(0)
        before = cost(model, self.example)
        if learnt:
            learnt[0].check(self.graph(model, learnt[1]).spec)
        if self.recipe.data_models.initial_speed_up > 1:
            model = self._cut(model, self.recipe.data_models.initial_speed_up).model
        self._cut(model, self.recipe.prune.speed_up, before)

    # -- networks ------------------------------------------------------------------------------------------------------

    def trained(self, index: int) -> nn.Module:
        """Network `index`, trained if the recipe says so."""
        model = self.built(index)
        if self.recipe.data_models.fit:
            self.fit(model, self.recipe.data_models.fit, index, f"training network {index}")
        return model

    def initially_pruned(self, model: nn.Module, index: int) -> nn.Module:
        """The network after its initial pruning and fine-tuning, if the recipe has them."""
        settings, model = self.recipe.data_models, clone(model)
        if settings.initial_speed_up > 1:
            model = self.prune(model, settings.initial_speed_up).model
        if settings.initial_fit:
            self.fit(model, settings.initial_fit, index, f"initial fine-tuning of network {index}")
        return model.eval()

    def data_model(self, index: int) -> nn.Module:
        """A network for the metanetwork to learn on."""
        return self.keep(f"data-models/{index}", lambda: self.initially_pruned(self.trained(index), index))

    def _cut(self, model: nn.Module, speed_up: float, before: Cost | None = None, chance: int | None = None) -> Pruned:
        settings, graph = self.recipe.prune.model_copy(update={"speed_up": speed_up}), self.graph(model)
        if chance is None:
            known = self._known(model)
            return prune_to(model, graph, self.example, settings, self.criterion, before=before, **known)
        blind, own = settings.model_copy(update={"per_flop": False}), Criterion(score="random", normalize="none")
        return prune_to(model, graph, self.example, blind, own.seeded(chance), before=before)

    def _known(self, model: nn.Module) -> dict[str, Any]:
        """What the ranking of a network's channels may look at beside its weights."""
        gradients = gradients_for(self.criterion, model, self.data.train, seed=self.recipe.seed)
        return {"prior": self.prior, "gradients": gradients}

    def masks(self, model: nn.Module, spec: GraphSpec, coupled: Couplings) -> list[KeepMask]:
        """Masks with fewer and fewer channels, down to the recipe's limits."""
        known = self._known(model)
        return masks_of(model, spec, coupled, self.example, self.recipe.prune, self.criterion, **known)

    @cached_property
    def prior(self) -> Tensor | None:
        """What the votes of the recipe's zoo multiply the scores with."""
        settings = self.recipe.prune
        if settings.votes is None:
            return None
        folder = zoo_path(settings.votes)
        if folder is None:
            raise GmnError("no zoo to vote", expected="a zoo, or a run folder with one", got=str(settings.votes))
        backbone = Backbone.of(self.built(0), self.example)
        zoo = Zoo.open(folder, backbone.about())
        return prior(zoo.masks([task.name for task in zoo.tasks(split="zoo")]), backbone.coupled, settings.votes_weight)

    def prune(
        self, model: nn.Module, speed_up: float, before: Cost | None = None, *, chance: int | None = None
    ) -> Pruned:
        """Prune to a speed-up and recompute the batch norms' statistics; `chance`: by a random ranking of that seed."""
        pruned = self._cut(model, speed_up, before, chance)
        recalibrate(pruned.model, self.data.train, self.recipe.prune.recalibrate, seed=self.recipe.seed)
        return pruned

    # -- the metanetwork -----------------------------------------------------------------------------------------------

    def subject(self, model: nn.Module) -> DataModel:
        """A data model with its graph and its scores' bookkeeping."""
        graph = self.graph(model)
        coupled = kept_whole(graph.spec, couplings(graph.spec), self.recipe.prune)
        importance = Importance(graph.spec, coupled, self.criterion)
        return DataModel(model, graph, importance)

    def checkpoint(self, epoch: int) -> Path:
        """Where the metanetwork of an epoch is saved."""
        return self.run.folder / "checkpoints" / f"epoch-{epoch:03d}.safetensors"

    def learn(self, subjects: list[DataModel]) -> None:
        """Meta-train; one checkpoint per epoch, from the last of which a stopped run goes on."""
        settings = self.recipe.meta_train
        done = max((epoch for epoch in range(1, settings.epochs + 1) if self.checkpoint(epoch).is_file()), default=0)
        if done == settings.epochs:
            return
        metanetwork = self.new_metanetwork(subjects).train()
        optimizer = make_optimizer(metanetwork, settings)
        if done:
            saved, _, tensors = load_metanetwork(self.checkpoint(done))
            metanetwork.load_state_dict(saved.state_dict())
            restore_optimizer(optimizer, tensors)
            say(f"meta-training goes on after epoch {done}")

        def save(epoch: int, optimizer: Optimizer) -> None:
            state = optimizer_tensors(optimizer)
            save_metanetwork(self.checkpoint(epoch + 1), metanetwork, self.layout, **state)

        train_metanetwork(
            metanetwork,
            subjects,
            self.data.train,
            settings,
            seed=self.recipe.seed,
            augment=self.augment,
            start=done,
            optimizer=optimizer,
            log=self.run.logger("meta-train"),
            after_epoch=save,
        )

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

    def select(self, judges: list[DataModel]) -> tuple[MetaNetwork, Layout]:
        """The checkpoint whose networks have the best validation accuracy when pruned, before the last fine-tuning.

        Checkpoint 0 is no metanetwork: it is measured for comparison and never chosen.
        """
        target = self.run.folder / "metanetwork.safetensors"
        if not target.is_file():
            scores: dict[int, float] = {}
            epochs = range(self.recipe.meta_train.epochs + 1)
            with track("choosing the checkpoint", len(epochs)) as advance:
                for epoch in epochs:
                    scores[epoch] = self.judge(epoch, judges)
                    self.run.log("select", epoch=epoch, validation_accuracy=scores[epoch])
                    advance(f"epoch {epoch}: {scores[epoch]:.1%}")
            best = max(list(epochs)[1:], key=lambda epoch: scores[epoch])
            say(
                f"checkpoint {best}: {scores[best]:.2%} after pruning, without metanetwork {scores[0]:.2%} (validation)"
            )
            metanetwork, layout, _ = load_metanetwork(self.checkpoint(best))
            save_metanetwork(target, metanetwork, layout)
        metanetwork, layout, _ = load_metanetwork(target)
        return metanetwork.to(self.device), layout

    def judge(self, epoch: int, judges: list[DataModel]) -> float:
        """Mean validation accuracy of the judges: rewritten by a checkpoint, fine-tuned as the recipe says, pruned."""
        metanetwork = load_metanetwork(self.checkpoint(epoch))[0].to(self.device) if epoch else None
        accuracies = []
        for judge in judges:
            model = self.rewrite(judge.model, metanetwork, self.layout)
            if self.recipe.finetune.after_meta:
                self.fit(model, self.recipe.finetune.after_meta, 400, f"fine-tuning after checkpoint {epoch}")
            reference = self.recipe.prune.speed_up / self.recipe.data_models.initial_speed_up
            pruned = self.prune(model, max(reference, 1.01)).model
            accuracies.append(evaluate(pruned, self.data.val).accuracy)
        return sum(accuracies) / len(accuracies)

    def rewrite(self, model: nn.Module, metanetwork: MetaNetwork | None, layout: Layout) -> nn.Module:
        """Network -> graph -> metanetwork -> graph -> network; the batch norms keep their running statistics."""
        graph = self.graph(model, layout)
        if metanetwork is not None:
            with torch.no_grad():
                graph = metanetwork(graph)
        return to_model(graph)
