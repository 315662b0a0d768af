"""What a training may be asked for beyond the plain loop: mixed images, distillation, averaged weights, speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gmn.errors import TrainingError
from gmn.settings_fit import Fit
from gmn.trace import evaluation

Batch = tuple[Tensor, Tensor]


def mixed(batches: Iterable[Batch], config: Fit, classes: int, key: tuple[int, int]) -> Iterator[Batch]:
    """Batches with their images mixed in pairs: image i with image b - 1 - i (Zhang et al. 2018, Yun et al. 2019).

    Args:
        batches: Images `[b, C, H, W]`, which are overwritten, and labels `[b]`.
        config: Alphas of mixup and cutmix; with both, every batch takes one of them, half of the time each.
        classes: Width K of the targets.
        key: (seed, epoch): with the number of the batch it decides everything random.

    Yields:
        Images and targets `[b, K]`, the shares of each class.

    Raises:
        TrainingError: if a batch has an odd number of images.
    """
    from timm.data.mixup import Mixup  # timm takes seconds to import

    mixup = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=classes)
    for number, (images, labels) in enumerate(batches):
        if len(labels) % 2:
            hint = "give an even batch_size that is at most the number of images"
            raise TrainingError(
                "mixup and cutmix pair images", expected="an even batch", got=str(len(labels)), hint=hint
            )
        with _numpy_seed(*key, number):
            yield mixup(images, labels)


@contextmanager
def _numpy_seed(*key: int) -> Iterator[None]:
    """timm draws from numpy's global generator; it is given back as it was."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(key).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(before)


def cross_entropy(logits: Tensor, targets: Tensor, config: Fit) -> Tensor:
    """Mean cross-entropy with classes `[b]` or shares of classes `[b, K]`; the network may know more classes than K."""
    if targets.dim() == 2:
        targets = F.pad(targets, (0, logits.shape[1] - targets.shape[1]))
    return F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)


def answer(teacher: nn.Module, images: Tensor, bf16: bool) -> Tensor:
    """[b, K]: what a teacher says of images, in eval mode and as a constant."""
    with evaluation(teacher), torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return teacher(images)


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), summed over the images (Hinton et al. 2015).

    The factor keeps the gradient's size whatever the temperature T is.

    Args:
        logits, teacher: [b, K].
        temperature: T.

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), 2.0).item()
    0.0
    """
    own, other = (F.log_softmax(values.float() / temperature, dim=1) for values in (logits, teacher))
    return temperature**2 * F.kl_div(own, other, reduction="sum", log_target=True)


def distilled(loss: Tensor, logits: Tensor, teacher: Tensor, weight: float, temperature: float, images: int) -> Tensor:
    """(1 - weight) * loss + weight * divergence / images."""
    return (1 - weight) * loss + weight * divergence(logits, teacher, temperature) / images


@contextmanager
def averaged(model: nn.Module, optimizer: Optimizer, decay: float) -> Iterator[nn.Module | None]:
    """After the block, the network has the exponential moving average of its weights; decay 0: do nothing.

    Inside the block it is the average that is yielded.

    A_1 = W_1 and A_t = decay A_(t-1) + (1 - decay) W_t, where W_t are the weights after step t. The running means and
    variances of batch norms are averaged alike: those of the last step belong to the last step's weights. Counters
    keep their last value.
    """
    if not decay:
        yield None
        return
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    handle = optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    try:
        yield average
    finally:
        handle.remove()
    with torch.no_grad():
        for of in (nn.Module.parameters, nn.Module.buffers):
            for own, mean in zip(of(model), of(average.module), strict=True):
                if own.is_floating_point():
                    own.copy_(mean)


@contextmanager
def arranged(model: nn.Module, config: Fit) -> Iterator[Callable[[Tensor], Tensor]]:
    """The network as the training calls it: channels last or compiled if asked for; ordinary after the block."""
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        torch.compiler.reset()  # it keeps 8 versions of a forward over all networks, and then compiles no more
    forward = torch.compile(model) if config.compile else model
    try:
        yield lambda images: forward(_channels_last(images) if config.channels_last else images)
    finally:
        if config.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
