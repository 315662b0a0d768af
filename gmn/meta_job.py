"""A metanetwork recipe at work: data models, meta-training, the choice of a checkpoint, rewriting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from gmn.checkpoint import (
    load_metanetwork,
    load_sound,
    optimizer_tensors,
    restore_optimizer,
    save_metanetwork,
)
from gmn.costs import cost
from gmn.criteria import refuse_no_loss
from gmn.data import Data
from gmn.distributed import team
from gmn.errors import MALFORMED, CheckpointError, of_machine, one_line, within
from gmn.kind_job import KindJob
from gmn.learnt import Learnt, adopt, further, named
from gmn.library_pruner import prune_with
from gmn.meta_shares import shares_of
from gmn.meta_train import TITLE, DataModel, train_metanetwork
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.progress import say, track
from gmn.run import METANETWORK_FILE, Run
from gmn.settings import Fit, Recipe
from gmn.settings_network import Data as Images
from gmn.stages import stage
from gmn.trace import clone
from gmn.training import evaluate, make_optimizer


class MetaJob(KindJob):
    """A metanetwork recipe at work in a run folder.

    Args:
        recipe: What to do.
        run: The run folder.
        learnt: The metanetwork of another run, to prune with.
        data: The recipe's data, if they are loaded already.
        loaded: By label, those of other kinds of networks that are loaded already.
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
        loaded: Mapping[str, Data] | None = None,
        learns: bool = False,
    ) -> None:
        if (learns or "sparse" in recipe.report.baselines) and recipe.prune.of_channels:  # both have a sparsity loss
            refuse_no_loss(recipe.criterion)
        super().__init__(recipe, run, data)
        self.loaded = loaded or {}
        self.refuse_uneven()
        if learns:
            shares_of(recipe.meta_train, team())
        self.further = further(recipe, run)
        self._rehearse(learnt)
        if learns:
            self._rehearse_learning()
        run.start()
        for label, path in recipe.report.metanetworks.items():
            adopt(run, label, path)

    @cached_property
    def kinds(self) -> list[KindJob]:
        """The kinds of networks to learn on and to be judged by: the recipe's, and those of `data_models.also`."""
        found: list[KindJob] = [self]
        for label, own in self.recipe.kinds.items():
            same = (kind.data for kind in found if _same_images(kind.recipe.data, own.data))
            data = self.loaded.get(label) or next(same, None)
            with within(f"data_models.also, {label}"):
                found.append(KindJob(own, self.run, data, f"also/{label}"))
        return found

    def _rehearse(self, learnt: Learnt | None) -> None:
        """Meet the metanetworks, the library and the target once, before hours of training end in an error."""
        model = self.built(0)
        before = cost(model, self.example)
        if learnt:
            learnt[0].check(self.graph(model, learnt[1]).spec)
        for label, (metanetwork, layout) in self.further.items():
            with named(label):
                metanetwork.check(self.graph(model, layout).spec)
        most = self.recipe.targets[-1]
        if most is not None and any(row.startswith("torch-pruning") for row in self.recipe.report.baselines):
            prune_with(self.library_pruner(clone(model)), self.example, most, before, self.recipe.prune)
        self.rehearse(model, before)

    def _rehearse_learning(self) -> None:
        """The same of the other kinds; GmnError names the kind."""
        for kind in self.kinds[1:]:
            with within(f"data_models.also, {kind.place.name}"):
                kind.refuse_uneven()
                model = kind.built(0)
                kind.rehearse(model, cost(model, kind.example))

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
                subjects = subjects or [subject for kind in self.kinds for subject in kind.subjects()]
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

    def at(self, epoch: int) -> MetaNetwork | None:
        """The metanetwork of an epoch; None of 0, which is none."""
        return load_metanetwork(self.checkpoint(epoch))[0].to(self.device) if epoch else None

    def judged(self, epoch: int, tuning: Fit | None) -> Iterator[tuple[KindJob, nn.Module]]:
        """The judges of every kind as a checkpoint makes them, fine-tuned; checkpoint 0 is no metanetwork."""
        metanetwork = self.at(epoch)
        for kind in self.kinds:
            for index in kind.judges:
                yield kind, kind.rewritten(index, metanetwork, tuning, f"checkpoint {epoch}")

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
        """Mean validation accuracy of the judges: rewritten by a checkpoint, fine-tuned, perhaps briefly, and pruned.

        It is logged, and looked up when it is asked for again.
        """

        def look() -> dict[str, float]:
            with stage(self.run.log, "choosing", checkpoint=epoch):
                images = self.recipe.meta_train.finetune_images
                tuning = self.recipe.finetune.after_meta if images is None else self.brief(images)
                models = self.judged(epoch, tuning)
                accuracies = [evaluate(kind.pruned_to_target(m), kind.data.val).accuracy for kind, m in models]
            return {"validation_accuracy": sum(accuracies) / len(accuracies)}

        return self.run.recorded("select", {"epoch": epoch}, look)["validation_accuracy"]


def _same_images(one: Images, other: Images) -> bool:
    return one.model_copy(update={"augment": other.augment}) == other
