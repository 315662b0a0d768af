"""A metanetwork recipe's network on its way to be pruned: trained, pruned a little at first, ranked, cut."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gmn.api import zoo_of
from gmn.backbone import Backbone
from gmn.builder import Layout
from gmn.checkpoint import load_checked, save_json
from gmn.convert import layouts, to_graph
from gmn.costs import Cost, cost
from gmn.data import Data
from gmn.distributed import team
from gmn.errors import GmnError
from gmn.gradients import gradients_for
from gmn.graph import GraphSpec, NetworkGraph
from gmn.groups import Couplings, KeepMask
from gmn.initial import brief, candidates, largest
from gmn.job import Job
from gmn.library_pruner import Pruner, library_pruner
from gmn.progress import say
from gmn.ranking import Pruned, masks_of
from gmn.reconstruct import mend
from gmn.run import Run
from gmn.settings import Criterion, Recipe
from gmn.trace import clone
from gmn.training import evaluate, recalibrate
from gmn.vote import prior
from gmn.weight_masks import WeightMask, parameters_left
from gmn.weight_ranking import Prunable, prune_by_pattern, weight_ladder
from gmn.zoo_index import zoo_path


class PruneJob(Job):
    """What a metanetwork recipe does to networks, the metanetwork apart.

    Attributes:
        axes: Where single weights go, the names of those that may, with the axis of their inputs.
        dense: The layers that lose none, with the reason.
    """

    def __init__(self, recipe: Recipe, run: Run, data: Data | None = None, place: str = "") -> None:
        super().__init__(recipe, run, data, place)
        self.recipe = recipe
        self.criterion = recipe.criterion.seeded(recipe.seed)
        preset = layouts()[recipe.graph.layout]
        choices = recipe.graph.model_dump(include={"kernels", "identities"}, exclude_none=True)
        self.layout: Layout = dataclasses.replace(preset, **choices)
        self.axes: dict[str, int] = {}
        self.dense: dict[str, str] = {}

    def graph(self, model: nn.Module, layout: Layout | None = None) -> NetworkGraph:
        """The graph of a network, in the recipe's layout or another one."""
        return to_graph(model, self.example, layout=layout or self.layout, on_unknown=self.recipe.graph.on_unknown)

    def cost(self, model: nn.Module) -> Cost:
        """What a network costs; where single weights go, with the parameters that are not zero."""
        whole = cost(model, self.example)
        return dataclasses.replace(whole, parameters=parameters_left(model, self.axes)) if self.axes else whole

    def _find_weights(self, model: nn.Module) -> None:
        """Where single weights go, find out which."""
        if not self.recipe.prune.of_channels:
            found = Prunable.of(model, self.graph(model).spec, self.recipe.prune)
            self.axes, self.dense = found.axes, found.dense

    # -- the network before --------------------------------------------------------------------------------------------

    def trained(self, index: int) -> nn.Module:
        """Network `index`, trained if the recipe says so."""
        model = self.built(index)
        if self.recipe.data_models.fit:
            self.fit(model, self.recipe.data_models.fit, index, f"training network {index}")
        return model

    def initially_pruned(self, model: nn.Module, index: int) -> nn.Module:
        """The network after its initial pruning and fine-tuning, if the recipe has them."""
        settings, teacher = self.recipe.data_models, model
        if settings.initial_speed_up == "auto" and not self._found.is_file():
            save_json(self._found, {"speed_up": self._find_initial(model, index)})
        model = self.prune(model, self.initial_speed_up).model if self.initial_speed_up > 1 else clone(model)
        if settings.initial_fit:
            title = f"initial fine-tuning of network {index}"
            self.fit(model, settings.initial_fit, index, title, teacher=teacher)
        return model.eval()

    @property
    def initial_speed_up(self) -> float:
        """The recipe's; where that is `auto`, what was found on the first network, for all networks of the run."""
        stated = self.recipe.data_models.initial_speed_up
        if stated != "auto":
            return stated
        found = load_checked(self._found, {"speed_up": float})["speed_up"]
        return max(1.0, float(found))

    @property
    def _found(self) -> Path:
        return self.run.folder / self.place / "initial.json"

    def _find_initial(self, model: nn.Module, index: int) -> float:
        """The largest speed-up of a grid after which the network is as accurate on the validation images as before."""
        settings, target = self.recipe.data_models, self.recipe.targets[0]
        assert target is not None  # recipes refuse other patterns with an initial pruning
        before = evaluate(model, self.data.val).accuracy

        def accepts(speed_up: float) -> bool:
            pruned = self.prune(model, speed_up)
            if settings.initial_fit:
                title = f"trying {speed_up:g}x on network {index}"
                self.fit(pruned.model, brief(settings.initial_fit), index, title, teacher=model)
            score = evaluate(pruned.model, self.data.val).accuracy
            enough = score >= before - settings.initial_tolerance / 100 - 1e-9 and pruned.speed_up < target
            facts = {"validation_accuracy": score, "unpruned": before, "accepted": enough}
            facts |= {"kind": self.place.name} if self.place.name else {}
            self.run.log("initial", network=index, wanted=speed_up, speed_up=pruned.speed_up, **facts)
            return enough

        found = largest(candidates(target), accepts)
        say(self.titled(f"initial pruning: {found:g}x, validation accuracy {before:.2%} before"))
        return found

    # -- pruning -------------------------------------------------------------------------------------------------------

    def _cut(
        self, model: nn.Module, speed_up: float | None, before: Cost | None = None, chance: int | None = None
    ) -> tuple[Pruned, GraphSpec]:
        settings, graph = self.recipe.prune.model_copy(update={"speed_up": speed_up}), self.graph(model)
        criterion, known = self.criterion, {}
        if chance is None:
            known = self._known(model)
        else:
            settings = settings.model_copy(update={"per_flop": False})
            criterion = Criterion(score="random", normalize="none").seeded(chance)
        pruned = prune_by_pattern(model, graph, self.example, settings, criterion, before=before, **known)
        return pruned, graph.spec

    def _known(self, model: nn.Module) -> dict[str, Any]:
        """What the ranking of a network's channels may look at beside its weights; the same bits in all processes."""
        team().agree(model.state_dict().values())
        gradients = gradients_for(self.criterion, model, self.data.train, seed=self.recipe.seed)
        team().agree((gradients or {}).values())
        return {"prior": self.prior, "gradients": gradients}

    def masks(self, model: nn.Module, spec: GraphSpec, coupled: Couplings) -> list[KeepMask]:
        """Masks with fewer and fewer channels, down to the recipe's limits."""
        known = self._known(model)
        return masks_of(model, spec, coupled, self.example, self.recipe.prune, self.criterion, **known)

    def weight_masks(self, model: nn.Module, points: int) -> list[WeightMask]:
        """Masks with fewer and fewer single weights, of a recipe that prunes such."""
        spec, gradients = self.graph(model).spec, self._known(model)["gradients"]
        return list(weight_ladder(model, spec, self.recipe.prune, self.criterion, gradients, points=points))

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
        zoo = zoo_of(backbone, folder)
        return prior(zoo.masks([task.name for task in zoo.tasks(split="zoo")]), backbone.coupled, settings.votes_weight)

    def library_pruner(self, model: nn.Module, *, sparse: bool = False) -> Pruner:
        """A pruner of torch-pruning, for the rows of that name; it changes the model in place."""
        team().agree(model.state_dict().values())
        return library_pruner(model, self.graph(model).spec, self.example, self.recipe.prune, sparse=sparse)

    def prune(
        self, model: nn.Module, speed_up: float | None, before: Cost | None = None, *, chance: int | None = None
    ) -> Pruned:
        """Prune to a speed-up, or single weights as the recipe says; then reconstruct, or recalibrate, as it says.

        `chance`: by a random ranking of that seed.
        """
        (pruned, spec), own = self._cut(model, speed_up, before, chance), self.recipe.prune
        options: dict[str, Any] = {"seed": self.recipe.seed, "augment": self.augment}
        mend(model, pruned, spec, self.data.train, own.reconstruct, own.recalibrate, **options)
        return pruned

    def recalibrate(self, model: nn.Module, images: int | None = None) -> None:
        """Batch norms, on so many images; None: as after pruning, also where `reconstruct` stands for it."""
        images = self.recipe.prune.recalibrate or self.recipe.prune.reconstruct if images is None else images
        recalibrate(model, self.data.train, images, seed=self.recipe.seed, augment=self.augment)
