"""Contract of `gmn.data`.

* Three splits, disjoint, the same for the same seed; the test images never depend on the seed.
* Batches are normalised; only a generator shuffles and augments, and it reproduces.
* Images decoded on demand give the same batches as images in memory.
* A split refuses parts that do not fit together.
"""

from __future__ import annotations

import pytest
import torch
from pictures import all_of, encode, images_of, pixels, split
from torch import Tensor

import gmn.data
from gmn.data import Augment, Data, Split, load_data
from gmn.errors import DataError
from gmn.images import LazyImages


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_a_split_checks_its_parts() -> None:
    with pytest.raises(DataError, match="at least 1"):
        next(split(pixels(3)).batches(0))
    with pytest.raises(DataError, match="uint8"):
        split(pixels(3).float())
    with pytest.raises(DataError, match="out of range"):
        Data(split(pixels(3)), split(pixels(3)), split(pixels(3)), ("a", "b"))
