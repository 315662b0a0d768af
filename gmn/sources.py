"""Where images come from: each source gives raw parts, a named data set as it lies in its files.

A part is images and labels in file order; `gmn.data` cuts, limits, decodes and normalises them. Images
are one uint8 tensor `[n, C, H, W]`, or a list of encoded images.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from gmn.errors import DataError, one_line
from gmn.images import Item
from gmn.names import accepted, import_function, nearest


@dataclass(frozen=True, eq=False)
class Part:
    """Images and labels in file order; labels are int64 `[n]`."""

    images: Tensor | list[Item]
    labels: Tensor

    def select(self, index: Tensor) -> Part:
        images = self.images
        images = images[index] if isinstance(images, Tensor) else [images[i] for i in index.tolist()]
        return Part(images, self.labels[index])


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as its files have it; `val` only where the files have one."""

    train: Part
    test: Part
    val: Part | None = None
    class_names: tuple[str, ...] | None = None
    parents: dict[str, str] = field(default_factory=dict)  # of the classes by name, where the files say it


@dataclass(frozen=True)
class Request:
    """What a source may need to know; see `gmn.data.load_data`."""

    root: Path | None = None
    download: bool = False
    train: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    image: str = "img"
    label: str = "label"
    parent: str | None = None


def read_digits(request: Request) -> Source:
    """scikit-learn's 1,797 handwritten digits; every fifth of each class is a test image."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))  # a frozen stream of numpy
    by_class = order[labels[order].argsort(stable=True)]
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[by_class[::5]] = True
    parts = [Part(images[chosen], labels[chosen]) for chosen in (~is_test, is_test)]
    return Source(*parts, class_names=tuple(str(name) for name in digits.target_names))


def _root(request: Request) -> Path:
    if request.root is None:
        raise DataError("this data set needs `root`", expected="the folder of its files")
    if not request.root.is_dir() and not request.download:
        hint = "give data.root, or data.download: true"
        raise DataError("no such folder", got=str(request.root), where="`root`", hint=hint)
    return request.root


def _torchvision(make: Callable[[], Any], root: Path) -> Any:
    try:
        return make()
    except (RuntimeError, OSError, ImportError) as problem:
        hint = "set `download`, or put the files there"
        raise DataError("cannot read the data set", got=one_line(problem), where=str(root), hint=hint) from problem


def read_cifar(kind: str, request: Request) -> Source:
    """torchvision's `CIFAR10` or `CIFAR100`."""
    from torchvision import datasets

    root, reader = _root(request), getattr(datasets, kind)
    sets = [_torchvision(lambda t=t: reader(root, train=t, download=request.download), root) for t in (True, False)]
    parts = [Part(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets]
    return Source(*parts, class_names=tuple(sets[0].classes))


def read_svhn(request: Request) -> Source:
    """torchvision's `SVHN`, without the extra images."""
    from torchvision import datasets

    root = _root(request)
    splits = ("train", "test")
    sets = [_torchvision(lambda s=s: datasets.SVHN(str(root), s, download=request.download), root) for s in splits]
    parts = [Part(torch.from_numpy(s.data), torch.from_numpy(s.labels).long()) for s in sets]
    return Source(*parts, class_names=tuple("0123456789"))


def read_fashion_mnist(request: Request) -> Source:
    """Fashion-MNIST from four IDX files, plain or gzipped, in `root` or in torchvision's folders below."""
    from torchvision import datasets

    root = _root(request)
    if request.download:
        _torchvision(lambda: datasets.FashionMNIST(root, download=True), root)
    parts = [
        Part(_idx(root, f"{kind}-images-idx3-ubyte")[:, None], _idx(root, f"{kind}-labels-idx1-ubyte").long())
        for kind in ("train", "t10k")
    ]
    return Source(*parts, class_names=tuple(datasets.FashionMNIST.classes))


def _idx(root: Path, name: str) -> Tensor:
    folders = (root, root / "FashionMNIST" / "raw")
    for path in (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz")):
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            # two zero bytes, the type, the number of dimensions, then each dimension as big-endian int32
            shape = np.frombuffer(content, ">i4", count=content[3], offset=4).tolist()
            values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
            return torch.from_numpy(values.reshape(shape).copy())
    raise DataError("missing file", expected=f"{name} or {name}.gz", where=str(root), hint="or set `download`")


def read_imagenet(request: Request) -> Source:
    """torchvision's `ImageNet`; its published validation images are the test split."""
    from torchvision import datasets

    root = _root(request)
    sets = [_torchvision(lambda s=s: datasets.ImageNet(root, s), root) for s in ("train", "val")]
    parts = [Part([Path(path) for path, _ in s.samples], torch.tensor(s.targets)) for s in sets]
    return Source(*parts, class_names=tuple(", ".join(names) for names in sets[0].classes))


def read_imagefolder(request: Request) -> Source:
    """`root/train/CLASS/*` and `root/test` or `root/val`; with both, `val` validates."""
    root = _root(request)
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" not in folders or len(folders) < 2:
        raise DataError("missing folder", expected="train, and test or val", got=str(list(folders)), where=str(root))
    names = tuple(sorted(path.name for path in folders["train"].iterdir() if path.is_dir()))
    parts = {name: _folder_part(folder, names) for name, folder in folders.items()}
    test = parts.pop("test") if "test" in parts else parts.pop("val")
    return Source(parts["train"], test, parts.get("val"), names)


def _folder_part(folder: Path, names: tuple[str, ...]) -> Part:
    suffixes = Image.registered_extensions()
    files = [p for p in sorted(folder.glob("*/*")) if p.suffix.lower() in suffixes]
    unknown = sorted({p.parent.name for p in files} - set(names))
    if unknown:
        raise DataError("a class that the training images lack", got=repr(unknown[0]), where=str(folder))
    return Part([*files], torch.tensor([names.index(p.parent.name) for p in files], dtype=torch.int64))


def read_parquet(request: Request) -> Source:
    """Hugging Face's layout: encoded images (`bytes`, or a struct with the field `bytes`) and integer labels.

    Class names come from the schema. Without patterns: `train*.parquet`, `test*.parquet` of `root`.
    """
    train, names = _parquet_part(request.train or "train*.parquet", request)
    test, _ = _parquet_part(request.test or "test*.parquet", request)
    parents = _parquet_parents(request, names) if request.parent else {}
    return Source(train, test, class_names=names, parents=parents)


def _parquet_parents(request: Request, names: tuple[str, ...] | None) -> dict[str, str]:
    """Parent class of each class name, from two columns of the training files."""
    parent = replace(request, label=str(request.parent))
    (fine, _), (coarse, above) = (_parquet_labels(r) for r in (request, parent))
    pairs = set(zip(fine, coarse, strict=True))
    if len(pairs) > len(set(fine)):
        raise DataError("a class with several parents", expected="one", where=f"column {request.parent!r}")
    text = lambda known, index: known[index] if known else str(index)  # noqa: E731
    return {text(names, child): text(above, up) for child, up in sorted(pairs)}


def _parquet_labels(request: Request) -> tuple[list[int], tuple[str, ...] | None]:
    import pyarrow.parquet as pq

    labels, names, patterns = [], None, request.train or "train*.parquet"
    for path in _matching([patterns] if isinstance(patterns, str) else patterns, request.root):
        schema = pq.read_schema(path)
        if request.label not in schema.names:
            raise DataError("missing column", expected=repr(request.label), got=str(schema.names), where=str(path))
        labels += _integers(pq.read_table(path, columns=[request.label])[request.label], f"column {request.label!r}")
        names = names or _class_names(schema.metadata, request.label)
    return labels, names


def _parquet_part(patterns: str | Sequence[str], request: Request) -> tuple[Part, tuple[str, ...] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    items: list[Item] = []
    labels: list[int] = []
    names = None
    for path in _matching([patterns] if isinstance(patterns, str) else patterns, request.root):
        try:
            schema = pq.read_schema(path)
            for column in (request.image, request.label):
                if column not in schema.names:
                    raise DataError("missing column", expected=repr(column), got=str(schema.names), where=str(path))
            table = pq.read_table(path, columns=[request.image, request.label])
        except (pa.ArrowException, OSError) as problem:
            raise DataError("cannot read the parquet file", got=str(problem), where=str(path)) from problem
        items += _encoded(table[request.image], f"column {request.image!r} of {path}")
        labels += _integers(table[request.label], f"column {request.label!r} of {path}")
        names = names or _class_names(schema.metadata, request.label)
    return Part(items, torch.tensor(labels, dtype=torch.int64)), names


def _matching(patterns: Sequence[str], root: Path | None) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        # glob.glob and not Path.glob: a pattern may be absolute
        paths = sorted(glob.glob(str(root / pattern if root else pattern)))  # noqa: PTH207
        if not paths:
            where, hint = str(root or Path.cwd()), "give data.train and data.test"
            raise DataError("no such parquet file", got=repr(pattern), where=where, hint=hint)
        found += map(Path, paths)
    return found


def _encoded(column: Any, where: str) -> list[Item]:
    import pyarrow as pa

    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        values = [value for chunk in column.chunks for value in chunk.field("bytes").to_pylist()]
    else:
        values = column.to_pylist()
    wrong = next((value for value in values if not isinstance(value, bytes)), b"")
    if not isinstance(wrong, bytes):
        raise DataError("not an encoded image", expected="bytes", got=type(wrong).__name__, where=where)
    return values


def _integers(column: Any, where: str) -> list[int]:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError("labels are not all integers", got=str(column.type), where=where)
    return column.to_pylist()


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names")
    return tuple(names) if names else None


def read_function(name: str, request: Request) -> Source:
    """The parts that `package.module:function` returns: (train, test) or (train, val, test).

    Each is a torch Dataset of (image, label), or a pair of tensors (uint8 images, labels). The function
    gets `root` and `download` as keywords where its signature takes them.
    """
    function = import_function(name, DataError)
    returned = function(**accepted(function, {"root": request.root, "download": request.download}))
    if not isinstance(returned, (tuple, list)) or len(returned) not in (2, 3):
        got = f"{len(returned)} parts" if isinstance(returned, (tuple, list)) else type(returned).__name__
        raise DataError("not data", expected="(train, test) or (train, val, test)", got=got, where=name)
    parts = [_returned_part(part, name) for part in returned]
    return Source(parts[0], parts[-1], parts[1] if len(parts) == 3 else None)


def _returned_part(part: Any, where: str) -> Part:
    if isinstance(part, (tuple, list)) and len(part) == 2 and all(isinstance(t, Tensor) for t in part):
        if part[0].dtype != torch.uint8 or part[0].ndim != 4:
            got = f"{part[0].dtype} {[*part[0].shape]}"
            raise DataError("not a batch of images", expected="uint8 [n, C, H, W]", got=got, where=where)
        if len(part[0]) != len(part[1]):
            got = f"{len(part[0])} images, {len(part[1])} labels"
            raise DataError("images and labels do not match", got=got, where=where)
        return Part(part[0], part[1].long())
    if not isinstance(part, Dataset):
        raise DataError("not a part", expected="a Dataset or (images, labels)", got=type(part).__name__, where=where)
    count = len(cast(Any, part))  # a map-style Dataset: its base class declares no length
    images, labels = zip(*(part[i] for i in range(count)), strict=True) if count else ((), ())
    return Part([_pixels(image, where) for image in images], torch.tensor([int(label) for label in labels]))


def _pixels(image: Any, where: str) -> Tensor:
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.is_floating_point() and image.min() >= 0 and image.max() <= 1:
        image = (image * 255).round().to(torch.uint8)
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        expected = "a PIL image, uint8 [C, H, W], or floats in 0..1"
        raise DataError("not an image", expected=expected, got=got, where=where, hint="do not normalise here")
    return image


READERS: dict[str, Callable[[Request], Source]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": partial(read_cifar, "CIFAR10"),
    "cifar100": partial(read_cifar, "CIFAR100"),
    "svhn": read_svhn,
    "imagenet": read_imagenet,
    "parquet": read_parquet,
    "imagefolder": read_imagefolder,
}


def read_source(name: str, request: Request) -> Source:
    """The data set of this name, or of `package.module:function`; raises DataError."""
    if ":" in name:
        return read_function(name, request)
    if name not in READERS:
        expected = f"{', '.join(READERS)} or package.module:function"
        raise DataError("unknown data set", expected=expected, got=repr(name), hint=nearest(name, READERS))
    return READERS[name](request)
