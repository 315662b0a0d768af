"""What users call in Python: `gmn.load` and `gmn.prune`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmn.backbone import Backbone, cut_inside
from gmn.builder import Layout
from gmn.checkpoint import load_json, load_metanetwork, load_model
from gmn.convert import to_graph, to_model
from gmn.costs import Cost, cost
from gmn.data import Augment, Data
from gmn.errors import CheckpointError, PruningError
from gmn.example import stated_size
from gmn.gradients import gradients_for
from gmn.metanetwork import MetaNetwork
from gmn.neighbours import ranking
from gmn.reader import OnUnknown
from gmn.recipe import checked
from gmn.reconstruct import mend
from gmn.run import METANETWORK_FILE, one_of_its_runs
from gmn.settings import Criterion, Fit, Prune, Ranking
from gmn.similarity import similarity_by_name
from gmn.state_dict import checksum
from gmn.training import evaluate, fit
from gmn.vote_prune import vote_for
from gmn.weight_masks import WeightMask, parameters_left
from gmn.weight_ranking import prune_by_pattern
from gmn.zoo import Zoo
from gmn.zoo_index import zoo_path
from gmn.zoo_task import WEIGHTS, check_same

NETWORK = "network"
"""Folder beside the tasks of a zoo."""


@dataclass(frozen=True)
class Meta:
    """A saved metanetwork, ready to rewrite networks."""

    network: MetaNetwork
    layout: Layout

    def rewrite(self, model: nn.Module, example_inputs: Any, *, on_unknown: OnUnknown = "keep") -> nn.Module:
        """A copy of the network with the weights that the metanetwork gives it."""
        graph = to_graph(model, example_inputs, layout=self.layout, on_unknown=on_unknown)
        with torch.no_grad():
            return to_model(self.network.to(graph.node_features.device)(graph))


@dataclass(frozen=True)
class Voters:
    """A zoo with its network: tasks that can vote on a new one."""

    zoo: Zoo
    backbone: Backbone

    def elect(
        self,
        data: Data,
        *,
        similarity: str = "leep",
        neighbours: int = 3,
        finetune: Fit | None = None,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> nn.Module:
        """The sub-network for a new task that the nearest tasks vote for, fine-tuned if `finetune` is given.

        Args:
            data: The task's data.
            similarity: A name that `gmn.similarity` knows.
            neighbours: How many tasks vote.
        """
        data = data.to(next(self.backbone.model.parameters()).device)
        found = ranking(self.backbone, self.zoo, data, similarity_by_name(similarity), parents=data.parents)
        names = found.nearest(neighbours)
        options = {"ratio": float(self.zoo.about["ratio"]), "seed": seed, "augment": augment}
        return vote_for(self.backbone, self.zoo, names, data, finetune, **options)[0]


def load(path: str | Path) -> Meta | Voters:
    """What a run learnt: the metanetwork of a run folder or of a file, or a zoo that votes.

    Raises:
        CheckpointError: if there is neither; if a zoo's network wants to run code outside of `gmn.allow_code()`.
    """
    zoo = zoo_path(Path(path))
    return load_voters(zoo) if zoo else load_meta(Path(path))


def load_meta(path: Path) -> Meta:
    """The metanetwork of a run folder, or of a file; CheckpointError if there is none."""
    network, layout, _ = load_metanetwork(metanetwork_path(path))
    return Meta(network, layout)


def load_voters(folder: Path) -> Voters:
    """A zoo and the network that it was made from; CheckpointError if one is missing."""
    zoo = Zoo.open(folder)
    if not isinstance(zoo.about.get("ratio"), float):
        raise CheckpointError("the zoo does not say its ratio", expected="how much was pruned", where=str(folder))
    model = load_network(folder)
    path = folder / NETWORK / "model.json"
    if (size := stated_size(load_json(path), str(path))) is None:
        raise CheckpointError("the network does not say the size of its input", where=str(path))
    backbone = Backbone.of(model, torch.zeros(1, *size), only_inside=cut_inside(zoo.about))
    return Voters(Zoo.open(folder, backbone.about()), backbone)


def zoo_of(backbone: Backbone, folder: Path) -> Zoo:
    """The zoo in a folder, whose tasks are cut from this very network; GmnError if they are from another one.

    Other weights in the same structure are another network: its channels mean something else. A zoo of an older gmn
    does not say which weights; then the network kept beside it does.
    """
    own = backbone.about()
    zoo = Zoo.open(folder, own)
    if WEIGHTS not in zoo.about and (folder / NETWORK / "model.json").is_file():
        beside = checksum(load_network(folder).state_dict())
        check_same("the zoo is about something else", {WEIGHTS: own[WEIGHTS]}, {WEIGHTS: beside}, folder)
    return zoo


def load_network(zoo: Path) -> nn.Module:
    """The network that a zoo's tasks share, kept beside them; CheckpointError if it is missing."""
    folder = zoo / NETWORK
    if not (folder / "model.json").is_file():
        hint = "give a run folder of gmn meta-train, or its zoo"
        raise CheckpointError("the zoo lacks its network", expected=str(folder), hint=hint)
    return load_model(folder)


def metanetwork_path(path: Path) -> Path:
    """The file of a metanetwork: the path itself, or `metanetwork.safetensors` in a run folder."""
    file = path / METANETWORK_FILE if path.is_dir() else path
    if not file.is_file():
        expected = "a run folder of gmn meta-train, a zoo, or a .safetensors file"
        hint = one_of_its_runs(path) or "make it first: gmn meta-train RECIPE"
        raise CheckpointError("nothing learnt here", expected=expected, got=str(path), hint=hint)
    return file


@dataclass(frozen=True)
class Result:
    """A pruned network, and its numbers: FLOPs, parameters, speed-up, and accuracies if there was data.

    Where single weights went, parameters are those that are not zero, `parameters_left` is their share, and `mask` says
    which weights stay and which layers are dense: `gmn.fit(model, ..., mask=mask)` trains on.

    >>> prune(nn.Linear(8, 3), torch.zeros(1, 8), pattern="2:4").report["parameters"]  # 12 weights and 3 biases
    15
    """

    model: nn.Module
    report: dict[str, float]
    mask: WeightMask | None = None


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    meta: Meta | Voters | None = None,
    speed_up: float | None = None,
    pattern: str = "channels",
    sparsity: float | None = None,
    finetune: Fit | None = None,
    data: Data | None = None,
    augment: Augment | None = None,
    criterion: Criterion | str | None = None,
    recalibrate_images: int = 1000,
    reconstruct_images: int = 0,
    on_unknown: OnUnknown = "keep",
    seed: int = 0,
    **options: Any,
) -> Result:
    """Make a network cheaper: [metanetwork -> fine-tune ->] prune -> fine-tune. The model itself is not changed.

    Args:
        model: Any network that `gmn.to_graph` takes.
        example_inputs: What the network is run on to follow its channels and to count its FLOPs.
        meta: From `gmn.load`; None prunes directly. Of a zoo of this very model the tasks nearest to `data` vote.
        speed_up: Of channels, FLOPs before / FLOPs after; default 2. A zoo has its own ratio.
        pattern: "channels", or single weights, which become zero and stay so: "unstructured", or "N:M" such as "2:4".
        sparsity: Of "unstructured", the share of the weights that goes; default 0.8.
        finetune: The fine-tuning after the metanetwork and the one after pruning; needs `data`; may distil from it.
        data: From `gmn.load_data`; also recalibrates batch norms (on `recalibrate_images` images) and evaluates.
        reconstruct_images: To fit each layer to its unpruned outputs with, in place of recalibrating; 0: off.
        augment: Random changes of the training images, also of those that batch norms are recalibrated on.
        criterion: How what goes is scored: a `gmn.Criterion`, or its score, such as "taylor" (which needs `data`).
        on_unknown: See `gmn.to_graph`; "keep" never prunes around a layer without a rule.
        seed: Seed of the fine-tuning, and of what a criterion draws.
        options: Fields of `gmn.Ranking`: `max_ratio=0.8, keep=["layer1.*"], round_to=8, ranking="local"`, ...

    Raises:
        PruningError: if the target is out of reach, or fine-tuning is asked for without data.
        RecipeError: for a field that is unknown, or a value out of its bounds.
        ConversionError: if the network has no graph.
    """
    _refuse_without(data, finetune is not None, reconstruct_images, pattern != "channels" or isinstance(meta, Voters))
    if isinstance(meta, Voters):
        unused = {"criterion": criterion, "pattern": pattern, "sparsity": sparsity, "on_unknown": on_unknown}
        _refuse_beside_votes({**unused, "recalibrate_images": recalibrate_images}, options)
        return _elected(meta, model, example_inputs, data, speed_up, finetune=finetune, augment=augment, seed=seed)
    config = _target(speed_up, {"pattern": pattern, "sparsity": sparsity}, options)
    own = (Criterion(score=criterion) if isinstance(criterion, str) else criterion or Criterion()).seeded(seed)
    graph = to_graph(model, example_inputs, on_unknown=on_unknown)
    data = None if data is None else data.to(graph.node_features.device)
    tune = partial(_tuned, data=data, finetune=finetune, seed=seed, augment=augment, teacher=model)
    rewritten = None if meta is None else meta.rewrite(model, example_inputs, on_unknown=on_unknown)
    current = model if rewritten is None else tune(rewritten, "after the metanetwork")
    gradients = None if data is None else gradients_for(own, current, data.train, seed=seed)
    pruned = prune_by_pattern(current, graph, example_inputs, config, own, gradients=gradients)
    if data is not None:
        images = reconstruct_images, recalibrate_images
        mend(current, pruned, graph.spec, data.train, *images, seed=seed, augment=augment)
    tune(pruned.model, "after pruning", mask=pruned.weights)
    return _result(pruned.model, pruned.before, example_inputs, data, pruned.weights)


def _refuse_without(data: Data | None, tunes: bool, reconstructs: int, otherwise: bool) -> None:
    for what, wanted in (("fine-tuning", tunes), ("reconstruction", reconstructs)):
        if wanted and data is None:
            raise PruningError(f"{what} needs data", hint="pass data=gmn.load_data(...)")
    if reconstructs and otherwise:
        expected = "channels that a criterion removed"
        raise PruningError("nothing to reconstruct", expected=expected, hint="leave reconstruct_images out")


def _tuned(model: nn.Module, when: str, *, data: Data | None, finetune: Fit | None, **options: Any) -> nn.Module:
    if data is not None and finetune is not None:
        fit(model, data.train, finetune, title=f"fine-tuning {when}", **options)
    return model


def _target(speed_up: float | None, pattern: dict[str, Any], options: dict[str, Any]) -> Prune:
    checked(Ranking, options, "gmn.prune")  # of a recipe's section only these are arguments
    return checked(Prune, {"speed_up": speed_up, **pattern, **options}, "gmn.prune")


def _refuse_beside_votes(unused: dict[str, Any], options: dict[str, Any]) -> None:
    usual = inspect.signature(prune).parameters
    if given := [*(name for name, value in unused.items() if value != usual[name].default), *options]:
        raise PruningError("a zoo's votes decide which channels go", got=", ".join(given), hint="leave that out")


def _elected(
    voters: Voters, model: nn.Module, example_inputs: Any, data: Data | None, speed_up: float | None, **options: Any
) -> Result:
    if data is None or speed_up is not None:
        got = "no data" if data is None else f"speed_up={speed_up:g}"
        hint = f"the zoo decides how much goes: {voters.zoo.about['ratio']:.0%} of each layer's units"
        raise PruningError("a zoo votes for a task", expected="data=, and no speed_up", got=got, hint=hint)
    own, theirs = model.state_dict(), voters.backbone.model.state_dict()
    if own.keys() != theirs.keys() or not all(torch.equal(own[name].cpu(), theirs[name].cpu()) for name in own):
        hint = "voters.backbone.model is the one that its tasks share"
        raise PruningError("the zoo is of another network", where=str(voters.zoo.folder), hint=hint)
    device = next(model.parameters()).device
    data, voters = data.to(device), replace(voters, backbone=voters.backbone.to(device))
    return _result(voters.elect(data, **options), cost(model, example_inputs), example_inputs, data)


def _result(
    model: nn.Module, before: Cost, example_inputs: Any, data: Data | None, mask: WeightMask | None = None
) -> Result:
    after = cost(model, example_inputs)
    report = {"flops": after.flops, "parameters": after.parameters, "speed_up": before.flops / after.flops}
    if mask is not None:
        left = parameters_left(model, mask.keep)
        report |= {"parameters": left, "parameters_left": left / before.parameters}
    if data is not None:
        report["validation_accuracy"] = evaluate(model, data.val).accuracy
    return Result(model.eval(), report, mask)
