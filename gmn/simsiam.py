"""Self-supervised pre-training: two random views of an image must look alike (SimSiam; Chen and He, 2021).

    L = - 1/2 cos(p1, z2) - 1/2 cos(p2, z1)        p = predictor(z), z = projector(what the head reads); z is constant

The constant z is what keeps all images from becoming one point. Projector and predictor are thrown away afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmn.bookmark import Bookmark
from gmn.convert import to_graph
from gmn.data import Augment, Split
from gmn.errors import DataError, NetworkError
from gmn.guard import Pieces
from gmn.settings import Fit
from gmn.settings_vote import SimSiam
from gmn.tasks import head_of
from gmn.training import Metrics, generator, make_optimizer, make_schedule, run_epochs

ASPECT = 4 / 3  # most that a crop is wider or higher than the image
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision


def pretrain(
    model: nn.Module,
    split: Split,
    config: SimSiam,
    example_inputs: Any,
    *,
    seed: int = 0,
    title: str = "SimSiam",
    log: Callable[[Metrics], None] | None = None,
    bookmark: Bookmark | None = None,
) -> None:
    """Train all of a network but its head, in place and without labels; it is left in eval mode.

    Args:
        model: Its last linear layer is the head, which stays as it is; on the split's device.
        split: The images; the labels are not read.
        config: Numbers of the training and of the views.
        example_inputs: For the graph that names the head.
        seed: Of the views, the order of the images, and the first projector and predictor.
        title: In progress and errors.
        log: Gets the mean `loss` and `spread` of each epoch.
        bookmark: Where the training is kept while it is under way, and goes on from.

    Raises:
        DataError: if there is but one image, which a batch norm cannot learn from.
        NetworkError: if the output does not come from one linear layer that reads a vector per image.
        TrainingError: if loss or gradient is NaN or infinite several times in a row.

    Source: SimSiam, algorithm 1 and section 4; the predictor's learning rate falls like all others.
    """
    if len(split) < 2:
        raise DataError("too few images to pre-train on", expected="at least 2", got=str(len(split)))
    size = min(config.batch_size, len(split))
    steps = len(split) // size
    views = cast(Augment, TwoViews(config))  # one in shape only: twice as many images come out

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        return split.batches(size, generator=generator(seed, epoch), augment=views, drop_last=True)

    twins = _Twins(model, _head(model, example_inputs), config, seed, Pieces(title, size, least=2)).train()
    # the head is not left out: nothing that it puts out is used, and no optimizer moves what has no gradient
    numbers = config.model_dump(include={"epochs", "lr", "momentum", "weight_decay"})
    sgd = Fit(**numbers, schedule="cosine")
    optimizer = make_optimizer(twins, sgd)
    schedule = make_schedule(optimizer, sgd, steps)
    try:
        own = {"model": twins, "bookmark": bookmark, "seed": seed, "title": title, "log": log, "pieces": twins.pieces}
        run_epochs(config.epochs, steps, batches, twins.step, optimizer, schedule, **own)
    finally:
        twins.hook.remove()
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def siamese_loss(p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor) -> Tensor:
    """Minus the mean cosine between each view's prediction and the other view's projection, which is constant.

        L = - 1/2 cos(p1, z2) - 1/2 cos(p2, z1), a mean over the images; -1 is the least

    Args:
        p1, z1, p2, z2: [b, D] predictions and projections of both views.

    Source: SimSiam, eqs. 1 to 4.
    """
    similar = F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()
    return -0.5 * similar


def spread(z: Tensor) -> float:
    """How far projections are from being one point: 0 when they are, near 1 when they are spread evenly.

        sqrt(D) * mean over d of std over b of z[b, d] / |z[b]|

    Args:
        z: [b, D] projections.

    Source: SimSiam, section 4.1, where sqrt(D) is not multiplied in.

    >>> spread(torch.ones(4, 3)), round(spread(torch.tensor([[5.0, 5.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])), 4)
    (0.0, 1.0)
    """
    return math.sqrt(z.shape[1]) * float(F.normalize(z).std(0, correction=0).mean())


@dataclass(frozen=True)
class TwoViews:
    """Two random views of each image: a crop that is scaled back, mirrored, lit anew, and sometimes grey.

    A crop of area share s has an aspect between max(s, 3/4) and min(1/s, 4/3) of the image's, so that it always fits,
    and s = 1 is the whole image. `min_scale` 1, no `flip`, and `jitter` and `grey` of 0 give back the images.

    Args:
        config: Its part about views.

    Source: SimSiam, section 3 (baseline settings), without the jitter of saturation and hue, and without blur.
    """

    config: SimSiam

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Two views of uint8 images `[b, C, H, W]` -> uint8 `[2b, C, H, W]`, the first views of all images first.

        Args:
            images: On any device.
            generator: On the CPU; what it draws depends on b alone.
        """
        draws = torch.rand(8, 2 * len(images), generator=generator).to(images.device)
        views = _recoloured(self._cropped(images.repeat(2, 1, 1, 1).float(), draws[:5]), draws[5:], self.config)
        return views.round().clamp(0, 255).to(torch.uint8)

    def _cropped(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images `[b, C, H, W]` -> the same shape: a rectangle of each, scaled to the size of the whole."""
        share = self.config.min_scale + (1 - self.config.min_scale) * draws[0]
        widest = (-share.log()).clamp(max=math.log(ASPECT))
        aspect = (widest * (2 * draws[1] - 1)).exp()
        width, height = (share * aspect).sqrt(), (share / aspect).sqrt()
        x, y = (1 - width) * (2 * draws[2] - 1), (1 - height) * (2 * draws[3] - 1)
        mirror = torch.where(draws[4] < 0.5, -1.0, 1.0) if self.config.flip else torch.ones_like(x)
        zero = torch.zeros_like(x)
        theta = torch.stack([width * mirror, zero, x, zero, height, y], 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recoloured(images: Tensor, draws: Tensor, config: SimSiam) -> Tensor:
    """Images `[b, C, H, W]` -> the same shape: other brightness and contrast, some without colour."""
    brightness, contrast = (1 + config.jitter * (2 * draws[:2] - 1))[:, :, None, None, None]
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + contrast * (images - mean)
    if images.shape[1] != len(LUMA):
        return images
    grey = (images * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    return torch.where((draws[2] < config.grey)[:, None, None, None], grey, images)


class _Twins(nn.Module):
    """The network, and a projector and a predictor on what its head reads; `hook` must be removed in the end."""

    def __init__(self, model: nn.Module, head: nn.Linear, config: SimSiam, seed: int, pieces: Pieces) -> None:
        super().__init__()
        self.pieces = pieces
        self.model, self.width, self.bf16 = model, head.in_features, config.bf16
        self.seen: list[Tensor] = []
        # not by putting an identity in the head's place: what comes after the head would still be computed
        self.hook = head.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))
        d = config.projection
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(d, d, bias=False), nn.BatchNorm1d(d, affine=False)
            projector = nn.Sequential(*_hidden(self.width, d), *_hidden(d, d), *last)
            predictor = nn.Sequential(*_hidden(d, config.bottleneck), nn.Linear(config.bottleneck, d))
        self.projector, self.predictor = projector.to(head.weight), predictor.to(head.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[b, C, H, W]` -> predictions and projections, `[b, D]` each."""
        self.seen.clear()
        self.model(images)
        shapes = [list(x.shape) for x in self.seen]
        if shapes != [[len(images), self.width]]:
            expected = f"one vector per image, {[len(images), self.width]}"
            raise NetworkError("what the head reads does not stand for an image", expected=expected, got=str(shapes))
        z = self.projector(self.seen[0])
        return self.predictor(z), z

    def step(self, batch: tuple[Tensor, Tensor]) -> Metrics:
        """The gradients of one batch: views `[2b, C, H, W]`, and labels that are not read."""
        first, second = batch[0].chunk(2)
        metrics = {"loss": 0.0, "spread": 0.0}
        for one, other in self.pieces.cut((first, second)):
            # one after the other, as in the paper: each view is normalised by its own batch
            with torch.autocast(first.device.type, torch.bfloat16, enabled=self.bf16):
                (p1, z1), (p2, z2) = self(one), self(other)
            share = len(one) / len(first)
            loss = share * siamese_loss(p1.float(), z1.float(), p2.float(), z2.float())
            loss.backward()
            metrics["loss"] += loss.item()
            metrics["spread"] += share * spread(z1.detach().float())
        return metrics | self.pieces.metrics


def _hidden(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()


def _head(model: nn.Module, example_inputs: Any) -> nn.Linear:
    name = head_of(to_graph(model, example_inputs).spec)
    head = dict(model.named_modules()).get(name)
    if not isinstance(head, nn.Linear):
        raise NetworkError("no head to leave out", expected="a linear layer", got=type(head).__name__, where=name)
    return head
