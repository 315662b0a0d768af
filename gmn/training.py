"""The only training loop, and the only evaluation.

`run_epochs` is the loop: data models, fine-tuning and the metanetwork all train in it and differ in their `step`.
Everything random in an epoch follows from (seed, epoch), so a resumed run sees the same batches.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from gmn.data import Augment, Split
from gmn.distributed import team
from gmn.errors import TrainingError
from gmn.fit_options import Batch, answer, arranged, averaged, cross_entropy, distilled, mixed
from gmn.progress import track
from gmn.replicas import averaged_over_processes, replicated
from gmn.settings import Fit
from gmn.weight_masks import WeightMask

Item = TypeVar("Item")
Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Share of right answers, and mean cross-entropy."""

    accuracy: float
    loss: float


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 500, limit: int | None = None) -> Evaluation:
    """Accuracy and loss of a network on a split, in eval mode; its modes are restored."""
    training = model.training
    model.eval()
    right, loss, count = 0, 0.0, 0
    with torch.no_grad():
        for images, labels in split.sample(limit).batches(batch_size, parts=team().parts([batch_size])):
            if not len(labels):
                continue  # all images of the last batch are other processes'
            logits = model(images)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    model.train(training)
    loss, right, count = team().total(loss, right, count)
    return Evaluation(right / count, loss / count)


def recalibrate(model: nn.Module, split: Split, images: int, *, seed: int = 0) -> None:
    """Compute the running statistics of all batch norms anew from some training images, in place; 0: do nothing."""
    if not images:
        return
    size = min(250, images, len(split))  # whole batches only: one image has no variance
    batches = split.batches(size, generator=generator(seed, 0), limit=images, drop_last=True)
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
) -> None:
    """Train a network in place with cross-entropy; it is left in eval mode.

    Args:
        model: The network.
        split: The training images.
        config: The training's numbers.
        seed, augment: Of the batches.
        title, log: In progress and errors; gets the mean metrics of each epoch.
        teacher: The network to distil from where `config.distill` asks for it, such as the unpruned one.
        regularize: Called between backward and step, to add to the gradients.
        mask: Weights that are zero, and stay so after every step.

    Raises:
        TrainingError: if the loss is NaN or infinite, or distillation lacks its teacher.
    """
    if config.distill and teacher is None:
        raise TrainingError(f"{title}: distillation needs a teacher", hint="set distill: 0 for this training")
    count = min(config.images_per_epoch or len(split), len(split))
    size = min(config.batch_size, count)
    steps = config.iterations or count // size
    classes = int(split.labels.max()) + 1 if config.mixes else 0

    def batches(epoch: int) -> Iterable[Batch]:
        taken = itertools.islice(passes(split, size, seed, augment=augment, start=epoch, limit=count), steps)
        return mixed(taken, config, classes, (seed, epoch)) if config.mixes else taken

    def step(batch: Batch) -> Metrics:
        metrics = averaged_over_processes(_gradient(forward, batch, config, teacher), model)
        if regularize:
            regularize()
        if mask:
            mask.silence(model)
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        return metrics

    model.train()
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps)
    held = mask.held(model, optimizer) if mask else nullcontext()
    with replicated(model, size), arranged(model, config) as forward, held, averaged(model, optimizer, config.ema):
        run_epochs(config.epochs, steps, batches, step, optimizer, schedule, seed=seed, title=title, log=log)
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def _gradient(forward: Callable[[Tensor], Tensor], batch: Batch, config: Fit, teacher: nn.Module | None) -> Metrics:
    """Leave the gradient of a batch's loss in the network's parameters; targets are classes or shares of classes."""
    sums: dict[str, float] = defaultdict(float)
    for images, targets in zip(*(tensor.chunk(config.accumulate) for tensor in batch), strict=True):
        share = len(images) / len(batch[0])
        for key, value in _part_gradient(forward, (images, targets), share, config, teacher).items():
            sums[key] += share * value
    return sums


def _part_gradient(
    forward: Callable[[Tensor], Tensor], part: Batch, share: float, config: Fit, teacher: nn.Module | None
) -> Metrics:
    """Add a part's share of the gradient."""
    images, targets = part
    # autocast around the forward only: around a whole loop it would keep stale bf16 copies of the weights
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bf16):
        logits = forward(images)
    loss = cross_entropy(logits, targets, config)
    if config.distill and teacher is not None:
        said = answer(teacher, images, config.bf16)
        loss = distilled(loss, logits, said, config.distill, config.temperature, len(images))
    (loss if share == 1 else share * loss).backward()
    labels = targets if targets.dim() == 1 else targets.argmax(1)
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return {"loss": loss.item(), "accuracy": accuracy.item()}


def run_epochs(
    epochs: int,
    steps: int,
    batches: Callable[[int], Iterable[Item]],
    step: Callable[[Item], Metrics],
    optimizer: Optimizer,
    schedule: LambdaLR,
    *,
    seed: int,
    title: str,
    start: int = 0,
    log: Callable[[Metrics], None] | None = None,
    after_epoch: Callable[[int], bool | None] | None = None,
) -> None:
    """The loop: `step` leaves gradients, the optimizer takes them; `after_epoch` may save, and says True to stop.

    Args:
        epochs, steps: Number of epochs, and of steps in each.
        batches: What an epoch consists of.
        step: Computes the gradients of one step and returns its metrics.
        start: First epoch, when a run is resumed.
        log: Gets the mean metrics of each epoch.

    Raises:
        TrainingError: if the loss is NaN or infinite.
    """
    with track(title, (epochs - start) * steps) as advance, torch.random.fork_rng(devices=[]):
        for epoch in range(start, epochs):
            torch.manual_seed(seed * 100_003 + epoch + 7919 * team().rank)  # dropout and the like
            sums: dict[str, float] = defaultdict(float)
            for item in batches(epoch):
                optimizer.zero_grad(set_to_none=True)
                metrics = step(item)
                _refuse_non_finite(metrics, title, epoch)
                optimizer.step()
                schedule.step()
                for key, value in metrics.items():
                    sums[key] += value / steps
                advance(", ".join(f"{key} {value:.3g}" for key, value in metrics.items()))
            if log:
                log({"epoch": epoch + 1, **sums})
            if after_epoch and after_epoch(epoch):
                break


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


def _refuse_non_finite(metrics: Metrics, title: str, epoch: int) -> None:
    bad = [key for key, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{title}: {bad[0]} is not finite",
            got=str(metrics[bad[0]]),
            where=f"epoch {epoch + 1}",
            hint="lower the learning rate",
        )
