"""What a network is run on when nobody says: random numbers of the size that it was made for."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmn.errors import CheckpointError, NetworkError

SIZES: dict[str, tuple[int, ...]] = {
    "gmn.cifar": (3, 32, 32),
    "torchvision.models.video": (3, 16, 224, 224),
    "torchvision.models.optical_flow": (3, 128, 128),
    "torchvision.models.inception": (3, 299, 299),
    "torchvision.models": (3, 224, 224),
}
"""Input sizes by the module that a network comes from; the first prefix that fits counts."""
LARGEST = 2**28  # numbers in an example: a gigabyte


def example_inputs(model: nn.Module, size: Sequence[int] | None = None) -> Any:
    """An input for a network, always the same: one sample, or a tuple of them where the network takes several.

    Args:
        model: The network.
        size: Size of a sample, without the batch; None takes the size that the network was made for.

    Raises:
        NetworkError: if that size is not known.
    """
    module = type(model).__module__
    sample = _sample(tuple(size) if size is not None else default_size(model))
    return (sample, sample) if module.startswith("torchvision.models.optical_flow") else sample


def default_size(model: nn.Module) -> tuple[int, ...]:
    """The input size that a network was made for; NetworkError if it is not known.

    >>> from gmn.networks import build_network
    >>> default_size(build_network("cifar.resnet8", num_classes=10))
    (3, 32, 32)
    """
    config = getattr(model, "default_cfg", None)  # of timm's networks
    if isinstance(config, dict) and "input_size" in config:
        return tuple(config["input_size"])
    for module, size in SIZES.items():
        if f"{type(model).__module__}.".startswith(f"{module}."):
            return size
    raise NetworkError("the network's input size is not known", got=type(model).__name__, hint="--input 3,224,224")


def parse_size(text: str) -> tuple[int, ...]:
    """A size as people write it; NetworkError if it is none.

    >>> parse_size("3,224,224")
    (3, 224, 224)
    """
    parts = text.split(",")
    size = tuple(int(part) for part in parts if part.strip().isdecimal() and int(part) > 0)
    if len(size) != len(parts) or torch.Size(size).numel() > LARGEST:
        raise NetworkError("bad input size", expected="numbers such as 3,224,224", got=repr(text), where="--input")
    return size


def stated_size(content: Any, where: str) -> tuple[int, ...] | None:
    """The size of an input that a `model.json` states, None if it states none; CheckpointError if it is malformed.

    >>> stated_size({"input_shape": [3, 32, 32]}, "model.json")
    (3, 32, 32)
    """
    size = content.get("input_shape") if isinstance(content, dict) else None
    if size is None:
        return None
    sound = isinstance(size, list) and len(size) <= 8 and all(type(n) is int and n > 0 for n in size)
    if not sound or math.prod(size) > LARGEST:
        raise CheckpointError(
            "malformed input_shape", expected="such as [3, 224, 224]", got=reprlib.repr(size), where=where
        )
    return tuple(size)


def _sample(size: tuple[int, ...]) -> Tensor:
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
