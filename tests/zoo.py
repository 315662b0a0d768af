"""Networks for the tests of the core, with weights and norm statistics that are nowhere trivial."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

from gmn.cifar import CifarResNet, CifarVGG
from gmn.convert import to_graph
from gmn.graph import NetworkGraph
from gmn.ranking import prune_to
from gmn.settings import Prune

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20A": (partial(CifarResNet, 20, num_classes=10), (1, 3, 32, 32)),
    "resnet20B": (partial(CifarResNet, 20, num_classes=10, shortcut="B"), (1, 3, 32, 32)),
    "resnet56A": (partial(CifarResNet, 56, num_classes=10), (1, 3, 32, 32)),
    "resnet56B": (partial(CifarResNet, 56, num_classes=10, shortcut="B"), (1, 3, 32, 32)),
    "vgg19_bn": (partial(CifarVGG, 19, num_classes=100), (1, 3, 32, 32)),
    "resnet18": (partial(tv.resnet18, num_classes=10), (1, 3, 64, 64)),
    "resnet50": (partial(tv.resnet50, num_classes=1000), (1, 3, 64, 64)),
    "mobilenet_v2": (partial(tv.mobilenet_v2, num_classes=10), (1, 3, 64, 64)),
    "densenet121": (partial(tv.densenet121, num_classes=10), (1, 3, 64, 64)),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm its own weights and statistics, none of them 0 or 1; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.2)) if module.affine else ():
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
            if not module.track_running_stats:
                continue
            module.running_mean = 0.1 * torch.randn(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.data.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
    return model.eval()


@cache
def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network of the table above and an input for it; made once, so copy it before changing it."""
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    return randomise(build(), seed), torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def pruned(name: str, speed_up: float = 1.5) -> tuple[nn.Module, Tensor]:
    """The same network with fewer channels."""
    model, x = network(name)
    smaller = prune_to(model, to_graph(model, x), x, Prune(speed_up=speed_up, steps=20)).model
    return smaller, x


class Residual(nn.Module):
    """Two convolutions around a functional residual; nothing in place."""

    def __init__(self, width: int = 6, groups: int = 1, in_place: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=self.in_place))
        if self.in_place:
            y += x
            return F.relu_(y)
        return F.relu(torch.add(y, x))


def small(*middle: nn.Module, width: int = 6) -> nn.Module:
    """A convolution, `middle`, and a classifier after global pooling."""
    ends = nn.Conv2d(3, width, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
    return randomise(nn.Sequential(ends[0], *middle, *ends[1:]))


class FlatVGG(nn.Module):
    """Two convolutions, then a linear layer that reads 2x2 positions of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc1 = nn.Linear(12 * 4, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def depthwise() -> nn.Module:
    """An inverted residual of a mobile network, small."""
    return small(
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        *(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
        *(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)),
    )


@cache
def graph_of(name: str, layout: str = "generic") -> NetworkGraph:
    """The graph of a network of the table."""
    model, x = network(name)
    return to_graph(model, x, layout=layout)
