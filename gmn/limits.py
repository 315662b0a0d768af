"""How many channels of a layer may go: ratios by pattern, keep-lists, and multiples.

A pattern of `fnmatch` means a group of channels if it matches the qualified name of a layer that makes them: of a
residual stream any layer that writes to it, of attention heads the projections to query, key and value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gmn.errors import PruningError
from gmn.graph import GraphSpec
from gmn.groups import Couplings
from gmn.names import nearest
from gmn.settings import Ranking


def makers(spec: GraphSpec, coupled: Couplings) -> dict[str, set[int]]:
    """The groups whose channels each layer makes, by the layer's qualified name."""
    group = coupled.group[coupled.channel]
    made: dict[str, set[int]] = {}
    for param, slots in spec.weights().items():
        made.setdefault(param.rpartition(".")[0], set()).update(group[spec.made_by(slots)].unique().tolist())
    return made


def kept_whole(spec: GraphSpec, coupled: Couplings, config: Ranking) -> Couplings:
    """The couplings, those groups frozen too that lose no channel by `prune.keep`, or by a limit of 0.

    Raises:
        PruningError: A pattern matches no layer.
    """
    reasons = {group: where for group, ratio, where in _matches(spec, coupled, config) if not ratio}
    return dataclasses.replace(coupled, frozen={**reasons, **coupled.frozen})


def floors(spec: GraphSpec, coupled: Couplings, config: Ranking) -> Tensor:
    """[groups]: how many channels of each must stay; one at least, and a multiple where the group allows it.

    Raises:
        PruningError: A pattern matches no layer.
    """
    sizes = torch.bincount(coupled.group)
    ratios: dict[int, float] = {}
    for group, ratio, _ in _matches(spec, coupled, config):
        ratios[group] = min(ratio, ratios.get(group, 1.0))
    own = torch.tensor([ratios.get(group, config.max_ratio) for group in range(len(sizes))])
    return rounded((sizes - (sizes * own).floor().long()).clamp(min=1), sizes, config.round_to)


def rounded(kept: Tensor, sizes: Tensor, round_to: int) -> Tensor:
    """[groups]: numbers of channels, up to the next multiple; the whole group where that is more than it has.

    >>> rounded(torch.tensor([9, 9, 3]), torch.tensor([32, 12, 6]), 8).tolist()
    [16, 12, 3]
    """
    up = torch.minimum((kept + round_to - 1) // round_to * round_to, sizes)
    return torch.where(sizes < round_to, kept, up)


def described(config: Ranking) -> str:
    """The limits that a ranking stops at, for an error."""
    own = [f"prune.limits {pattern!r}: {ratio:g}" for pattern, ratio in config.limits.items()]
    multiples = [f"prune.round_to {config.round_to}"] if config.round_to > 1 else []
    return ", ".join([f"prune.max_ratio {config.max_ratio:g}", *own, *multiples])


def asked(config: Ranking) -> list[tuple[str, float, str]]:
    """Every pattern, the share that may go of what it means, and where that stands."""
    limits = [(pattern, ratio, f"prune.limits {pattern!r}: {ratio:g}") for pattern, ratio in config.limits.items()]
    return limits + [(pattern, 0.0, f"prune.keep {pattern!r}") for pattern in config.keep]


def meant(pattern: str, layers: Collection[str], where: str, what: str = "layers that make channels") -> list[str]:
    """The layers that a pattern means; PruningError, which says what layers they are, if it matches none.

    >>> meant("layer?.*", ["conv1", "layer1.conv1"], "prune.keep")
    ['layer1.conv1']
    """
    names = [name for name in layers if fnmatchcase(name, pattern)]
    if not names:
        near = nearest(pattern, layers) or f"{what}: {', '.join(list(layers)[:5])}, ..."
        raise PruningError("the pattern matches no layer", expected=f"one of the {what}", got=where, hint=near)
    return names


def _matches(spec: GraphSpec, coupled: Couplings, config: Ranking) -> Iterator[tuple[int, float, str]]:
    """Every group that a pattern means, with the ratio and where that stands."""
    patterns = asked(config)
    made = makers(spec, coupled) if patterns else {}
    for pattern, ratio, where in patterns:
        for group in sorted({group for name in meant(pattern, made, where) for group in made[name]}):
            yield group, ratio, where
