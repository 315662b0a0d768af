"""Contract of `gmn.data` and `gmn.sources`.

* Three splits, disjoint, the same for the same seed; the test images never depend on the seed.
* Batches are normalised; only a generator shuffles and augments, and it reproduces.
* What is read is what was written, pixel by pixel, in memory and decoded on demand.
* Bad input is one DataError that says what to do.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

import gmn.data
from gmn.data import Augment, Data, Split, load_data
from gmn.errors import DataError
from gmn.sources import LazyImages


def pixels(n: int, channels: int = 3, height: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    shape = (n, channels, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encode(image: Tensor) -> bytes:
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[Any], labels: list[int], struct: bool = True) -> Path:
    schema = pa.schema([("img", pa.binary()), ("label", pa.int64())])
    column: list[Any] = images
    if struct:
        schema = schema.set(0, pa.field("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        column = [{"bytes": image, "path": None} for image in images]
    features = {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.table([column, labels], schema=schema), path)
    return path


def split(images: Tensor) -> Split:
    """Labels are positions, and normalisation leaves 0..1."""
    c = images.shape[1]
    return Split(images, torch.arange(len(images)), torch.zeros(c), torch.ones(c))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_of(part: Split, **options: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*part.batches(7, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


# Batches


def test_batches_are_normalised_and_in_order() -> None:
    raw = pixels(10)
    part = Split(raw, torch.arange(10), torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 0.3]))
    images, labels = all_of(part)
    assert labels.tolist() == list(range(10))
    assert torch.allclose(images[:, 1], (raw[:, 1] / 255 - 0.4) / 0.2)
    assert images.dtype == torch.float32


def test_a_generator_shuffles_and_reproduces() -> None:
    part = split(pixels(50))
    first, again, other = (all_of(part, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert first[1].sort().values.tolist() == list(range(50))
    assert torch.equal(first[0], part.normalise(pixels(50))[first[1]])


def test_limit_and_drop_last() -> None:
    part = split(pixels(20))
    assert [len(y) for _, y in part.batches(8)] == [8, 8, 4]
    assert [len(y) for _, y in part.batches(8, drop_last=True)] == [8, 8]
    assert [len(y) for _, y in part.batches(8, limit=10, generator=seeded())] == [8, 2]
    assert all_of(part, limit=3)[1].tolist() == [0, 1, 2]


def test_augmentation_is_a_crop_of_the_padded_image_and_perhaps_a_flip() -> None:
    raw = pixels(40)
    out = Augment(crop=2, flip=True)(raw, seeded())
    assert out.shape == raw.shape
    assert out.dtype == torch.uint8
    padded = torch.nn.functional.pad(raw, [2] * 4)
    kinds = set()
    for i in range(len(raw)):
        crops = {(y, x): padded[i, :, y : y + 6, x : x + 5] for y in range(5) for x in range(5)}
        crops = {(*k, f): c.flip(2) if f else c for k, c in crops.items() for f in (False, True)}
        kinds.add(next(kind for kind, crop in crops.items() if torch.equal(crop, out[i])))
    assert {flipped for *_, flipped in kinds} == {False, True}
    assert len({kind[0] for kind in kinds}) == len({kind[1] for kind in kinds}) == 5


def test_augmentation_reproduces_and_needs_a_generator() -> None:
    part, augment = split(pixels(30)), Augment(crop=1, flip=True)
    first, again = (all_of(part, generator=seeded(3), augment=augment)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, all_of(part, generator=seeded(3))[0])
    assert torch.equal(all_of(part, augment=augment)[0], all_of(part)[0])
    assert torch.equal(Augment()(pixels(4), seeded()), pixels(4))


def test_subset_and_to() -> None:
    part = split(pixels(10)).subset([7, 2]).to("cpu")
    assert part.labels.tolist() == [7, 2]
    assert torch.equal(all_of(part)[0], pixels(10)[[7, 2]] / 255)


def test_lazy_images_equal_decoded_ones() -> None:
    raw = pixels(30)
    lazy = split(raw)
    lazy = Split(LazyImages([encode(image) for image in raw]), lazy.labels, lazy.mean, lazy.std)
    options = {"generator": seeded(1), "augment": Augment(1, True), "limit": 20}
    a, b = all_of(split(raw), **options), all_of(lazy, **{**options, "generator": seeded(1)})
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert torch.equal(all_of(lazy.subset([4, 1]))[0], raw[[4, 1]] / 255)
    next(lazy.batches(2))  # a pass may be left early


# Splits


def images_of(part: Split) -> set[bytes]:
    assert isinstance(part.images, Tensor)
    return {image.numpy().tobytes() for image in part.images}


def test_digits() -> None:
    data = load_data("digits")
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sum(sizes) == 1797
    assert sizes[2] == 360
    assert data.test.labels.bincount().min() >= 34
    assert data.input_shape == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    assert int(data.train.images[torch.arange(100)].max()) == 255
    images, _ = all_of(data.train)
    assert images.mean().abs() < 1e-4
    assert abs(float(images.std()) - 1) < 1e-3
    assert torch.equal(data.example_inputs(3), images[:3])


def test_splits_are_disjoint_and_follow_the_seed() -> None:
    a, same, other = (load_data("digits", seed=seed, validation=0.25) for seed in (0, 0, 1))
    assert len(images_of(a.train) | images_of(a.val) | images_of(a.test)) == 1797
    assert images_of(a.val) == images_of(same.val)
    assert images_of(a.val) != images_of(other.val)
    assert torch.equal(a.test.images[torch.arange(360)], other.test.images[torch.arange(360)])
    assert len(a.val) == round(0.25 * 1437)


def test_validation_from_test() -> None:
    whole, halves = load_data("digits"), load_data("digits", validation_from="test")
    assert len(halves.train) == 1437
    assert torch.equal(halves.val.labels, whole.test.labels[::2])
    assert torch.equal(halves.test.labels, whole.test.labels[1::2])


def test_limit_is_spread_evenly_over_each_split() -> None:
    data, whole = load_data("digits", limit=40), load_data("digits")
    assert [len(part) for part in (data.train, data.val, data.test)] == [40, 40, 40]
    assert torch.equal(data.test.labels, whole.test.labels[torch.arange(40) * 9])


def test_given_normalisation_is_kept() -> None:
    data = load_data("digits", mean=[0.25], std=[0.5])
    assert data.test.mean.tolist() == [0.25]
    assert data.test.std.tolist() == [0.5]


@pytest.mark.parametrize("memory", [2**30, 0])
def test_resizing_array_data(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(gmn.data, "MEMORY", memory)
    data = load_data("digits", size=16, limit=20)
    assert isinstance(data.train.images, Tensor) == bool(memory)
    assert data.input_shape == (1, 16, 16)
    assert data.example_inputs(4).shape == (4, 1, 16, 16)


# Files


@pytest.mark.parametrize(("channels", "struct"), [(3, True), (1, True), (3, False)])
def test_parquet_is_read_back_exactly(tmp_path: Path, channels: int, struct: bool) -> None:
    raw, test = pixels(20, channels), pixels(9, channels, seed=1)
    for i, part in enumerate(raw.split(10)):
        labels = [k % 3 for k in range(10 * i, 10 * i + 10)]
        write_parquet(tmp_path / f"train-{i}.parquet", [encode(x) for x in part], labels, struct)
    write_parquet(tmp_path / "test-0.parquet", [encode(x) for x in test], [0] * 9, struct)
    data = load_data("parquet", root=tmp_path, validation_from="test")
    assert torch.equal(data.train.images[torch.arange(20)], raw)
    assert data.train.labels.tolist() == [k % 3 for k in range(20)]
    assert torch.equal(data.val.images[torch.arange(5)], test[::2])
    assert data.class_names == ("cat", "dog", "owl")
    assert data.input_shape == (channels, 6, 5)
    assert torch.allclose(data.train.mean, (raw / 255).mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(data.train.std, (raw / 255).std((0, 2, 3), correction=0), atol=1e-6)


def image_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), height: int = 6) -> Path:
    for seed, part in enumerate(parts):
        for label, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(pixels(4, height=height, seed=10 * seed + label)):
                (root / part / name / f"{i}.png").write_bytes(encode(image))
    return root


@pytest.mark.parametrize("memory", [2**30, 0])
def test_imagefolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(gmn.data, "MEMORY", memory)
    data = load_data("imagefolder", root=image_folder(tmp_path), validation_from="test")
    assert isinstance(data.train.images, LazyImages) != bool(memory)
    raw = torch.cat([pixels(4, seed=0), pixels(4, seed=1)])
    images, labels = all_of(data.train)
    assert torch.equal(images, data.train.normalise(raw))
    assert torch.allclose(data.train.mean, (raw / 255).mean((0, 2, 3)), atol=1e-6)
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert data.class_names == ("ant", "bee")


def test_imagefolder_with_its_own_validation(tmp_path: Path) -> None:
    data = load_data("imagefolder", root=image_folder(tmp_path, ("train", "test", "val")))
    assert torch.equal(data.val.images[torch.arange(4)], pixels(4, seed=20))
    assert torch.equal(data.test.images[torch.arange(4)], pixels(4, seed=10))
    assert len(data.train) == 8


def test_centre_crop_keeps_the_middle(tmp_path: Path) -> None:
    wide = torch.zeros(3, 4, 12, dtype=torch.uint8)
    wide[:, :, 4:8] = 200
    assert LazyImages([encode(wide)], size=4)[torch.tensor([0])].unique().tolist() == [200]


def test_fashion_mnist_from_idx_files(tmp_path: Path) -> None:
    raw = pixels(20, 1, 28, 28)
    for kind, part in (("train", raw[:12]), ("t10k", raw[12:])):
        n = len(part).to_bytes(4, "big")
        side = (28).to_bytes(4, "big")
        images = b"\0\0\x08\x03" + n + side + side + part.numpy().tobytes()
        (tmp_path / f"{kind}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{kind}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + n + bytes(range(len(part))[:10]) + b"\0" * (len(part) - 10)
        )
    data = load_data("fashion_mnist", root=tmp_path, validation_from="test")
    assert torch.equal(data.train.images[torch.arange(12)], raw[:12])
    assert data.val.labels.tolist() == [0, 2, 4, 6]
    assert data.num_classes == 10


# Functions


def tensor_pairs() -> tuple:
    return (pixels(8), torch.arange(8) % 2), (pixels(4), torch.zeros(4)), (pixels(6), torch.ones(6))


def torch_datasets() -> tuple:
    return tuple(TensorDataset(pixels(n) / 255, torch.arange(n) % 2) for n in (10, 6))


def normalised() -> tuple:
    return tuple(TensorDataset(torch.randn(n, 3, 4, 4), torch.arange(n) % 2) for n in (10, 6))


def float_pairs() -> tuple:
    return tuple((pixels(n) / 255, torch.arange(n)) for n in (8, 8))


def unknown_test_class() -> tuple:
    return (pixels(8), torch.arange(8) % 2), (pixels(6), torch.arange(6) % 3)


def negative_labels() -> tuple:
    return (pixels(8), torch.arange(8) % 2), (pixels(6), torch.full((6,), -1))


def mismatched() -> tuple:
    return (pixels(8), torch.zeros(7)), (pixels(6), torch.zeros(6))


def empty() -> tuple:
    return (pixels(8), torch.zeros(8)), (pixels(0), torch.zeros(0))


def other_size() -> tuple:
    return (pixels(8), torch.zeros(8)), (pixels(8, height=9), torch.zeros(8))


def not_data() -> int:
    return 3


def test_tensor_pairs_from_a_function() -> None:
    data = load_data(f"{__name__}:tensor_pairs")
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 4, 6]
    assert torch.equal(data.train.images[torch.arange(8)], pixels(8))
    assert data.num_classes == 2


def test_datasets_from_a_function() -> None:
    data = load_data(f"{__name__}:torch_datasets", validation=0.5)
    assert len(images_of(data.train) | images_of(data.val)) == 10
    assert torch.equal(data.test.images[torch.arange(6)], pixels(6))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normalised", "floats in 0..1.*do not normalise"),
        ("float_pairs", "expected uint8"),
        ("unknown_test_class", r"out of range: expected 0\.\.1; got 0\.\.2; in split test"),
        ("negative_labels", "out of range"),
        ("mismatched", "8 images, 7 labels"),
        ("empty", "without images"),
        ("other_size", "different sizes.*size"),
        ("not_data", r"\(train, val, test\); got int"),
        ("absent", "no such function"),
    ],
)
def test_wrong_functions(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(f"{__name__}:{name}")


# Errors


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar11", {}, "did you mean 'cifar10'"),
        ("cifar10", {}, "needs `root`"),
        ("svhn", {"root": "/no/such"}, "no such folder"),
        ("imagefolder", {"root": "/no/such"}, "no such folder"),
        ("parquet", {"train": "/no/such/*.parquet"}, "no such parquet file"),
        ("digits", {"validation": 0.0}, "without images"),
        ("digits", {"validation": 1.0}, "without images"),
        ("digits", {"validation_from": "val"}, "'train' or 'test'"),
        ("digits", {"limit": 0}, "`limit`"),
        ("digits", {"size": 0}, "`size`"),
        ("digits", {"mean": [0.1, 0.2, 0.3]}, "1 values, one per channel; got 3"),
        ("digits", {"std": [0.0]}, "positive"),
    ],
)
def test_wrong_arguments(name: str, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(name, **options)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "imagenet", "fashion_mnist", "imagefolder"])
def test_an_empty_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(name, root=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_parquet_files(tmp_path: Path) -> None:
    good = [encode(image) for image in pixels(6)]
    bigger = encode(pixels(1, height=9)[0])
    cases = {
        r"missing column: expected 'image'; got \['img', 'label'\]": (good, {"image": "image"}),
        "unreadable image": ([b"no image", *good[1:]], {}),
        "not an encoded image": ([None, *good[1:]], {}),
        "different sizes.*`size`": ([*good, bigger], {}),
    }
    for i, (message, (images, options)) in enumerate(cases.items()):
        path = write_parquet(tmp_path / f"{i}.parquet", images, [0] * len(images))
        with pytest.raises(DataError, match=message):
            load_data("parquet", train=str(path), test=str(path), **options)
    (tmp_path / "torn.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot read the parquet file"):
        load_data("parquet", train=str(tmp_path / "torn.parquet"))


def test_bad_image_folders(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "test" / "ant" / "0.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"unreadable image.*0\.png"):
        load_data("imagefolder", root=root)
    (root / "test" / "cat").mkdir()
    (root / "test" / "cat" / "0.png").write_bytes(b"torn")
    with pytest.raises(DataError, match="lack: got 'cat'"):
        load_data("imagefolder", root=root)


def test_images_that_would_lose_something() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (4, 4)).save(buffer, "PNG")
    with pytest.raises(DataError, match="8 bits per channel"):
        LazyImages([buffer.getvalue()])[torch.tensor([0])]
    with pytest.raises(DataError, match="colour image among grey"):
        LazyImages([encode(pixels(1)[0])], grey=True)[torch.tensor([0])]


def test_a_split_checks_its_parts() -> None:
    with pytest.raises(DataError, match="at least 1"):
        next(split(pixels(3)).batches(0))
    with pytest.raises(DataError, match="uint8"):
        split(pixels(3).float())
    with pytest.raises(DataError, match="out of range"):
        Data(split(pixels(3)), split(pixels(3)), split(pixels(3)), ("a", "b"))
