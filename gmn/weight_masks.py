"""Which single weights stay: the largest of all, or N of every M, and masks that hold what went at zero.

    unstructured   of all weights together, a share with the smallest scores goes
    N:M            of M consecutive inputs of a layer (one output, one kernel tap), the N with the largest scores stay

Scores are |w| in the GMN paper, section 6.2. Of equal scores the weight that comes first stays. Shapes do not change,
and FLOPs fall only where kernels skip zeros: what falls is the number of parameters that are not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gmn.errors import PruningError


@dataclass(frozen=True)
class WeightMask:
    """Which weights stay.

    Attributes:
        keep: Bool by parameter name, in the parameter's shape; True stays.
        dense: Layers that lose nothing, with the reason.
    """

    keep: Mapping[str, Tensor]
    dense: Mapping[str, str]

    @classmethod
    def of_zeros(cls, model: nn.Module) -> WeightMask:
        """The mask of a network that was pruned before, a saved one for instance: what is zero stays zero.

        Of parameters with two axes or more; one that is all zeros was made so, not pruned, and stays free.

        Raises:
            PruningError: if there is no such zero.
        """
        weights = {name: weight.detach() != 0 for name, weight in model.named_parameters() if weight.dim() > 1}
        keep = {name: kept for name, kept in weights.items() if kept.any() and not kept.all()}
        if not keep:
            raise PruningError("no weight is zero", hint="prune with pattern='unstructured' or '2:4' first")
        return cls(keep, {})

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set what goes to zero, in place."""
        for name, keep in self.keep.items():
            weight = model.get_parameter(name)
            weight.masked_fill_(~keep.to(weight.device), 0.0)

    def silence(self, model: nn.Module) -> None:
        """Set the gradients of what went to zero, in place: they must not count where gradients are clipped."""
        for name, keep in self.keep.items():
            if (gradient := model.get_parameter(name).grad) is not None:
                gradient.masked_fill_(~keep.to(gradient.device), 0.0)

    @contextmanager
    def held(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        """Inside the block what went is zero, also after every step of the optimizer.

        Raises:
            PruningError: if the mask is for another network.
        """
        shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        for name, keep in self.keep.items():
            if shapes.get(name) != keep.shape:
                expected, got = str(list(keep.shape)), str(list(shapes[name]) if name in shapes else None)
                raise PruningError("the mask is for another network", expected=expected, got=got, where=name)
        self.apply(model)
        handle = optimizer.register_step_post_hook(lambda *_: self.apply(model))
        try:
            yield
        finally:
            handle.remove()


def n_of_m(scores: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Bool of the scores' shape: the n largest of every m that are consecutive along an axis.

    Raises:
        PruningError: if the axis is no multiple of m.

    >>> n_of_m(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 2, 4).int()
    tensor([[1, 0, 1, 0]], dtype=torch.int32)
    """
    if scores.shape[axis] % m:
        raise PruningError(f"groups of {m} do not fit", expected=f"a multiple of {m}", got=str(scores.shape[axis]))
    groups = scores.movedim(axis, -1).unflatten(-1, (-1, m))
    largest = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, largest, True)
    return keep.flatten(-2).movedim(-1, axis)


def unstructured(
    scores: Mapping[str, Tensor], share: float, *, limits: Mapping[str, float] | None = None, local: bool = False
) -> dict[str, Tensor]:
    """Bool of each score's shape: without the share of all weights that has the smallest scores.

    Args:
        scores: By parameter name.
        share: Of all these weights together, to the nearest whole number of them.
        limits: By parameter name, the largest share of it that goes; one weight of each stays whatever they say.
        local: The same share of every parameter, as far as limits let it; otherwise one ranking of all.

    Raises:
        PruningError: if limits do not let that many go.

    >>> unstructured({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0, 3.0])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    total = sum(score.numel() for score in scores.values())
    count = round(share * total)
    orders = {name: _leaving(score)[: most(score, (limits or {}).get(name, 1.0))] for name, score in scores.items()}
    if (free := sum(map(len, orders.values()))) < count:
        expected, got = f"{share:.4g} of {total:,} weights", f"at most {free / max(total, 1):.4g}"
        raise PruningError("the sparsity is out of reach", expected=expected, got=f"{got} with prune.limits")
    names = list(orders)[::-1]  # of equal scores the first parameter's stay
    keys = [_shares(scores[n], orders[n]) if local else scores[n].flatten()[orders[n]] for n in names]
    owner = torch.cat([torch.full((len(orders[name]),), number) for number, name in enumerate(names)])
    lowest = torch.cat(keys).argsort(stable=True)[:count].cpu()
    gone = torch.bincount(owner[lowest], minlength=len(names)).tolist()
    return {name: _without(scores[name], orders[name][: gone[names.index(name)]]) for name in scores}


def most(score: Tensor, ratio: float) -> int:
    """How many weights of a parameter may go: that share, and never the last one."""
    return min(score.numel() - 1, int(ratio * score.numel() + 1e-9))


def _leaving(score: Tensor) -> Tensor:
    """[weights]: the order in which the weights of a parameter go; of equal ones the last goes first."""
    return score.numel() - 1 - score.flatten().flip(0).argsort(stable=True)


def _shares(score: Tensor, order: Tensor) -> Tensor:
    """[weights in that order]: the share of the parameter that is gone with each."""
    return torch.arange(1, len(order) + 1, device=score.device) / score.numel()


def _without(score: Tensor, gone: Tensor) -> Tensor:
    keep = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    keep[gone] = False
    return keep.view(score.shape)


def reasons(dense: Mapping[str, str]) -> str:
    """Why layers stay dense, in one line.

    >>> reasons({"a": "prune.keep '?'", "c1": "inputs: 3", "b": "prune.keep '?'"})
    "a, b (prune.keep '?'); c1 (inputs: 3)"
    """
    layers = {reason: [name for name in dense if dense[name] == reason] for reason in dense.values()}
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in layers.items())


def parameters_left(model: nn.Module, names: Iterable[str]) -> int:
    """The number of parameters of a network without the zeros in some of its weights.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    >>> parameters_left(layer, ["weight"])
    2
    """
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in names)
    return sum(parameter.numel() for parameter in model.parameters()) - zeros


class WeightSparsity:
    """The sparsity loss of single weights: a mean over layers w of n numbers each, weighted by n, of

        ||w||_1 / (n s)                     s: the root mean square of all weights, a constant for the gradient
        ||w||_1 / (sqrt(n) ||w||_2)         scale-invariant: 1 where all |w| are equal
        ||w off the mask||_1 / ||w||_1      scale-invariant, N:M: the share of the norm that the pattern takes

    The first is the plain l1 norm of the GMN paper, on a scale that does not depend on the network. It falls when a
    layer is scaled; the others do not, so that only differences within a layer count. Of N:M the second would fall when
    whole channels shrink, which takes nothing from the weights that lose against their neighbours; the third does not.

    Args:
        axes: By name of the parameters whose weights may go, the axis of their inputs.
        n_of_m: N and M of the pattern, if it is one.
    """

    def __init__(self, axes: Mapping[str, int], n_of_m: tuple[int, int] | None = None) -> None:
        self.axes, self.n_of_m = dict(axes), n_of_m

    def sparsity_loss(self, state: Mapping[str, Tensor], *, scale_invariant: bool = False) -> Tensor:
        """The loss, a scalar between 0 and 1 that is differentiable in the parameters.

        >>> weight = {"w": torch.tensor([[3.0, 0.0, 0.0, 1.0]])}
        >>> float(WeightSparsity({"w": 1}, (1, 4)).sparsity_loss(weight, scale_invariant=True))
        0.25
        """
        weights = {name: state[name] for name in self.axes}
        total = sum(weight.numel() for weight in weights.values())
        norms = torch.stack([torch.linalg.vector_norm(weight.detach()) for weight in weights.values()])
        scale = norms.norm() / total**0.5
        terms = []
        for name, weight in weights.items():
            size, norm = weight.abs(), scale * weight.numel()
            if scale_invariant:
                # the norm has a gradient at zero, where the square root of a sum of squares has none
                norm = size.sum() if self.n_of_m else torch.linalg.vector_norm(weight) * weight.numel() ** 0.5
            if scale_invariant and self.n_of_m:
                size = size * ~n_of_m(size.detach(), *self.n_of_m, self.axes[name])
            terms.append(weight.numel() * size.sum() / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        return torch.stack(terms).sum() / total
