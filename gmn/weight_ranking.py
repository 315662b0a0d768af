"""Choose which single weights of a network go, and the one door to all patterns of pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmn.address import EdgeSlot
from gmn.costs import Cost, cost
from gmn.errors import PruningError
from gmn.graph import GraphSpec, NetworkGraph
from gmn.groups import KeepMask
from gmn.limits import asked, meant
from gmn.ranking import Pruned, prune_to
from gmn.scores import Elementwise, Random, make_score, refuse_no_gradients
from gmn.settings import Criterion, Prune
from gmn.trace import clone
from gmn.weight_masks import WeightMask, most, n_of_m, parameters_left, reasons, unstructured

LEAST = 0.02
"""Share of the weights that the last point of a curve leaves, unless limits stop it before."""

AS_L1 = {"p": 1.0, "reduce": "mean", "normalize": "none", "alpha": 0.0}
"""Fields of a criterion that only channels have, as the plain l1 norm would say them."""


def prune_by_pattern(
    model: nn.Module,
    graph: NetworkGraph,
    example_inputs: Any,
    config: Prune,
    criterion: Criterion | None = None,
    *,
    before: Cost | None = None,
    prior: Tensor | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> Pruned:
    """Prune as `config.pattern` says: channels, see `gmn.ranking.prune_to`, or single weights, which become zero.

    Of weights, `Pruned.after` counts the parameters that are not zero; FLOPs are those of dense kernels.

    Raises:
        PruningError: if nothing can be pruned, the target is out of reach, or the criterion does not score weights.
    """
    if config.of_channels:
        return prune_to(
            model, graph, example_inputs, config, criterion, before=before, prior=prior, gradients=gradients
        )
    weights = weight_mask(model, graph.spec, config, criterion, gradients)
    masked, whole = clone(model), cost(model, example_inputs)
    weights.apply(masked)
    after = dataclasses.replace(whole, parameters=parameters_left(masked, weights.keep))
    every = KeepMask(torch.ones(graph.spec.num_nodes, dtype=torch.bool))
    return Pruned(masked, every, before or whole, after, weights)


def weight_mask(
    model: nn.Module,
    spec: GraphSpec,
    config: Prune,
    criterion: Criterion | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> WeightMask:
    """The weights that stay when a network is pruned to a target that is not for channels.

    Raises:
        PruningError: if nothing would go, or as `prune_by_pattern`.
    """
    found = Prunable.of(model, spec, config)
    mask = found.mask(weight_scores(model, found.axes, criterion, gradients), config)
    if all(bool(keep.all()) for keep in mask.keep.values()):
        total = sum(keep.numel() for keep in mask.keep.values())
        expected, got = f"at least {1 / total:.2g}, one of {total:,} weights", f"prune.sparsity {config.sparsity:g}"
        raise PruningError("the share is too small: no weight would go", expected=expected, got=got)
    return mask


def weight_ladder(
    model: nn.Module,
    spec: GraphSpec,
    config: Prune,
    criterion: Criterion | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    *,
    points: int,
) -> Iterator[WeightMask]:
    """Masks with fewer and fewer weights, for curves.

    Of N:M those that leave M - 1, M - 2, ... 1 of M. Unstructured: `points` of them, each with the same share of the
    weights before it, down to `LEAST` or to what limits leave.
    """
    found = Prunable.of(model, spec, config)
    scores = weight_scores(model, found.axes, criterion, gradients)
    if group := config.n_of_m:
        targets = [{"pattern": f"{n}:{group[1]}"} for n in range(group[1] - 1, 0, -1)]
    else:
        free = sum(most(scores[name], ratio) for name, ratio in found.limits.items())
        last = max(LEAST, 1 - free / sum(score.numel() for score in scores.values()))
        targets = [{"sparsity": 1 - last ** (number / points)} for number in range(1, points + 1)]
    for target in targets:
        yield found.mask(scores, config.model_copy(update=target))


@dataclass(frozen=True)
class Prunable:
    """The weights that may go: those of the convolutions and linear layers that the graph holds.

    First layer, classifier and depthwise kernels are among them; biases, norms and embeddings are not. N:M leaves a
    layer dense whose inputs are no multiple of M, such as a depthwise kernel, which has one, or the three colours.

    Attributes:
        axes: By parameter name, the axis of its inputs.
        limits: By parameter name, the largest share that may go.
        dense: Layers that stay dense, with the reason.
    """

    axes: dict[str, int]
    limits: dict[str, float]
    dense: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, spec: GraphSpec, config: Prune) -> Prunable:
        """Those of a network; PruningError if none is left, or a pattern matches no layer."""
        slots = {name: slots[0] for name, slots in spec.weights().items() if not _looked_up(model, name)}
        layers = {name: name.rpartition(".")[0] for name in slots}
        limits, dense = dict.fromkeys(slots, 1.0), {}
        for pattern, ratio, where in asked(config):
            for layer in meant(pattern, dict.fromkeys(layers.values()), where, "layers with weights to prune"):
                limits |= {name: min(ratio, limits[name]) for name in slots if layers[name] == layer}
                dense |= {} if ratio else {layer: where}
        axes = {}
        for name, slot in slots.items():
            axes[name], inputs = _inputs(slot, spec.shapes[name])
            if config.n_of_m and inputs % config.n_of_m[1]:
                dense.setdefault(layers[name], f"inputs: {inputs}, no multiple of {config.n_of_m[1]}")
        axes = {name: axis for name, axis in axes.items() if layers[name] not in dense}
        if not axes:
            raise PruningError("no weight may go", hint=reasons(dense) or "the graph holds no weights")
        return cls(axes, {name: limits[name] for name in axes}, dense)

    def mask(self, scores: Mapping[str, Tensor], config: Prune) -> WeightMask:
        """What stays of these weights, by their scores."""
        if group := config.n_of_m:
            keep = {name: n_of_m(score, *group, self.axes[name]) for name, score in scores.items()}
        else:
            share, local = config.sparsity or 0.0, config.ranking == "local"
            keep = unstructured(scores, share, limits=self.limits, local=local)
        return WeightMask(keep, self.dense)


def _looked_up(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Embedding, nn.EmbeddingBag))


def _inputs(slot: EdgeSlot, shape: Sequence[int]) -> tuple[int, int]:
    """The axis of a weight that its inputs lie on, and how many consecutive ones an output reads.

    Pixels that a linear layer reads flattened are inputs too, as they are for the kernels that skip zeros.
    """
    view = slot.canonical(torch.empty(tuple(shape), device="meta"))
    into, taps = (torch.arange(size) * view.stride(axis) for axis, size in enumerate(view.shape) if axis > 1)
    kernel = torch.stack(torch.unravel_index(into[:, None] + taps, tuple(shape)))  # [axes, I, K]: where each number is
    line = kernel[:, 0] if len(into) == 1 and len(shape) == 2 else kernel[:, :, 0]
    moves = (line != line[:, :1]).any(dim=1).tolist()
    if True not in moves:
        return 1, 1
    axis = moves.index(True)
    others = torch.arange(len(shape)) != axis
    return axis, int((kernel == kernel[:, :1, :1])[others].all(dim=0).sum())


def weight_scores(
    model: nn.Module,
    names: Iterable[str],
    criterion: Criterion | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The score of every weight of some parameters: |w|, |w dL/dw|, a draw by chance, or an energy of one's own.

    Raises:
        PruningError: if the criterion scores only channels, says what only channels have, or lacks its gradients.
    """
    criterion = criterion or Criterion()
    for field, value in AS_L1.items():
        if getattr(criterion, field) not in (value, Criterion.model_fields[field].default):
            got = f"criterion.{field} {getattr(criterion, field)}"
            raise PruningError("the criterion says what only channels have", got=got, hint="leave that out")
    score = make_score(criterion.model_copy(update={"p": 1.0}))
    weights = {name: model.get_parameter(name).detach() for name in names}
    if isinstance(score, Random):
        chance = torch.Generator().manual_seed(criterion.seed or 0)
        return {name: torch.rand(w.shape, generator=chance).to(w.device) for name, w in weights.items()}
    if not isinstance(score, Elementwise) or score.reads == "norms":
        expected, got = "norm, taylor, random or a gmn.scores.Elementwise", f"criterion.score {criterion.score}"
        raise PruningError("the criterion does not score single weights", expected=expected, got=got)
    refuse_no_gradients(score, gradients)
    own = gradients or {}
    energies = {name: score.energy(weight, own.get(name)) for name, weight in weights.items()}
    for name, energy in energies.items():
        if energy.shape != weights[name].shape or not bool(energy.isfinite().all()):
            expected = "a finite number for every weight"
            raise PruningError(f"scores of the criterion {score.name!r} do not rank", expected=expected, where=name)
    return energies
