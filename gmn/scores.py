"""How much each channel matters, before normalisation: five criteria behind one interface, and those a user registers.

    norm       REDUCE_t sum |w|^p                      GMN, appendix B.2; p = 1: l1 norms, p = 2: squared l2 norms
    bn-scale   REDUCE_t |gamma|                        network slimming, Liu et al. 2017
    taylor     REDUCE_t sum |w dL/dw|                  Molchanov et al. 2019
    fpgm       REDUCE_t sum_j ||w_k - w_j||            distance to the other filters of the layer, He et al. 2019
    random     uniform in [0, 1)

w are the numbers of one slice t of channel k (see `gmn.members`). The first three are sums of one *energy* per weight:
what would rank single weights, or the weights of an N:M block, ranks channels by its sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gmn.errors import PruningError
from gmn.masks import entries
from gmn.members import Members, Reads
from gmn.names import accepted, import_function, nearest
from gmn.settings import Criterion

Tensors = Mapping[str, Tensor]
Course = Callable[[Tensor], Tensor]
"""[channels] bool, what is kept so far -> [channels] scores."""


class Score(ABC):
    """A criterion: parameters, and what is known of each channel's members, to one number per channel."""

    name: str = ""
    reads: ClassVar[Reads] = "all"
    """Parameters that are members; a group with a channel that has none of them cannot be judged and stays whole."""
    needs_gradients: bool = False
    """Whether it is given dL/dw of every parameter."""
    differentiable: bool = False
    """Whether it can be a sparsity loss."""

    @abstractmethod
    def channels(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Tensor:
        """[channels]: at least 0, higher stays longer.

        Args:
            members: The slices of each channel; `members.reduce` turns one number per slice into one per channel.
            state: Parameters by name.
            gradients: Those of a loss with respect to them, by name, if the score asks for them.
        """

    def course(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Course:
        """Scores while channels go: asked again with every number of a removed channel set to zero."""

        def scores(keep: Tensor) -> Tensor:
            shapes = {name: tensor.shape for name, tensor in state.items()}
            stays = entries(members.spec, shapes, members.coupled.nodes(keep))
            left = {name: t * stays[name].to(t) if name in stays else t for name, t in state.items()}
            return self.channels(members, left, gradients)

        return scores


def refuse_no_gradients(score: Score, gradients: Tensors | None) -> None:
    """Raise PruningError if a score reads gradients and there are none."""
    if score.needs_gradients and gradients is None:
        hint = "pass data=, whose training images they are taken on, or gmn.loss_gradients(...)"
        raise PruningError(f"the criterion {score.name!r} needs gradients", got="none", hint=hint)


class Elementwise(Score):
    """Scores that are sums of one energy per weight."""

    @abstractmethod
    def energy(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """The energy of every number of a parameter, in its shape."""

    def energies(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> dict[str, Tensor]:
        """Energies by parameter: [G, O, I], summed over the taps of each kernel, or [channels] of a norm."""
        own, once = gradients or {}, {member.param: member for member in members}
        return {name: member.edges(self.energy(state[name], own.get(name))) for name, member in once.items()}

    def channels(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Tensor:
        return members.reduce(members.sums(self.energies(members, state, gradients)))

    def course(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Course:
        """The same scores as asking again, from energies that are computed once."""
        energies = {name: e.clone() for name, e in self.energies(members, state, gradients).items()}  # ours to silence

        def scores(keep: Tensor) -> Tensor:
            members.silence(energies, keep)
            return members.reduce(members.sums(energies))

        return scores


class Fixed(Score):
    """Scores that stay those of the whole network, whatever has gone."""

    def course(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Course:
        scores = self.channels(members, state, gradients)
        return lambda keep: scores


Maker = Callable[[Criterion], Score]
_SCORES: dict[str, tuple[Any, Maker]] = {}


def register_criterion(name: str, *, differentiable: bool = False) -> Callable[[Any], Any]:
    """Decorator: `criterion.score: name` means this subclass of `Score`, or this function.

    A function takes (members, state) and, if it wants dL/dw, a third argument `gradients`; see `Score.channels`.

    Args:
        name: What recipes call it.
        differentiable: Whether the function can be a sparsity loss; a class says so itself.

    Raises:
        PruningError: Another criterion has the name, or what is registered is neither.

    >>> @register_criterion("peak")
    ... def peak(members, state):
    ...     return members.reduce([member.rows(state[member.param]).abs().amax(1) for member in members])
    >>> make_score(Criterion(score="peak")).name
    'peak'
    """

    def register(made: Any) -> Any:
        make, known = _maker(made, differentiable), _SCORES[name][0] if name in _SCORES else made
        # a module that is loaded again, as in a notebook, may register its own again
        if known is not made and (_place(known) is None or _place(known) != _place(made)):
            raise PruningError(f"the name {name!r} of a criterion is taken", got=repr(made), where=repr(known))
        _SCORES[name] = made, make
        return made

    return register


def make_score(criterion: Criterion) -> Score:
    """The score that a criterion names: a registered name, or a class or function `package.module:name`.

    Raises:
        PruningError: No criterion of that name.
    """
    name = criterion.score
    if name not in _SCORES and ":" not in name:
        expected = f"one of {', '.join(_SCORES)}, or package.module:function"
        raise PruningError("unknown criterion", expected=expected, got=name, hint=nearest(name, _SCORES))
    make = _SCORES[name][1] if name in _SCORES else _maker(import_function(name, PruningError), False)
    score = make(criterion)
    score.name = name
    return score


def _place(made: Any) -> tuple[str, str] | None:
    name = getattr(made, "__qualname__", None)
    return (made.__module__, name) if name else None


def _maker(made: Any, differentiable: bool) -> Maker:
    """How a class or a function becomes a score; PruningError if it is neither."""
    if isinstance(made, type) and issubclass(made, Score):
        return lambda criterion: made(**accepted(made, {"p": criterion.p, "seed": criterion.seed or 0}))
    if isinstance(made, type) or not callable(made):
        raise PruningError("not a criterion", expected="a subclass of gmn.Score, or a function", got=repr(made))
    function: Callable[..., Any] = made
    return lambda _: _Function(function, differentiable)


class _Function(Score):
    """A function of a user as a score."""

    def __init__(self, function: Callable[..., Any], differentiable: bool) -> None:
        self.function, self.differentiable = function, differentiable
        self.needs_gradients = bool(accepted(function, {"gradients": None}))

    def channels(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Tensor:
        return self.function(members, state, **({"gradients": gradients} if self.needs_gradients else {}))


@register_criterion("norm")
class Norm(Elementwise):
    """REDUCE_t sum |w|^p over weights and norm weights."""

    differentiable = True

    def __init__(self, p: float = 2.0) -> None:
        self.p = p

    def energy(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        if self.p == 2:
            return weight * weight
        if self.p >= 1:
            return weight.abs() ** self.p
        there = weight != 0  # at 0 the derivative is infinite, and times 0 not a number: here it is 0
        return torch.where(there, torch.where(there, weight, 1.0).abs() ** self.p, 0.0)


@register_criterion("bn-scale")
class NormScale(Elementwise):
    """REDUCE_t |gamma| over the norms of a channel, of any kind; groups without a norm stay whole."""

    reads = "norms"
    differentiable = True

    def energy(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return weight.abs()


@register_criterion("taylor")
class Taylor(Elementwise):
    """REDUCE_t sum |w dL/dw|: to first order, what the loss changes by when a weight is zero.

    While channels go their slices are zero; the gradients stay those of the whole network.
    """

    needs_gradients = True

    def energy(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()


@register_criterion("fpgm")
class GeometricMedian(Fixed):
    """REDUCE_t of the summed distances to the layer's other slices: what the others nearly say is near their median.

    Distances are those of the whole network: a removed filter still says what its neighbours say.
    """

    reads = "weights"

    def channels(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Tensor:
        free = members.coupled.prunable
        return members.reduce(
            _distances(member.rows(state[member.param]))
            if bool(free[member.channel].any())
            else torch.zeros(len(member.channel))  # such as the 30,000 words that an embedding reads
            for member in members
        )


def _distances(rows: Tensor) -> Tensor:
    """[rows]: the sum of the Euclidean distances of each row to the others."""
    rows = rows.cpu().double()  # differences of near rows cancel in single precision
    return torch.cdist(rows, rows).sum(1).float()


@register_criterion("random")
class Random(Fixed):
    """Uniform in [0, 1), one draw per channel, from a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def channels(self, members: Members, state: Tensors, gradients: Tensors | None = None) -> Tensor:
        return torch.rand(members.coupled.num_channels, generator=torch.Generator().manual_seed(self.seed))
