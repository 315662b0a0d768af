"""Contract of `gmn.simsiam`.

* The loss is the mean of two negated cosines, and no gradient goes through a projection.
* Two views per image: uint8, of the same size, decided by the generator, different for every image; a crop keeps the
  area and aspect it was given; with all switches off a view is its image; only images of three channels turn grey.
* All of the network but its head learns; labels are not read; the seed decides everything, and nothing else does.
* Afterwards the nearest neighbour of an image is far more often of its class, and the projections have not collapsed.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gmn
from gmn.data import Split
from gmn.errors import DataError, NetworkError, TrainingError
from gmn.networks import build_network
from gmn.settings_vote import SimSiam
from gmn.simsiam import TwoViews, pretrain, siamese_loss, spread

OFF = {"min_scale": 1.0, "flip": False, "jitter": 0.0, "grey": 0.0}


def config(**changes: Any) -> SimSiam:
    return SimSiam(**{"epochs": 1, "batch_size": 16, "projection": 16, "bottleneck": 8, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 8, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=seeded(1), dtype=torch.uint8)


def views(images: Tensor, seed: int = 0, **switches: Any) -> Tensor:
    return TwoViews(config(**{**OFF, **switches}))(images, seeded(seed))


# -- loss --------------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand_and_its_constants() -> None:
    """cos(p1, z2) is 0.6 and 1; cos(p2, z1) is -1 and 0."""
    p1 = torch.tensor([[2.0, 0.0], [1.0, 1.0]], requires_grad=True)
    z2 = torch.tensor([[3.0, 4.0], [5.0, 5.0]], requires_grad=True)
    p2 = torch.tensor([[0.0, 2.0], [1.0, 0.0]], requires_grad=True)
    z1 = torch.tensor([[0.0, -5.0], [0.0, 3.0]], requires_grad=True)
    loss = siamese_loss(p1, z1, p2, z2)
    assert loss.item() == pytest.approx(-0.5 * 0.8 - 0.5 * -0.5)
    loss.backward()
    assert z1.grad is None
    assert z2.grad is None
    # d cos / d p1 is the part of z2 / |z2| across p1, by |p1|; half of it, and half of that for two images
    torch.testing.assert_close(p1.grad, torch.tensor([[0.0, -0.5 * 0.5 * 0.8 / 2], [0.0, 0.0]]))
    assert p2.grad is not None
    assert bool(p2.grad.any())


def test_spread_tells_a_point_from_a_sphere() -> None:
    z = torch.randn(4000, 32, generator=seeded())
    assert spread(z) == pytest.approx(1, abs=0.01)
    assert spread(100 * z) == pytest.approx(spread(z))
    assert spread(z[:1].expand(50, 32)) == pytest.approx(0, abs=1e-6)
    assert spread(z[:1] + 0.1 * z) < 0.2


# -- views -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 1, 8, 8), (2, 4, 6, 10)])
def test_two_views_of_the_same_shape_and_type(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)
    both = TwoViews(config())(images, seeded())
    assert both.dtype == torch.uint8
    assert both.shape == (2 * shape[0], *shape[1:])
    assert TwoViews(config())(images.to("meta"), seeded()).device.type == "meta"


def test_no_value_wraps_around() -> None:
    """Brightness of up to 1.9 makes white no darker, contrast of up to 1.9 makes black no lighter."""
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    images[..., 4:] = 250
    both = views(images, jitter=0.9).int()
    assert bool((both[..., 4:] >= both[..., :4]).all())
    assert int(both.max()) == 255
    assert int(both.min()) == 0


def test_the_generator_decides_and_every_image_has_views_of_its_own() -> None:
    same = noise(1).repeat(6, 1, 1, 1)
    first, again, other = (TwoViews(config())(same, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({view.numpy().tobytes() for view in first}) == 12


def test_without_switches_a_view_is_its_image() -> None:
    images = noise(8, size=9)
    assert torch.equal(views(images), images.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("switch", [{"min_scale": 0.5}, {"flip": True}, {"jitter": 0.4}, {"grey": 1.0}])
def test_each_switch_alone_changes_views(switch: dict[str, Any]) -> None:
    images = noise(16)
    changed = (views(images, **switch) != images.repeat(2, 1, 1, 1)).flatten(1).any(1)
    assert float(changed.float().mean()) > 0.2


def test_a_mirrored_view_is_the_mirror_image() -> None:
    images = noise(32)
    both, twice = views(images, flip=True), images.repeat(2, 1, 1, 1)
    plain, mirrored = ((both == x).flatten(1).all(1) for x in (twice, twice.flip(-1)))
    assert bool((plain ^ mirrored).all())
    assert 0.25 < float(mirrored.float().mean()) < 0.75


def test_crops_have_the_area_and_aspect_they_should() -> None:
    """On two ramps, where the slope of a view is the share of the width, and of the height."""
    size, step, count = 64, 4, 300
    ramp = (step * torch.arange(size)).to(torch.uint8)
    image = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)])
    both = views(image.expand(count, 2, size, size), min_scale=0.3).float()
    inner = slice(4, size - 4)  # at the border a ramp is cut off
    width = both[:, 0, 32, inner].diff(dim=-1).mean(-1) / step
    height = both[:, 1, inner, 32].diff(dim=-1).mean(-1) / step
    area, aspect = width * height, width / height
    assert 0.29 < float(area.min()) < 0.33
    assert 0.96 < float(area.max()) < 1.01
    assert float(area.mean()) == pytest.approx(0.65, abs=0.04)
    assert 0.74 < float(aspect.min()) < 0.8
    assert 1.25 < float(aspect.max()) < 1.35
    left = both[:, 0, 32, 32] / step - size / 2  # how far the centre of the crop is from the image's
    assert bool((left.abs() <= size * (1 - width) / 2 + 1).all())
    assert float(left.std()) > 3


def test_a_crop_at_the_border_stays_as_light() -> None:
    white = torch.full((50, 1, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(views(white, min_scale=0.2), white.repeat(2, 1, 1, 1))


def test_brightness_and_contrast_change_by_at_most_their_share() -> None:
    images = torch.full((200, 1, 4, 4), 80, dtype=torch.uint8)
    images[..., 2:] = 120
    dark, light = views(images, jitter=0.3).float().mean(2).squeeze(1)[:, [0, 3]].unbind(1)
    for factor in ((dark + light) / 200, (light - dark) / (dark + light) * 5):
        assert 0.68 < float(factor.min()) < 0.75
        assert 1.25 < float(factor.max()) < 1.32


def test_only_colours_turn_grey() -> None:
    for channels in (1, 2, 4):
        assert torch.equal(views(noise(4, channels), grey=1.0), noise(4, channels).repeat(2, 1, 1, 1))
    luma = (noise(4).float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    expected = luma.round().to(torch.uint8).expand(4, 3, 8, 8).repeat(2, 1, 1, 1)
    assert torch.equal(views(noise(4), grey=1.0), expected)
    some = views(noise(200, size=2), grey=0.2)
    share = float((some == some[:, :1]).flatten(1).all(1).float().mean())
    assert 0.12 < share < 0.28


# -- training ----------------------------------------------------------------------------------------------------------


def network(seed: int = 0, channels: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"shortcut": "B", "width": 8}
        return build_network("cifar.resnet8", num_classes=10, in_channels=channels, options=options)


def unlabelled(count: int = 48) -> Split:
    return Split(noise(count), torch.arange(count) % 10, torch.full((3,), 0.5), torch.full((3,), 0.3))


def trained(split: Split, *, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    model = network()
    pretrain(model, split, config(**changes), torch.zeros(1, 3, 8, 8), seed=seed)
    return model.state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_all_but_the_head_learns() -> None:
    """Also with a decay of weights that would be seen."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    pretrain(model, unlabelled(), config(weight_decay=0.1, epochs=2), torch.zeros(1, 3, 8, 8))
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {"linear.weight", "linear.bias"}
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.get_submodule("linear")._forward_pre_hooks


def test_labels_are_not_read() -> None:
    split = unlabelled()
    other = dataclasses.replace(split, labels=split.labels[torch.randperm(48, generator=seeded())])
    assert equal(trained(split), trained(other))


def test_the_seed_alone_decides() -> None:
    split = unlabelled()
    first = trained(split)
    torch.rand(1)
    state = torch.get_rng_state()
    assert equal(trained(split), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(trained(split, seed=1), first)
    assert not equal(trained(split.subset(range(32))), first)


def test_epochs_differ_and_bfloat16_is_close() -> None:
    """Epochs by their views, for nothing is learned here; a batch that is larger than the split is the split."""
    split, logs = unlabelled(), []
    for bf16 in (False, True):
        pretrain(
            network(),
            split,
            config(epochs=2, batch_size=500, lr=1e-30, bf16=bf16),
            torch.zeros(1, 3, 8, 8),
            log=logs.append,
        )
    assert [entry["epoch"] for entry in logs] == [1, 2, 1, 2]
    assert logs[0]["loss"] != logs[1]["loss"]
    assert logs[0]["loss"] != logs[2]["loss"]
    assert logs[0]["loss"] == pytest.approx(logs[2]["loss"], abs=0.02)


class Everywhere(nn.Module):
    """A head that judges every position by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(2).transpose(1, 2)).mean(1)


def test_what_cannot_be_trained_is_refused() -> None:
    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(DataError, match="too few images to pre-train on: expected at least 2; got 1"):
        pretrain(network(), unlabelled(1), config(), example)
    no_linear = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 6))
    with pytest.raises(NetworkError, match="no head to leave out: expected a linear layer; got Conv2d"):
        pretrain(no_linear, unlabelled(), config(), example)
    with pytest.raises(NetworkError, match=r"what the head reads .*\[16, 4\]; got \[\[16, 36, 4\]\]"):
        pretrain(Everywhere(), unlabelled(), config(), example)


def test_after_a_failure_the_network_has_no_hook() -> None:
    model = network()
    with pytest.raises(TrainingError, match="own title: loss is not finite"):
        pretrain(model, unlabelled(), config(lr=1e30, epochs=3), torch.zeros(1, 3, 8, 8), title="own title")
    assert not model.get_submodule("linear")._forward_pre_hooks


# -- what is learned ---------------------------------------------------------------------------------------------------


def tinted(count: int, seed: int) -> Split:
    """Eight patterns in light of a random colour, which an untrained network sees before it sees the pattern."""
    patterns = F.interpolate(torch.randn(8, 1, 4, 4, generator=seeded(7)), size=8, mode="bilinear")
    generator, labels = seeded(seed), torch.arange(count) % 8
    light = 0.2 + 0.8 * torch.rand(count, 3, 1, 1, generator=generator)
    images = light * (128 + 70 * patterns[labels]) + 30 * torch.randn(count, 3, 8, 8, generator=generator)
    return Split(images.clamp(0, 255).to(torch.uint8), labels, torch.full((3,), 0.4), torch.full((3,), 0.25))


def features(model: nn.Module, split: Split) -> Tensor:
    """[n, D] unit vectors: what the head reads."""
    seen: list[Tensor] = []
    hook = model.get_submodule("linear").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(next(split.batches(len(split)))[0])
    hook.remove()
    return F.normalize(seen[0])


def right_neighbours(model: nn.Module, train: Split, test: Split) -> float:
    """Share of the test images whose nearest training image is of their class."""
    nearest = (features(model, test) @ features(model, train).T).argmax(1)
    return float((train.labels[nearest] == test.labels).float().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_images_of_a_class_come_together(seed: int) -> None:
    """Of one in eight at random; views without their colour tell the network what to look at."""
    train, test, logs = tinted(384, 0), tinted(256, 1), []
    model = network(seed)
    before = right_neighbours(model, train, test)
    settings = config(
        **{"epochs": 10, "lr": 0.2, "batch_size": 32, "projection": 64, "bottleneck": 32},
        **{"min_scale": 0.8, "flip": False, "jitter": 0.6, "grey": 0.5},
    )
    pretrain(model, train, settings, torch.zeros(1, 3, 8, 8), seed=seed, log=logs.append)
    after = right_neighbours(model, train, test)
    assert before < 0.55
    assert after > max(0.7, before + 0.25)
    assert logs[-1]["loss"] < -0.5 < logs[0]["loss"]
    assert all(entry["spread"] > 0.5 for entry in logs)


def test_digits() -> None:
    """One channel of 8 by 8 pixels."""
    data, logs = gmn.load_data("digits"), []
    settings = config(epochs=3, lr=0.1, batch_size=64, projection=64, flip=False)
    pretrain(network(channels=1), data.train, settings, data.example_inputs(), log=logs.append)
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.02
    assert all(entry["spread"] > 0.5 for entry in logs)
