"""Choose what goes: small steps down the ranking until the target speed-up is reached.

The scores are computed again after each step, with the slices of removed channels zero: of sums such as norms those
are the scores after surgery, without surgery. Only the networks whose FLOPs are counted are cut for real. Of equal
scores the channel that comes first in the network goes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmn.costs import Cost, cost
from gmn.criteria import Importance
from gmn.errors import PruningError
from gmn.graph import GraphSpec, NetworkGraph
from gmn.groups import Couplings, KeepMask
from gmn.limits import described, floors, kept_whole, rounded
from gmn.savings import Savings, positions
from gmn.settings import Criterion, Prune, Ranking
from gmn.surgery import remove, settled
from gmn.weight_masks import WeightMask


@dataclass(frozen=True)
class Pruned:
    """A smaller network, the nodes and single weights that stayed, and its cost before and after."""

    model: nn.Module
    mask: KeepMask
    before: Cost
    after: Cost
    weights: WeightMask | None = None

    @property
    def speed_up(self) -> float:
        """FLOPs before / FLOPs after."""
        return self.before.flops / self.after.flops


def prune_to(
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
    """Remove the lowest channels until the network is `config.speed_up` times cheaper.

    Args:
        model: The network; it is not changed.
        graph: Its graph (only the structure is used).
        example_inputs: For counting FLOPs and for the proof run.
        config: Target and limits.
        criterion: How channels are scored.
        before: The cost that the speed-up counts from; default: the model's own.
        prior: [channels] factors on the scores, such as `gmn.vote.prior`.
        gradients: Of a loss with respect to the parameters, for criteria that read them: `gmn.loss_gradients`.

    Raises:
        PruningError: if nothing can be pruned or the target is out of reach; the message says which limit stops it.
            Also for a pattern that matches no layer, and a criterion that cannot be computed.
    """
    if config.speed_up is None:
        hint = "gmn.prune(...) does all patterns"
        raise PruningError("channels need a speed-up to aim at", got=f"pattern {config.pattern}", hint=hint)
    whole = cost(model, example_inputs)
    before = before or whole
    if (so_far := before.flops / whole.flops) >= config.speed_up:
        expected = f"a target above {so_far:.2f}x"
        raise PruningError("the network is at the target already", expected=expected, got=f"{config.speed_up:g}x")
    coupled = settled(model, graph.spec, example_inputs)
    masks = masks_of(model, graph.spec, coupled, example_inputs, config, criterion, prior=prior, gradients=gradients)
    cut = lambda mask: remove(model, graph.spec, mask, example_inputs, coupled=coupled)  # noqa: E731
    low, high = 0, len(masks)
    best: Pruned | None = None
    while low < high:  # FLOPs fall with every step: bisect for the first that is enough
        middle = (low + high) // 2
        smaller = cut(masks[middle])
        candidate = Pruned(smaller, masks[middle], before, cost(smaller, example_inputs))
        if candidate.speed_up >= config.speed_up:
            best, high = candidate, middle
        else:
            low = middle + 1
    if best is None:
        judged = Importance(graph.spec, kept_whole(graph.spec, coupled, config), criterion).coupled
        smallest = cost(cut(masks[-1]), example_inputs) if masks else whole
        raise _out_of_reach(judged, config, before, smallest)
    return best


def masks_of(
    model: nn.Module,
    spec: GraphSpec,
    coupled: Couplings,
    example_inputs: Any,
    config: Ranking,
    criterion: Criterion | None = None,
    *,
    prior: Tensor | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> list[KeepMask]:
    """All masks of `mask_steps` for a network as it is."""
    uses = positions(model, spec, example_inputs) if config.per_flop else None
    state = dict(model.state_dict())
    return list(mask_steps(state, spec, coupled, config, criterion, prior, gradients=gradients, uses=uses))


def mask_steps(
    state: Mapping[str, Tensor],
    spec: GraphSpec,
    coupled: Couplings,
    config: Ranking,
    criterion: Criterion | None = None,
    prior: Tensor | None = None,
    *,
    gradients: Mapping[str, Tensor] | None = None,
    uses: Mapping[str, float] | None = None,
) -> Iterator[KeepMask]:
    """Masks with fewer and fewer channels, one per step, until every group is at its limit.

    Args:
        state: Parameters by name.
        spec, coupled: The graph's structure and couplings.
        config: Steps and limits.
        criterion: How channels are scored.
        prior: [channels] factors on the scores.
        gradients: Of a loss with respect to the parameters, for criteria that read them.
        uses: From `gmn.savings.positions`; scores are then divided by the FLOPs that a channel still costs.
    """
    importance = Importance(spec, kept_whole(spec, coupled, config), criterion)
    course = importance.course(_on_cpu(state), None if gradients is None else _on_cpu(gradients))
    savings = None if uses is None else Savings(spec, coupled, uses)
    free, group, floor = importance.coupled.prunable, coupled.group, floors(spec, coupled, config)
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    gone: list[int] = []  # in the order in which they went
    step, last = max(1, round(int(free.sum()) / config.steps)), keep.clone()
    while True:
        scores = course(keep) * (1.0 if prior is None else prior) / (1.0 if savings is None else savings(keep))
        if config.ranking == "local":
            scores = _shares(scores, keep, group)
        drop = _lowest(scores, keep & free, group, floor, step)
        if not drop:
            return
        keep[drop] = False
        gone += drop
        now = _with_multiples(keep, gone, group, config.round_to)
        if not torch.equal(now, last):
            yield KeepMask(coupled.nodes(now))
        last = now


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies to rank by, at least in single precision: half of it makes ties of different channels."""
    return {n: t.detach().to("cpu", torch.promote_types(t.dtype, torch.float32)) for n, t in tensors.items()}


def _lowest(scores: Tensor, candidates: Tensor, group: Tensor, floor: Tensor, count: int) -> list[int]:
    """The `count` lowest candidates that leave every group its floor."""
    alive = torch.bincount(group[candidates], minlength=len(floor))
    chosen: list[int] = []
    for channel in scores.masked_fill(~candidates, float("inf")).argsort(stable=True).tolist():
        if len(chosen) == count or not candidates[channel]:
            break
        if alive[group[channel]] > floor[group[channel]]:
            alive[group[channel]] -= 1
            chosen.append(channel)
    return chosen


def _shares(scores: Tensor, keep: Tensor, group: Tensor) -> Tensor:
    """[channels]: the share of its group that is gone once a channel and all below it are; what went has its 0."""
    order = scores.masked_fill(~keep, -1.0).argsort(stable=True)  # what went comes first
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group)
    rank = torch.empty(len(order))
    rank[order] = (torch.arange(1, len(order) + 1) - (sizes.cumsum(0) - sizes)[group[order]]).float()
    return rank / sizes[group]


def _with_multiples(keep: Tensor, gone: list[int], group: Tensor, round_to: int) -> Tensor:
    """[channels] bool: what is kept, and of every group the last that went, up to a multiple."""
    kept, sizes = torch.bincount(group[keep], minlength=int(group.max()) + 1), torch.bincount(group)
    missing = (rounded(kept, sizes, round_to) - kept).tolist()
    keep = keep.clone()
    for channel in reversed(gone) if any(missing) else ():
        if missing[number := int(group[channel])]:
            missing[number] -= 1
            keep[channel] = True
    return keep


def refuse_whole(coupled: Couplings) -> None:
    """Raise PruningError, with the reasons, if every channel must stay."""
    if not bool(coupled.prunable.any()):
        raise PruningError("nothing can be pruned", hint=f"all channels must stay: {_whole(coupled)}")


def refuse_nothing(coupled: Couplings, ratio: float) -> None:
    """Raise PruningError if no layer is so large that this share of its channels is one; see `Couplings.left_after`."""
    sizes = torch.bincount(coupled.group)
    own = torch.isin(torch.arange(len(sizes)), coupled.group[coupled.prunable])
    if not bool((coupled.left_after(ratio) < sizes)[own].any()):
        largest = max(2, int(sizes[own].max()))  # the only channel of a layer stays
        expected = f"a ratio of {1 / largest:.2g} or more: one of {largest} channels of the largest layer"
        raise PruningError("nothing would be pruned", expected=expected, got=f"{ratio:g}")


def _whole(coupled: Couplings) -> str:
    return "; ".join(sorted(set(coupled.frozen.values())))


def _out_of_reach(coupled: Couplings, config: Prune, before: Cost, smallest: Cost) -> PruningError:
    refuse_whole(coupled)
    return PruningError(
        "the target speed-up is out of reach",
        expected=config.goal,
        got=f"at most {before.flops / smallest.flops:.2f}x with {described(config)}",
        hint=f"raise prune.max_ratio{' or prune.limits' if config.limits else ''} or lower prune.speed_up;"
        f" these stay whole: {_whole(coupled)}",
    )
