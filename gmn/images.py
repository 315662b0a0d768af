"""Encoded images: decoded one by one or in batches, by threads that run ahead of the reader."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gmn.errors import DataError

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that decode; Pillow releases the interpreter lock while it does."""

GREY_MODES = {"1", "L"}
COLOUR_MODES = {"RGB", "RGBA", "P", "CMYK", "YCbCr", "LA", "PA", "HSV", "LAB", "RGBX"}

Item = bytes | Path | Tensor
"""One encoded image: the bytes of a file, a file, or uint8 pixels `[C, H, W]`."""


def decode(item: Item, size: int | None, grey: bool) -> Tensor:
    """The pixels of an item, uint8 `[1 or 3, H, W]`; raises DataError.

    Args:
        size: resize the shorter side to this many pixels and cut out the centre; None keeps the size.
        grey: one channel instead of three.
    """
    with open_image(item) as image:
        if grey and image.mode not in GREY_MODES:
            raise DataError("a colour image among grey ones", got=f"mode {image.mode}", where=_where(item))
        image = image.convert("L" if grey else "RGB")
        pixels = np.array(_centre(image, size) if size else image)
    return torch.from_numpy(pixels[None] if grey else pixels.transpose(2, 0, 1))


def _centre(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def open_image(item: Item) -> Image.Image:
    """The image of an item, pixels loaded; raises DataError when it cannot be read."""
    if isinstance(item, Tensor):
        if len(item) not in (1, 3):
            raise DataError("cannot resize the image", expected="1 or 3 channels", got=str(len(item)))
        return Image.fromarray(item[0].numpy() if len(item) == 1 else item.permute(1, 2, 0).numpy())
    where = _where(item)
    try:
        image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise DataError("unreadable image", got=f"{problem}", where=where) from problem
    if image.mode not in GREY_MODES | COLOUR_MODES:  # converting these would clip their values silently
        raise DataError("unreadable image", expected="8 bits per channel", got=f"mode {image.mode}", where=where)
    return image


def _where(item: Item) -> str:
    return str(item) if isinstance(item, Path) else "the encoded bytes of an image"


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Encoded images, decoded when a tensor of positions indexes them: uint8 `[b, C, H, W]`.

    Args: see `decode`.
    """

    items: Sequence[Item]
    size: int | None = None
    grey: bool = False

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """`(n, C, H, W)`, from the first image."""
        return len(self), *self._decode(0).shape

    def __getitem__(self, index: Tensor) -> Tensor:
        return next(self.stream([index]))

    def subset(self, index: Tensor) -> LazyImages:
        return replace(self, items=[self.items[i] for i in index.tolist()])

    def stream(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each index tensor; while one batch is used, the next is decoded."""
        pool = ThreadPoolExecutor(WORKERS)
        try:
            submitted = ([pool.submit(self._decode, i) for i in index.tolist()] for index in indices)
            waiting = list(islice(submitted, 2))
            while waiting:
                images = [future.result() for future in waiting.pop(0)]
                waiting += islice(submitted, 1)
                yield self._stack(images)
        finally:
            pool.shutdown(cancel_futures=True)

    def decode_all(self) -> Tensor:
        """All images in one tensor."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        parts = torch.arange(len(self)).split(256)
        batches = self.stream(parts)
        if images[0].numel() < 2**14:  # threads cost more than they gain on thumbnails
            batches = (self._stack([self._decode(i) for i in part.tolist()]) for part in parts)
        for part, batch in zip(parts, batches, strict=True):
            images[part] = batch
        return images

    def _decode(self, i: int) -> Tensor:
        return decode(self.items[i], self.size, self.grey)

    def _stack(self, images: list[Tensor]) -> Tensor:
        first = self.shape[1:]
        if other := next((image.shape for image in images if image.shape != first), None):
            hint = "give `size` to resize and crop them"
            raise DataError("images of different sizes", expected=f"{[*first]}", got=f"{[*other]}", hint=hint)
        return torch.stack(images) if images else torch.empty((0, *first), dtype=torch.uint8)


def is_grey(images: Tensor | Sequence[Item]) -> bool:
    """Whether the images have one channel; of encoded ones, 64 are looked at, evenly spaced."""
    if isinstance(images, Tensor):
        return images.ndim == 4 and images.shape[1] == 1
    count = min(64, len(images))
    return all(open_image(images[i * len(images) // count]).mode in GREY_MODES for i in range(count))
