"""Random images and what becomes of them: shared by the tests of data and of its sources."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gmn.data import Split


def pixels(n: int, channels: int = 3, height: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    shape = (n, channels, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encode(image: Tensor) -> bytes:
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def split(images: Tensor) -> Split:
    """Labels are positions, and normalisation leaves 0..1."""
    c = images.shape[1]
    return Split(images, torch.arange(len(images)), torch.zeros(c), torch.ones(c))


def all_of(part: Split, **options: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*part.batches(7, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def images_of(part: Split) -> set[bytes]:
    assert isinstance(part.images, Tensor)
    return {image.numpy().tobytes() for image in part.images}
