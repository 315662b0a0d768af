"""Gradients of the loss with respect to a trained network's parameters, for criteria that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gmn.data import Split
from gmn.guard import Pieces
from gmn.scores import make_score
from gmn.settings import Criterion
from gmn.trace import evaluation
from gmn.training import generator


def loss_gradients(
    model: nn.Module, split: Split, images: int = 1000, *, seed: int = 0, batch_size: int = 128
) -> dict[str, Tensor]:
    """dL/dw of the mean cross-entropy over some images, by parameter, in eval mode; frozen parameters too.

    Args:
        model: The network; it is not changed.
        split: Images with labels.
        images: How many, drawn at random: files are often sorted by class.
        seed: Of the draw.
        batch_size: Images at a time.
    """
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    total = [torch.zeros_like(leaf) for leaf in leaves.values()]
    count, pieces = min(images, len(split)), Pieces("gradients of the loss", batch_size)

    def gradients(inputs: Tensor, labels: Tensor) -> Sequence[Tensor]:
        loss = F.cross_entropy(functional_call(model, leaves, (inputs,)), labels, reduction="sum") / count
        return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    with evaluation(model):
        for batch in split.batches(batch_size, generator=generator(seed, 0), limit=count):
            for own, more in zip(total, pieces.total(gradients, batch), strict=True):
                own.add_(more)
    return dict(zip(leaves, total, strict=True))


def gradients_for(criterion: Criterion, model: nn.Module, split: Split, *, seed: int = 0) -> dict[str, Tensor] | None:
    """The gradients that a criterion asks for, on its number of training images; None if it asks for none."""
    needed = make_score(criterion).needs_gradients
    return loss_gradients(model, split, criterion.images, seed=seed) if needed else None
