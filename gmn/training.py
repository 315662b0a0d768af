"""The only training loop, and the only evaluation.

`gmn.loop.run_epochs` is the loop: data models, fine-tuning and the metanetwork all train in it and differ in their
`step`. Everything random in an epoch follows from (seed, epoch), so a resumed run sees the same batches. Where an
accelerator's memory does not suffice, mini-batches are read in pieces, whose own statistics batch norms then learn
from: the only case in which results depend on memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from gmn.bookmark import Bookmark
from gmn.data import Augment, Split
from gmn.distributed import team
from gmn.errors import TrainingError
from gmn.fit_options import Batch, answer, arranged, averaged, cross_entropy, distilled, mixed
from gmn.guard import Metrics, Pieces
from gmn.loop import run_epochs
from gmn.replicas import averaged_over_processes, replicated
from gmn.settings import Fit
from gmn.trace import evaluation
from gmn.weight_masks import WeightMask


@dataclass(frozen=True)
class Evaluation:
    """Share of right answers, and mean cross-entropy."""

    accuracy: float
    loss: float


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 500, limit: int | None = None) -> Evaluation:
    """Accuracy and loss of a network on a split, in eval mode; its modes are restored."""
    right, loss, count = 0, 0.0, 0
    pieces = Pieces("evaluation", batch_size)
    with evaluation(model), torch.no_grad():
        for images, labels in split.sample(limit).batches(batch_size, parts=team().parts([batch_size])):
            if not len(labels):
                continue  # all images of the last batch are other processes'
            logits = pieces.read(model, (images, labels))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    loss, right, count = team().total(loss, right, count)
    return Evaluation(right / count, loss / count)


def recalibrate(model: nn.Module, split: Split, images: int, *, seed: int = 0, augment: Augment | None = None) -> None:
    """Compute the running statistics of all batch norms anew from some training images, in place; 0: do nothing.

    Args:
        augment: Random changes of the images, those of the training: a network that was trained with crops and mirror
            images loses points of accuracy by the statistics of whole ones.
    """
    if not images:
        return
    limit = min(images, len(split))
    size = limit // math.ceil(limit / 250)  # whole batches only: one image has no variance
    batches = split.batches(size, generator=generator(seed, 0), augment=augment, limit=limit, drop_last=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout before a norm
        update_bn((batch for batch, _ in batches), model)


def generator(seed: int, epoch: int) -> torch.Generator:
    """The random numbers of one epoch."""
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def passes(
    split: Split, size: int, seed: int, *, augment: Augment | None = None, start: int = 0, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches without end: pass after pass over a split, each shuffled by (seed, number of the pass).

    Of several processes each gets its own part of every batch.
    """
    common: dict[str, Any] = {"augment": augment, "limit": limit, "drop_last": True, "parts": team().parts([size])}
    for number in itertools.count(start):
        yield from split.batches(size, generator=generator(seed, number), **common)


def fit(
    model: nn.Module,
    split: Split,
    config: Fit,
    *,
    seed: int = 0,
    augment: Augment | None = None,
    title: str = "training",
    log: Callable[[Metrics], None] | None = None,
    teacher: nn.Module | None = None,
    regularize: Callable[[], None] | None = None,
    mask: WeightMask | None = None,
    bookmark: Bookmark | None = None,
) -> None:
    """Train a network in place with cross-entropy; it is left in eval mode.

    Args:
        model: The network.
        split: The training images.
        config: The training's numbers.
        seed, augment, title, log: Of the batches; in progress and errors; gets the mean metrics of each epoch.
        teacher: The network to distil from where `config.distill` asks for it, such as the unpruned one.
        regularize: Called between backward and step, to add to the gradients.
        mask: Weights that are zero, and stay so after every step.
        bookmark: Where a long training is kept while it is under way, and goes on from.

    Raises:
        TrainingError: if loss or gradient is NaN or infinite several times in a row, or distillation lacks its teacher.
    """
    if config.distill and teacher is None:
        raise TrainingError(f"{title}: distillation needs a teacher", hint="set distill: 0 for this training")
    count, size = epoch_and_batch(config, len(split))
    steps = config.iterations or count // size

    def batches(epoch: int) -> Iterable[Batch]:
        taken = itertools.islice(passes(split, size, seed, augment=augment, start=epoch, limit=count), steps)
        return mixed(taken, config, int(split.labels.max()) + 1, (seed, epoch)) if config.mixes else taken

    def step(batch: Batch) -> Metrics:
        metrics = averaged_over_processes(_gradient(forward, batch, config, teacher, pieces), model)
        if regularize:
            regularize()
        if mask:
            mask.silence(model)
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        return metrics

    model.train()
    pieces = Pieces(title, size, least=2, count=config.accumulate)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps)
    held = mask.held(model, optimizer) if mask else nullcontext()
    crew, tuned = replicated(model, size), averaged(model, optimizer, config.ema)
    with crew, arranged(model, config) as forward, held, tuned as average:  # of what is held
        own = {"model": model, "average": average, "bookmark": bookmark, "pieces": pieces}
        run_epochs(config.epochs, steps, batches, step, optimizer, schedule, **own, seed=seed, title=title, log=log)
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def epoch_and_batch(config: Fit, available: int) -> tuple[int, int]:
    """Images of an epoch, and of a batch, where there are so many.

    >>> epoch_and_batch(Fit(epochs=1, lr=0.1, batch_size=128, images_per_epoch=500), 90)
    (90, 90)
    """
    count = min(config.images_per_epoch or available, available)
    return count, min(config.batch_size, count)


def _gradient(
    forward: Callable[[Tensor], Tensor], batch: Batch, config: Fit, teacher: nn.Module | None, pieces: Pieces
) -> Metrics:
    """Leave the gradient of a batch's loss in the network's parameters, piece by piece."""
    metrics = {"loss": 0.0, "accuracy": 0.0}
    for part in pieces.cut(batch):
        share = len(part[1]) / len(batch[1])
        for key, value in _piece(forward, part, config, teacher, share).items():
            metrics[key] += share * value
    return metrics | pieces.metrics


def _piece(
    forward: Callable[[Tensor], Tensor], batch: Batch, config: Fit, teacher: nn.Module | None, share: float
) -> Metrics:
    """Add the gradient of a share of the loss; targets are classes or shares of classes."""
    images, targets = batch
    # autocast around the forward only: around a whole loop it would keep stale bf16 copies of the weights
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bf16):
        logits = forward(images)
    loss = cross_entropy(logits, targets, config)
    if config.distill and teacher is not None:
        said = answer(teacher, images, config.bf16)
        loss = distilled(loss, logits, said, config.distill, config.temperature, len(images))
    (share * loss).backward()
    labels = targets if targets.dim() == 1 else targets.argmax(1)
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return {"loss": loss.item(), "accuracy": accuracy.item()}


def make_optimizer(model: nn.Module, config: Any) -> Optimizer:
    """SGD with momentum or AdamW over all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if getattr(config, "optimizer", "adamw") == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def make_schedule(optimizer: Optimizer, config: Any, steps: int, *, done: int = 0) -> LambdaLR:
    """The learning rate per step: gamma at each milestone (epochs), or half a cosine; `done` steps lie behind.

    A warm-up of w steps multiplies it with 1/(w+1), 2/(w+1), ..., w/(w+1); the cosine begins after it.
    """
    cosine = getattr(config, "schedule", "multistep") == "cosine"
    total = config.epochs * steps
    warmup = max(0, min(round(getattr(config, "warmup", 0) * steps), total - 1))

    def factor(index: int) -> float:
        rise = min(1.0, (index + 1) / (warmup + 1))
        if cosine:
            share = max(0, index - warmup) / (total - warmup)
            return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return rise * float(config.gamma ** sum(index >= milestone * steps for milestone in config.milestones))

    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr
    return LambdaLR(optimizer, factor, last_epoch=done - 1)
