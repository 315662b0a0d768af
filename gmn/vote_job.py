"""A vote recipe at work in a run folder: the one network, its zoo, the tasks to prune for, and their neighbours."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from gmn.api import NETWORK, load_meta, load_network
from gmn.backbone import Backbone, cut_inside
from gmn.checkpoint import load_model, saved_facts
from gmn.costs import cost
from gmn.data import Data
from gmn.engine import HERE, Engine
from gmn.errors import CheckpointError, DataError, GmnError
from gmn.job import Job, choose_device
from gmn.names import nearest
from gmn.neighbours import Ranking, electorate, ranking
from gmn.progress import say
from gmn.ranking import refuse_nothing, refuse_whole
from gmn.reptile import reptile
from gmn.run import Run
from gmn.settings_vote import VoteRecipe
from gmn.similarity import similarity_by_name
from gmn.simsiam import pretrain
from gmn.tasks import sample_tasks, task_data
from gmn.zoo import Task, Zoo
from gmn.zoo_build import build_zoo, pruner
from gmn.zoo_task import to_text

REPTILE = "reptile"  # a baseline, and the folder of its network beside the tasks of a zoo


class VoteJob(Job):
    """A vote recipe at work in a run folder.

    Args:
        recipe: What to do.
        run: The run folder.
        zoo: Where an existing zoo lies, with its network; None makes one in the run folder.
        engine: Where tasks are pruned and trials are trained.
    """

    def __init__(self, recipe: VoteRecipe, run: Run, zoo: Path | None = None, engine: Engine = HERE) -> None:
        super().__init__(recipe, run)
        self.recipe, self.foreign, self.engine = recipe, zoo is not None, engine
        self.folder = zoo or run.folder / "zoo"
        self._rankings: dict[tuple[str, str], Ranking] = {}
        self._rehearse()
        run.start()

    def _rehearse(self) -> None:
        """Meet every part once, before hours of training end in an error."""
        self.tasks = self._sample()
        similarity_by_name(self.recipe.similarity.name, **self.recipe.similarity.options)
        backbone = self.backbone if self.foreign else self._backbone(self.rewritten(self.built(0)))
        refuse_whole(backbone.coupled)
        refuse_nothing(backbone.coupled, self.recipe.ratio)
        backbone.with_head(len(self.tasks[-1].classes), seed=0)
        if self.foreign:
            _ = self.zoo  # its tasks are cut from this network
            if REPTILE in self.recipe.report.baselines:
                _ = self.reptile_network

    # -- the network -------------------------------------------------------------------------------------------------

    @cached_property
    def backbone(self) -> Backbone:
        """The one network that all tasks share; trained and rewritten as the recipe says, and kept beside the zoo."""
        if not self.foreign:
            self.keep(f"zoo/{NETWORK}", lambda: self.rewritten(self.trained()))
        return self._backbone(self._network())

    def _network(self) -> nn.Module:
        return load_network(self.folder).to(self.device)

    def _backbone(self, model: nn.Module) -> Backbone:
        only_inside = self.recipe.zoo.pruning.only_inside
        if self.foreign:
            about = Zoo.open(self.folder).about
            only_inside = cut_inside(about)
            if about.get("ratio") != self.recipe.ratio:
                say(f"the zoo was pruned by {to_text(about.get('ratio'))}, the recipe wants {self.recipe.ratio:g}")
        return Backbone.of(model, self.example, only_inside=only_inside)

    def trained(self) -> nn.Module:
        """The network after its pre-training, if the recipe has one."""
        model, settings = self.built(0), self.recipe.pretrain
        if settings and settings.fit:
            self.fit(model, settings.fit, 0, "pre-training")
        if settings and settings.simsiam:
            log = self.run.logger("fit", title="SimSiam")
            bookmark = self.bookmark(self.beginning(model, settings.simsiam, 0, "SimSiam"))
            own = {"seed": self.seed(0), "bookmark": bookmark, "log": log}
            pretrain(model, self.data.train, settings.simsiam, self.example, **own)
        return model

    def rewritten(self, model: nn.Module) -> nn.Module:
        """The network as the recipe's metanetwork rewrites it, if there is one."""
        if self.recipe.rewrite is None:
            return model
        return load_meta(self.recipe.rewrite).rewrite(model, self.example).eval()

    # -- tasks -------------------------------------------------------------------------------------------------------

    def _sample(self) -> list[Task]:
        """The tasks of the zoo and the targets; for a zoo that is there, the recipe's own task."""
        if not self.foreign:
            counts = self.recipe.zoo
            names = self.data.class_names
            return sample_tasks(names, counts.classes, counts.tasks, counts.targets, seed=self.recipe.seed)
        known = {name: index for index, name in enumerate(self.data.class_names)}
        wanted = tuple(self.recipe.target or self.data.class_names)
        for name in wanted:
            if name not in known:
                expected = f"a class of {self.recipe.data.name}"
                raise DataError("no such class", expected=expected, got=repr(name), hint=nearest(name, known))
        return [Task("target", tuple(known[name] for name in wanted), wanted, "target", seed=self.recipe.seed)]

    @property
    def targets(self) -> list[Task]:
        """The tasks to prune for."""
        return [task for task in self.tasks if task.split == "target"]

    def data_of(self, task: Task) -> Data:
        """The images of a task."""
        return task_data(self.data, task.classes)

    # -- the zoo -----------------------------------------------------------------------------------------------------

    @cached_property
    def zoo(self) -> Zoo:
        """The zoo, opened or created."""
        about = self.backbone.about()
        if self.foreign:
            return Zoo.open(self.folder, about)
        settings = self.recipe.zoo
        more: dict[str, Any] = {"network": self.source, "ratio": self.recipe.ratio, "pruner": settings.pruner}
        if settings.filters.only_inside and settings.pruner == "filters":
            more["only_inside"] = True  # not said otherwise: zoos of an older gmn, which are gone on with, say nothing
        return Zoo.create(self.folder, {**about, **more, "data": self.recipe.data.name})

    def build(self) -> None:
        """Prune the network for every task of the zoo that is not done yet."""
        self.zoo.plan(task for task in self.tasks if task.split == "zoo")
        if not self.run.shared:  # a resumed run tries again what failed; who joins it does not
            self.zoo.redo(task.name for task in self.zoo.tasks(status="failed"))
        prune = pruner(self.recipe.zoo.pruning, self.example, self.recipe.ratio, augment=self.augment)
        device = partial(choose_device, self.recipe.device)
        build_zoo(self.backbone, self.data, self.zoo, prune, engine=self.engine, device=device)
        self.zoo.sweep()
        done = len(self.zoo.tasks(split="zoo"))
        if done < self.recipe.vote.neighbours:
            failed = next(iter(self.zoo.tasks(status="failed")), None)
            got = f"{done} done" + (f"; {failed.name}: {failed.error}" if failed else "")
            raise GmnError("too few tasks to vote", expected=f"{self.recipe.vote.neighbours}", got=got)

    @cached_property
    def electorate(self) -> str:
        """Which tasks the votes of this job are among, once the zoo is built."""
        return electorate(self.zoo)

    def ranking(self, task: Task, similarity: str) -> Ranking:
        """The zoo's tasks, the nearest to a target first; found once."""
        key = task.name, similarity
        if key not in self._rankings:
            settings = self.recipe.similarity
            measure = similarity_by_name(similarity, **(settings.options if similarity == settings.name else {}))
            self._rankings[key] = ranking(
                self.backbone,
                self.zoo,
                self.data_of(task),
                measure,
                parents=settings.parents or self.data.parents,
                images=settings.images,
            )
        return self._rankings[key]

    @cached_property
    def reptile_network(self) -> nn.Module:
        """The pruned meta-initialisation of the baseline, learnt on the zoo's tasks once."""
        folder = self.folder / REPTILE
        if saved_facts(folder) is None:
            if self.foreign:
                expected, hint = "a run of gmn meta-train with that baseline", "leave reptile out of report.baselines"
                got = str(self.folder)
                raise CheckpointError("the zoo has no reptile network", expected=expected, got=got, hint=hint)
            self.keep(f"zoo/{REPTILE}", self._learn_reptile)
        return load_model(folder).to(self.device)

    def _learn_reptile(self) -> nn.Module:
        tasks = [task for task in self.tasks if task.split == "zoo"]
        found = reptile(
            self.backbone,
            self.data,
            tasks,
            self.recipe.reptile,
            ratio=self.recipe.ratio,
            seed=self.recipe.seed,
            augment=self.augment,
        )
        self.run.log("reptile", training_flops=found.training_flops)
        return found.model

    def price(self) -> dict[str, Any]:
        """What the network costs before pruning."""
        return dataclasses.asdict(cost(self.backbone.model, self.example))
