"""Contract of `gmn.sources` and `gmn.images`.

* What is read is what was written, pixel by pixel, in memory and decoded on demand.
* A function of one's own may return tensors or datasets; what it may not return is named.
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
from pictures import all_of, encode, images_of, pixels
from PIL import Image
from torch.utils.data import TensorDataset

import gmn.data
from gmn.data import load_data
from gmn.errors import DataError
from gmn.images import LazyImages


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


def test_parent_classes_come_from_a_column(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog", "owl"]}, "above": {"names": ["bird", "pet"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("img", pa.binary()), ("label", pa.int64()), ("above", pa.int64())]).with_metadata(metadata)
    images = [encode(x) for x in pixels(12)]
    labels = [k % 3 for k in range(12)]
    for name, parents in (("train-a", [(1, 1, 0)[k] for k in labels]), ("test-a", [0] * 12)):
        pq.write_table(pa.table([images, labels, parents], schema=schema), tmp_path / f"{name}.parquet")
    data = load_data("parquet", root=tmp_path, parent="above")
    assert data.parents == {"cat": "pet", "dog": "pet", "owl": "bird"}
    assert load_data("parquet", root=tmp_path).parents == {}
    with pytest.raises(DataError, match="missing column: expected 'besides'"):
        load_data("parquet", root=tmp_path, parent="besides")
    pq.write_table(pa.table([images, labels, list(range(12))], schema=schema), tmp_path / "train-b.parquet")
    with pytest.raises(DataError, match="several parents"):
        load_data("parquet", root=tmp_path, parent="above")


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
