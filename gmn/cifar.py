"""Small-image networks: the CIFAR ResNets of He et al. 2016 and VGG with batch norm.

Module names follow the published checkpoints, so that plain state dicts load without renaming.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gmn.errors import NetworkError

VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions per stage, by depth (the depth counts the three linear layers of the ImageNet original)."""

VGG_PLANES = (1, 2, 4, 8, 8)
"""Channels of every stage, in units of the first one's."""


def conv3x3(in_planes: int, planes: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image size at stride 1."""
    return nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=bias)


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and zero channels on both sides; no parameters.

    Shapes: `[b, in_planes, H, W]` -> `[b, planes, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # planes // 4 on each side where a stage doubles its channels
        self.before = (planes - in_planes) // 2
        self.after = planes - in_planes - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: str, in_planes: int, planes: int, stride: int) -> nn.Module:
    if stride == 1 and in_planes == planes:
        return nn.Identity()
    if kind == "A":
        return ZeroPadShortcut(in_planes, planes, stride)
    convolution = nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`."""

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(shortcut, in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2 (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2).

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110, ...
        shortcut: "A" (subsample and zero-pad, no parameters) or "B" (1x1 convolution and batch norm).
        width: channels of the first stage; the next two have 2 and 4 times as many.

    Shapes: `[b, in_channels, H, W]` -> `[b, num_classes]`, any H and W. Raises NetworkError.

    >>> sum(p.numel() for p in CifarResNet(20, num_classes=10).parameters())
    269722
    """

    def __init__(
        self, depth: int, *, num_classes: int, in_channels: int = 3, shortcut: str = "A", width: int = 16
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise NetworkError("no CIFAR ResNet of this depth", expected="6n + 2: 8, 14, 20, ...", got=str(depth))
        if shortcut not in ("A", "B"):
            raise NetworkError("unknown shortcut", expected="'A' or 'B'", got=repr(shortcut))
        if width < 1:
            raise NetworkError("a ResNet needs channels", expected="width of at least 1", got=str(width))
        blocks = depth // 6
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1, shortcut)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.linear = nn.Linear(4 * width, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(blocks: int, in_planes: int, planes: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1, shortcut) for _ in range(blocks - 1)))


class CifarVGG(nn.Module):
    """VGG with batch norm and one linear layer: five stages, max pools between them, global average pool.

    Args:
        depth: 11, 13, 16 or 19; VGG-19 has 16 convolutions and one linear layer here.
        bias: give the convolutions a bias too (batch norm makes it redundant).
        width: channels of the first stage; the next four have 2, 4, 8 and 8 times as many.

    Shapes: `[b, in_channels, H, W]` with H, W >= 16 -> `[b, num_classes]`. Raises NetworkError.

    >>> sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in CifarVGG(19, num_classes=100).modules())
    17
    """

    def __init__(
        self, depth: int, *, num_classes: int, in_channels: int = 3, bias: bool = False, width: int = 64
    ) -> None:
        super().__init__()
        if depth not in VGG_STAGES:
            raise NetworkError("no VGG of this depth", expected=f"one of {list(VGG_STAGES)}", got=str(depth))
        if width < 1:
            raise NetworkError("a VGG needs channels", expected="width of at least 1", got=str(width))
        layers: list[nn.Module] = []
        planes, widths = in_channels, [width * times for times in VGG_PLANES]
        for stage, (count, stage_planes) in enumerate(zip(VGG_STAGES[depth], widths, strict=True)):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(count):
                layers += [conv3x3(planes, stage_planes, bias=bias), nn.BatchNorm2d(stage_planes), nn.ReLU()]
                planes = stage_planes
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(planes, num_classes)
        _initialise(self)
        # a hook and not a line of `forward`: graph tracers cannot follow a branch on the shape
        self.register_forward_pre_hook(_refuse_small_images)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def _refuse_small_images(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    smallest = 2 ** (len(VGG_PLANES) - 1)
    height, width = inputs[0].shape[-2:]
    if min(height, width) < smallest:
        raise NetworkError(
            "the max pools shrink these images below 1x1",
            expected=f"at least {smallest}x{smallest} pixels",
            got=f"{height}x{width}",
            where=type(module).__name__,
            hint="load the data with a larger `size`, or take a CIFAR ResNet",
        )


def _initialise(model: nn.Module) -> None:
    # He et al. 2015: keeps the variance of the signal through ReLU layers
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
