"""Data in three splits: train, validation (for every choice) and test (reported once).

>>> data = load_data("digits")
>>> data.num_classes, data.input_shape, len(data.test)
(10, (1, 8, 8), 360)
>>> images, labels = next(data.train.batches(32, generator=torch.Generator().manual_seed(0)))
>>> images.shape, labels.dtype
(torch.Size([32, 1, 8, 8]), torch.int64)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gmn.errors import DataError
from gmn.images import LazyImages, is_grey
from gmn.sources import Part, Request, Source, read_source

MEMORY = 2**30
"""Bytes up to which the decoded images of a split stay in memory; above, every batch is decoded anew."""

SAMPLE = 2000
"""Images from which mean and std are computed where the images do not fit in memory."""


@dataclass(frozen=True)
class Augment:
    """Random changes of training images.

    Args:
        crop: pad with this many zero pixels on every side, then cut the original size out at random.
        flip: mirror every other image, on average, left to right.
    """

    crop: int = 0
    flip: bool = False

    def __call__(
        self, images: Tensor, generator: torch.Generator, *, whole: int | None = None, part: slice = slice(None)
    ) -> Tensor:
        """Images `[b, C, H, W]` of any type -> the same shape; one gather for the batch, no loop.

        Args:
            whole, part: The images are this part of a batch of so many; all of its random numbers are drawn.
        """
        b, channels, height, width = images.shape
        n = b if whole is None else whole
        top, left = torch.randint(2 * self.crop + 1, (2, n, 1), generator=generator)[:, part]
        mirrored = torch.rand(n, 1, generator=generator) < 0.5 if self.flip else torch.zeros(n, 1, dtype=torch.bool)
        mirrored = mirrored[part]
        columns = torch.arange(width).expand(b, width)
        columns = left + torch.where(mirrored, columns.flip(1), columns)
        rows = top + torch.arange(height)
        rows, columns = rows.to(images.device), columns.to(images.device)
        padded = F.pad(images, [self.crop] * 4)
        image = torch.arange(b, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels, handed out in normalised batches.

    Args:
        images: uint8 `[n, C, H, W]`, or `LazyImages` where they do not fit in memory.
        labels: int64 `[n]`.
        mean, std: float `[C]`, in units where black is 0 and white is 1.

    Raises DataError when these do not fit together.
    """

    images: Tensor | LazyImages
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or self.labels.ndim != 1:
            got = f"{len(self.images)} images, labels {list(self.labels.shape)}"
            raise DataError("images and labels do not match", expected="one label per image", got=got)
        if not len(self.labels):
            raise DataError("a split without images")
        if len(self.images.shape) != 4 or (isinstance(self.images, Tensor) and self.images.dtype != torch.uint8):
            got = f"{getattr(self.images, 'dtype', '')} {list(self.images.shape)}"
            raise DataError("not a batch of images", expected="uint8 [n, C, H, W]", got=got)
        if bool((self.std <= 0).any()):
            raise DataError("std must be positive", got=str(self.std.tolist()))
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) != self.images.shape[1]:
                expected = f"{self.images.shape[1]} values, one per channel"
                raise DataError(f"{name} does not fit the images", expected=expected, got=f"{len(value)}")

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Augment | None = None,
        limit: int | None = None,
        drop_last: bool = False,
        parts: Iterator[slice] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass: normalised float32 `[b, C, H, W]` and int64 `[b]`, on the device of the split.

        Args:
            generator: a CPU generator that shuffles and augments; without it, file order and no augmentation.
            limit: at most this many images.
            parts: what of each batch is read and handed out, perhaps nothing; the same images as without, by number.
        """
        if batch_size < 1 or (limit is not None and limit < 1):
            raise DataError("an empty batch", expected="at least 1", got=f"batch_size {batch_size}, limit {limit}")
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        chunks = order[:limit].split(batch_size)
        chunks = [chunk for chunk in chunks if len(chunk) == batch_size or not drop_last]
        cut = [slice(None) if parts is None else next(parts) for _ in chunks]
        own = [chunk[part] for chunk, part in zip(chunks, cut, strict=True)]
        for whole, part, chunk, images in zip(chunks, cut, own, self._stream(own), strict=True):
            if augment and generator:
                share = {} if parts is None else {"whole": len(whole), "part": part}
                images = augment(images, generator, **share)
            yield self.normalise(images), self.labels[chunk.to(self.labels.device)]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 -> float32 with the mean and std of the data set."""
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def _stream(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        device = self.labels.device
        if isinstance(images := self.images, LazyImages):
            return (batch.to(device) for batch in images.stream(chunks))
        return (images[chunk.to(device)] for chunk in chunks)

    def subset(self, index: Tensor | Sequence[int]) -> Split:
        """The images at these positions, in this order."""
        index = torch.as_tensor(index, dtype=torch.int64, device="cpu")
        on_device = index.to(self.labels.device)
        images = self.images
        images = images.subset(index) if isinstance(images, LazyImages) else images[on_device]
        return replace(self, images=images, labels=self.labels[on_device])

    def sample(self, limit: int | None) -> Split:
        """At most `limit` images, evenly spaced: files are often sorted by class."""
        return self if limit is None or limit >= len(self) else self.subset(_evenly(limit, len(self)))

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on the device; lazy images are moved batch by batch."""
        images = self.images if isinstance(self.images, LazyImages) else self.images.to(device)
        return Split(images, self.labels.to(device), self.mean.to(device), self.std.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """Three splits and the names of the classes; raises DataError for labels that are no class."""

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    parents: Mapping[str, str] = field(default_factory=dict)  # parent class of each class name, where known

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            split: Split = getattr(self, name)
            low, high = split.labels.aminmax()
            if low < 0 or high >= self.num_classes:
                expected = f"0..{self.num_classes - 1}"
                raise DataError("labels out of range", expected=expected, got=f"{low}..{high}", where=f"split {name}")
            if split.images.shape[1:] != self.train.images.shape[1:]:
                got = f"{[*split.images.shape[1:]]} in {name}"
                raise DataError(
                    "images of different sizes",
                    expected=f"{[*self.input_shape]}",
                    got=got,
                    hint="give `size`",
                )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def example_inputs(self, batch: int = 1) -> Tensor:
        """The first normalised training images, `[batch, C, H, W]`."""
        return next(self.train.batches(batch))[0]

    def to(self, device: torch.device | str) -> Data:
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    train: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    image: str = "img",
    label: str = "label",
    parent: str | None = None,
    validation: float = 0.1,
    validation_from: str = "train",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    limit: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Data:
    """A data set by name, in three splits; the test images never depend on the seed.

    Args:
        name: a key of `gmn.sources.READERS`, or `package.module:function` (see `gmn.sources.read_function`).
        root, download: the folder of the files, and whether torchvision may fetch them.
        train, test, image, label, parent: parquet only: file patterns, and the columns of images, classes and parent
            classes.
        validation, validation_from: "train" cuts this fraction out of the training images; "test" validates
            on the even-numbered test images (file order) and tests on the odd-numbered ones, for pretrained
            networks that have seen every training image. Unused where the files have a validation split.
        mean, std: per channel, in 0..1 units; by default those of the training images.
        limit: keep at most this many images of each split, evenly spaced.
        size: resize the shorter side to this many pixels and cut out the centre.

    Raises DataError.
    """
    request = Request(Path(root) if root else None, download, train, test, image, label, parent)
    if size is not None and size < 1:
        raise DataError("images need pixels", expected="`size` of at least 1", got=str(size))
    source = read_source(name, request)
    # cut and limited before decoding, so that a small limit is quick
    parts = [_limited(part, limit) for part in _cut(source, validation, validation_from, seed)]
    grey = is_grey(parts[0].images)
    images = [_images(part, size, grey) for part in parts]
    computed = _statistics(images[0]) if mean is None or std is None else (torch.empty(0), torch.empty(0))
    mean_, std_ = (
        c if g is None else torch.tensor(g, dtype=torch.float32) for g, c in zip((mean, std), computed, strict=True)
    )
    splits = [Split(i, part.labels, mean_, std_) for i, part in zip(images, parts, strict=True)]
    classes = source.class_names or tuple(str(c) for c in range(int(source.train.labels.max()) + 1))
    return Data(*splits, class_names=classes, parents=source.parents)


def _cut(source: Source, validation: float, validation_from: str, seed: int) -> list[Part]:
    """Train, validation and test."""
    if validation_from not in ("train", "test"):
        raise DataError("unknown `validation_from`", expected="'train' or 'test'", got=repr(validation_from))
    for name, part in (("train", source.train), ("test", source.test)):
        if not len(part.labels):
            raise DataError("a split without images", where=name)
    if source.val is not None:
        return [source.train, source.val, source.test]
    if validation_from == "test":
        count = len(source.test.labels)
        if count < 2:
            raise DataError("too few test images to validate on", expected="at least 2", got=str(count))
        even, odd = torch.arange(0, count, 2), torch.arange(1, count, 2)
        return [source.train, source.test.select(even), source.test.select(odd)]
    count = len(source.train.labels)
    cut = round(count * validation)
    if not 0 < cut < count:
        got = f"validation {validation}, {cut} of {count} images"
        raise DataError("a split without images", expected="a part of the training images", got=got)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen, rest = order[:cut].sort().values, order[cut:].sort().values
    return [source.train.select(rest), source.train.select(chosen), source.test]


def _limited(part: Part, limit: int | None) -> Part:
    count = len(part.labels)
    if limit is None or limit >= count:
        return part
    if limit < 1:
        raise DataError("a split without images", expected="`limit` of at least 1", got=str(limit))
    return part.select(_evenly(limit, count))


def _evenly(limit: int, count: int) -> Tensor:
    """So many positions out of `count`, evenly spaced: files are often sorted by class."""
    return torch.arange(limit) * count // limit


def _images(part: Part, size: int | None, grey: bool) -> Tensor | LazyImages:
    if isinstance(part.images, Tensor) and (size is None or part.images.shape[-2:] == (size, size)):
        return part.images
    lazy = LazyImages([*part.images], size, grey)
    return lazy.decode_all() if math.prod(lazy.shape) <= MEMORY else lazy


def _statistics(images: Tensor | LazyImages) -> tuple[Tensor, Tensor]:
    """Mean and std `[C]` in 0..1 units; of lazy images, from an evenly spaced sample."""
    if isinstance(images, LazyImages):
        count = min(SAMPLE, len(images))
        images = images.subset(_evenly(count, len(images))).decode_all()
    # exact, from the counts of the 256 values: no float copy of all pixels
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()  # a constant channel stays finite
