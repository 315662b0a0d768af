"""Importance scores and the sparsity loss (GMN, appendix B.2), for all groups of a network at once.

    I_t,k  = sum |w_t[k]|^p                        for each parameter slice t of channel k; others: `gmn.scores`
    I_k    = mean over t of I_t,k                  reduce="mean"; "first" takes the layer that makes the channel
    I^_k   = I_k / max over the group of I         normalize="max"; "mean" or "none"
    R      = sum_k gamma_k I^_k
    gamma_k = 2 ** (alpha (sqrt I_max - sqrt I_k) / (sqrt I_max - sqrt I_min))

gamma is a constant for the gradient. So is the normaliser in the paper, and then most of the gradient shrinks all
channels alike. With `scale_invariant` the loss is R = sum_k gamma_k I_k / mean I with the mean differentiated: scaling
a whole group changes nothing, only differences between its channels count. (Differentiating the maximum instead
would reward a single channel for growing.)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from gmn.errors import PruningError
from gmn.graph import GraphSpec
from gmn.groups import Couplings
from gmn.members import Members
from gmn.scores import Course, Tensors, make_score, refuse_no_gradients
from gmn.settings import Criterion


class Importance:
    """Scores of all channels of a network; built once, evaluated on any values of its parameters.

    Args:
        spec: The graph's structure.
        coupled: Its coupled channels.
        criterion: How to score.

    Attributes:
        coupled: The couplings, those groups frozen too that the criterion cannot judge.

    Raises:
        PruningError: No criterion of that name.
    """

    def __init__(self, spec: GraphSpec, coupled: Couplings, criterion: Criterion | None = None) -> None:
        self.criterion = criterion or Criterion()
        self.score = make_score(self.criterion)
        self.members = Members(spec, coupled, self.score.reads, self.criterion.reduce)
        blind = coupled.group[coupled.prunable & ~self.members.seen].unique().tolist()
        reason = f"nothing for the criterion {self.score.name!r} to read"
        self.coupled = dataclasses.replace(coupled, frozen={**dict.fromkeys(blind, reason), **coupled.frozen})

    def raw(self, state: Tensors, gradients: Tensors | None = None) -> Tensor:
        """[channels]: I_k, before normalisation; differentiable in the state if the criterion is."""
        refuse_no_gradients(self.score, gradients)
        return self._checked(self.score.channels(self.members, state, gradients))

    def course(self, state: Tensors, gradients: Tensors | None = None) -> Course:
        """Scores while channels go: what is kept so far, [channels] bool, to [channels]."""
        refuse_no_gradients(self.score, gradients)
        raw = self.score.course(self.members, state, gradients)
        return lambda keep: self.normalized(_refuse_unordered(self._checked(raw(keep)), self.score.name), keep)

    def _checked(self, raw: Tensor) -> Tensor:
        if not isinstance(raw, Tensor) or raw.shape != (self.coupled.num_channels,):
            expected = f"one number for each of {self.coupled.num_channels} channels"
            got = str(tuple(raw.shape)) if isinstance(raw, Tensor) else type(raw).__name__
            raise PruningError(f"malformed scores of the criterion {self.score.name!r}", expected=expected, got=got)
        return raw

    def normalizer(self, raw: Tensor, keep: Tensor | None = None, how: str | None = None) -> Tensor:
        """[channels]: NORM of the group that each channel belongs to, over the channels kept so far."""
        group = self.coupled.group.to(raw.device)
        kept = torch.ones_like(raw) if keep is None else keep.to(raw)
        size, how = int(group.max()) + 1, how or self.criterion.normalize
        if how == "none":
            return torch.ones_like(raw)
        if how == "max":
            return _reduce(raw * kept, group, "amax")[group]
        total, count = (raw.new_zeros(size).index_add(0, group, x) for x in (raw * kept, kept))
        return (total / count.clamp(min=1.0))[group]

    def normalized(self, raw: Tensor, keep: Tensor | None = None) -> Tensor:
        """[channels]: I_k / NORM, comparable over groups."""
        return raw / self.normalizer(raw, keep).clamp(min=torch.finfo(raw.dtype).tiny)

    def scores(self, state: Tensors, keep: Tensor | None = None, gradients: Tensors | None = None) -> Tensor:
        """[channels]: normalised scores; the lowest go first. `keep`: [channels] bool, what the normaliser is over."""
        return self.normalized(self.raw(state, gradients), keep)

    def sparsity_loss(self, state: Tensors, *, scale_invariant: bool = False) -> Tensor:
        """R summed over the groups that can be pruned; a scalar, differentiable in the parameters.

        Raises:
            PruningError: The criterion has no gradient.
        """
        refuse_no_loss(self.criterion)
        raw = self.raw(state)
        norm = self.normalizer(raw, how="mean") if scale_invariant else self.normalizer(raw).detach()
        terms = self.gamma(raw.detach()) * raw / norm.clamp(min=torch.finfo(raw.dtype).tiny)
        return terms[self.coupled.prunable.to(raw.device)].sum()

    def gamma(self, raw: Tensor) -> Tensor:
        """[channels]: 2^0 for the strongest channel of a group to 2^alpha for the weakest; 1 where all are equal."""
        group, root = self.coupled.group.to(raw.device), raw.sqrt()
        high, low = _reduce(root, group, "amax")[group], _reduce(root, group, "amin")[group]
        spread = torch.where(high > low, high - low, torch.ones_like(high))
        return 2.0 ** (self.criterion.alpha * (high - root) / spread)


def refuse_no_loss(criterion: Criterion) -> None:
    """Raise PruningError unless the criterion can be a sparsity loss."""
    if not make_score(criterion).differentiable:
        hint = "learn with norm or bn-scale; what was learnt can be pruned by any: gmn prune --set criterion.score=..."
        raise PruningError("the criterion is no sparsity loss", got=f"criterion.score {criterion.score}", hint=hint)


def _refuse_unordered(raw: Tensor, name: str) -> Tensor:
    if not bool((raw >= 0).all() & raw.isfinite().all()):
        worst = raw[~((raw >= 0) & raw.isfinite())][0]
        raise PruningError(f"scores of the criterion {name!r} do not rank", expected="numbers from 0", got=f"{worst:g}")
    return raw


def _reduce(values: Tensor, group: Tensor, how: Literal["amax", "amin"]) -> Tensor:
    size = int(group.max()) + 1
    return values.new_zeros(size).scatter_reduce(0, group, values, how, include_self=False)
