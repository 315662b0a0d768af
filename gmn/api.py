"""What users call in Python: `gmn.load` and `gmn.prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmn.builder import Layout
from gmn.checkpoint import load_metanetwork
from gmn.convert import to_graph, to_model
from gmn.costs import cost
from gmn.data import Augment, Data
from gmn.errors import CheckpointError, PruningError
from gmn.metanetwork import MetaNetwork
from gmn.ranking import prune_to
from gmn.reader import OnUnknown
from gmn.settings import Criterion, Fit, Prune
from gmn.training import evaluate, fit, recalibrate


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


def load(path: str | Path) -> Meta:
    """The metanetwork of a run folder, or of a file; CheckpointError if there is none."""
    network, layout, _ = load_metanetwork(metanetwork_path(Path(path)))
    return Meta(network, layout)


def metanetwork_path(path: Path) -> Path:
    """The file of a metanetwork: the path itself, or `metanetwork.safetensors` in a run folder."""
    file = path / "metanetwork.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            "no metanetwork here", expected="a run folder of gmn meta-train, or a .safetensors file", got=str(path)
        )
    return file


@dataclass(frozen=True)
class Result:
    """A pruned network, and its numbers: FLOPs, parameters, speed-up, and accuracies if there was data."""

    model: nn.Module
    report: dict[str, float]


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    meta: Meta | None = None,
    speed_up: float = 2.0,
    finetune: Fit | None = None,
    data: Data | None = None,
    augment: Augment | None = None,
    criterion: Criterion | None = None,
    max_ratio: float = 0.9,
    recalibrate_images: int = 1000,
    on_unknown: OnUnknown = "keep",
    seed: int = 0,
) -> Result:
    """Make a network cheaper: [metanetwork -> fine-tune ->] prune -> fine-tune. The model itself is not changed.

    Args:
        model: Any network that `gmn.to_graph` takes.
        example_inputs: What the network is run on to follow its channels and to count its FLOPs.
        meta: From `gmn.load`; None prunes directly.
        speed_up: FLOPs before / FLOPs after.
        finetune: The fine-tuning after the metanetwork and the one after pruning; needs `data`.
        data: From `gmn.load_data`; also recalibrates batch norms (on `recalibrate_images` images) and evaluates.
        augment: Random changes of the training images.
        criterion, max_ratio: How channels are scored, and at most how many of a layer go.
        on_unknown: See `gmn.to_graph`; "keep" never prunes around a layer without a rule.
        seed: Seed of the fine-tuning.

    Raises:
        PruningError: if the target is out of reach, or fine-tuning is asked for without data.
        ConversionError: if the network has no graph.
    """
    if finetune is not None and data is None:
        raise PruningError("fine-tuning needs data", hint="pass data=gmn.load_data(...)")
    if speed_up <= 1 or not 0 < max_ratio < 1:
        got = f"speed_up={speed_up:g}, max_ratio={max_ratio:g}"
        raise PruningError("nothing to aim at", expected="speed_up above 1, max_ratio between 0 and 1", got=got)
    graph = to_graph(model, example_inputs, on_unknown=on_unknown)
    before = cost(model, example_inputs)
    data = None if data is None else data.to(graph.node_features.device)

    def tune(network: nn.Module, title: str) -> None:
        if data is not None and finetune is not None:
            fit(network, data.train, finetune, seed=seed, augment=augment, title=title)

    current = model
    if meta is not None:
        current = meta.rewrite(model, example_inputs, on_unknown=on_unknown)
        tune(current, "fine-tuning after the metanetwork")
    config = Prune(speed_up=speed_up, max_ratio=max_ratio)
    pruned = prune_to(current, graph, example_inputs, config, criterion, before=before)
    if data is not None:
        recalibrate(pruned.model, data.train, recalibrate_images, seed=seed)
    tune(pruned.model, "fine-tuning after pruning")
    report = {"flops": pruned.after.flops, "parameters": pruned.after.parameters, "speed_up": pruned.speed_up}
    if data is not None:
        report["validation_accuracy"] = evaluate(pruned.model, data.val).accuracy
    return Result(pruned.model.eval(), report)
