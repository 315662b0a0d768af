"""Choose what goes: small steps down the ranking until the target speed-up is reached.

The scores are computed again after each step, from norms in which the slices of removed channels are zero: those are
the norms after surgery, without surgery. Only the networks whose FLOPs are counted are cut for real.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmn.costs import Cost, cost
from gmn.criteria import Importance
from gmn.errors import PruningError
from gmn.graph import GraphSpec, NetworkGraph
from gmn.groups import Couplings, KeepMask
from gmn.settings import Criterion, Prune
from gmn.surgery import remove, settled


@dataclass(frozen=True)
class Pruned:
    """A smaller network, the nodes that stayed, and its cost before and after."""

    model: nn.Module
    mask: KeepMask
    before: Cost
    after: Cost

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

    Raises:
        PruningError: if nothing can be pruned or the target is out of reach; the message says which limit stops it.
    """
    before = before or cost(model, example_inputs)
    if before.flops / cost(model, example_inputs).flops >= config.speed_up:
        raise PruningError(
            "the network is at the target already",
            expected=f"a target above {before.flops / cost(model, example_inputs).flops:.2f}x",
            got=f"{config.speed_up:g}x",
        )
    coupled = settled(model, graph.spec, example_inputs)
    masks = list(mask_steps(dict(model.state_dict()), graph.spec, coupled, config, criterion, prior))
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
        smallest = cost(cut(masks[-1]), example_inputs) if masks else None
        raise _out_of_reach(coupled, config, before, smallest)
    return best


def mask_steps(
    state: dict[str, Tensor],
    spec: GraphSpec,
    coupled: Couplings,
    config: Prune,
    criterion: Criterion | None = None,
    prior: Tensor | None = None,
) -> Iterator[KeepMask]:
    """Masks with fewer and fewer channels, one per step, until every group is at its limit.

    Scores are multiplied with `prior`, [channels].
    """
    importance = Importance(spec, coupled, criterion)
    energies = {name: energy.detach().cpu() for name, energy in importance.energies(state).items()}
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    step = max(1, round(int(coupled.prunable.sum()) / config.steps))
    floor = _floors(coupled, config.max_ratio)
    while True:
        scores = importance.scores(energies, keep) * (1.0 if prior is None else prior)
        drop = _lowest(scores, keep & coupled.prunable, coupled.group, floor, step)
        if not len(drop):
            return
        keep[drop] = False
        _zero(energies, importance, keep)
        yield KeepMask(coupled.nodes(keep))


def _floors(coupled: Couplings, max_ratio: float) -> Tensor:
    """[groups]: how many channels of each must stay."""
    sizes = torch.bincount(coupled.group)
    return (sizes - (sizes * max_ratio).floor().long()).clamp(min=1)


def _lowest(scores: Tensor, candidates: Tensor, group: Tensor, floor: Tensor, count: int) -> Tensor:
    """The `count` lowest candidates that leave every group its floor."""
    alive = torch.bincount(group[candidates], minlength=len(floor))
    chosen: list[int] = []
    for channel in scores.masked_fill(~candidates, float("inf")).argsort().tolist():
        if len(chosen) == count or not candidates[channel]:
            break
        if alive[group[channel]] > floor[group[channel]]:
            alive[group[channel]] -= 1
            chosen.append(channel)
    return torch.tensor(chosen, dtype=torch.int64)


def _zero(energies: dict[str, Tensor], importance: Importance, keep: Tensor) -> None:
    """Set the slices of removed channels to zero, in place."""
    for member in importance.members:
        energy, drop = energies[member.param], ~keep[member.channel]
        if member.axis is not None:
            drop = drop.view(energy.shape[0], -1, 1) if member.axis == 0 else drop.view(energy.shape[0], 1, -1)
        energy.masked_fill_(drop, 0.0)


def refuse_whole(coupled: Couplings) -> None:
    """Raise PruningError, with the reasons, if every channel must stay."""
    if not bool(coupled.prunable.any()):
        raise nothing_to_prune(coupled)


def nothing_to_prune(coupled: Couplings) -> PruningError:
    """The error that every channel must stay, with the reasons."""
    return PruningError("nothing can be pruned", hint=f"all channels must stay: {_whole(coupled)}")


def _whole(coupled: Couplings) -> str:
    return "; ".join(sorted(set(coupled.frozen.values())))


def _out_of_reach(coupled: Couplings, config: Prune, before: Cost, smallest: Cost | None) -> PruningError:
    if smallest is None:
        return nothing_to_prune(coupled)
    return PruningError(
        "the target speed-up is out of reach",
        expected=f"{config.speed_up:g}x",
        got=f"at most {before.flops / smallest.flops:.2f}x with prune.max_ratio {config.max_ratio:g}",
        hint=f"raise prune.max_ratio or lower prune.speed_up; these stay whole: {_whole(coupled)}",
    )
