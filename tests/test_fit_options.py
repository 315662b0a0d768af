"""What a training may be asked for beyond the plain loop.

* with everything off a training is the plain loop, bit for bit
* the averaged weights are those of the formula, batch norms' statistics and shared weights included
* distillation is T^2 KL from the teacher, which is read in eval mode and left as it was; it needs one
* mixed images and their targets belong together, follow from (seed, epoch, batch), and leave numpy's generator alone
* the warm-up gives the learning rates it promises; clipping and a regularizer act between backward and step
* a batch in parts leaves the gradient of the whole, and the network sees parts only; parts are equal
* channels last and a compiled forward change nothing but the speed, and leave an ordinary network behind
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_training import dark_and_bright, small_network
from torch import Tensor, nn
from torch.nn import functional as F

from gmn.errors import TrainingError
from gmn.fit_options import cross_entropy, divergence, mixed
from gmn.settings import Fit
from gmn.training import fit, generator, make_optimizer, make_schedule

PLAIN: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 16}


def fitted(seed: int = 0, teacher: nn.Module | None = None, regularize: Any = None, **settings: Any) -> nn.Module:
    network = small_network()
    config = Fit(**{"epochs": 1, "lr": 0.1, "batch_size": 16, **settings})
    fit(network, dark_and_bright(), config, seed=seed, teacher=teacher, regularize=regularize)
    return network


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_off_is_the_plain_loop() -> None:
    network, split = small_network().train(), dark_and_bright()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(2):
        for images, labels in split.batches(16, generator=generator(3, epoch), drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    assert same(network, fitted(seed=3, epochs=2))
    assert same(network, fitted(seed=3, epochs=2, temperature=9.0, teacher=small_network(1)))


class Shared(nn.Module):
    """A batch norm, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.norm(x.flatten(1))).relu()))


def test_averaged_weights_by_hand() -> None:
    def after(steps: int, **more: Any) -> dict[str, Tensor]:
        network = Shared()
        fit(network, dark_and_bright(), Fit(epochs=1, iterations=steps, lr=0.1, batch_size=16, **more))
        return network.state_dict()

    one, two, three = (after(steps) for steps in (1, 2, 3))
    averaged = after(3, ema=0.7)
    for name, value in averaged.items():
        if name == "norm.num_batches_tracked":
            assert value == 3
            continue
        torch.testing.assert_close(value, 0.7 * (0.7 * one[name] + 0.3 * two[name]) + 0.3 * three[name])
    assert not torch.equal(averaged["norm.running_mean"], three["norm.running_mean"])


def test_distillation_by_hand() -> None:
    model, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)) for _ in range(2))
    teacher.append(nn.Dropout(0.5)).train()
    split, start = dark_and_bright(16), model[1].weight.detach().clone()
    images, labels = next(split.batches(16))
    weight = start.clone().requires_grad_()
    logits = images.flatten(1) @ weight.T + model[1].bias.detach()
    said = teacher[1](images.flatten(1)).detach()
    p, q = (torch.exp(x / 2) / torch.exp(x / 2).sum(1, keepdim=True) for x in (said, logits))
    kl = (p * (p.log() - q.log())).sum(1).mean()
    (0.7 * F.cross_entropy(logits, labels) + 0.3 * 2**2 * kl).backward()
    fit(model, split, Fit(epochs=1, distill=0.3, temperature=2.0, **PLAIN), teacher=teacher)
    assert weight.grad is not None
    torch.testing.assert_close(model[1].weight, start - weight.grad, atol=1e-6, rtol=1e-5)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_the_temperature_hardly_changes_the_size_of_the_gradient() -> None:
    said, sizes = torch.tensor([[0.1, -0.2, 0.3]]), []
    for temperature in (1.0, 100.0):
        logits = torch.tensor([[0.2, 0.1, -0.1]], requires_grad=True)
        divergence(logits, said, temperature).backward()
        sizes.append(float(logits.grad.norm()))  # type: ignore[union-attr]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"distillation needs a teacher.*distill: 0"):
        fitted(distill=0.5)


def four_images() -> tuple[Tensor, Tensor]:
    return torch.arange(4 * 64, dtype=torch.float32).view(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


def test_mixup_mixes_images_and_targets_alike() -> None:
    (before, labels), config = four_images(), Fit(epochs=1, lr=1.0, mixup=1.0, batch_size=4)
    ((images, targets),) = mixed([(before.clone(), labels)], config, 3, (0, 0))
    share = float(targets[1, 1])  # of image 1, label 1, mixed with image 2, label 2
    assert 0 < share < 1
    torch.testing.assert_close(targets, share * F.one_hot(labels) + (1 - share) * F.one_hot(labels.flip(0)))
    torch.testing.assert_close(images, share * before + (1 - share) * before.flip(0))


def test_cutmix_counts_the_pixels() -> None:
    (before, labels), config = four_images(), Fit(epochs=1, lr=1.0, cutmix=1.0, batch_size=4)
    ((images, targets),) = mixed([(before.clone(), labels)], config, 3, (0, 1))
    own, other = (images == before).float().mean(), (images == before.flip(0)).float().mean()
    assert 0 < own < 1
    assert own + other == 1
    torch.testing.assert_close(targets[1], torch.tensor([0.0, own, other]))


def test_mixing_follows_from_seed_epoch_and_batch() -> None:
    config = Fit(epochs=1, lr=1.0, mixup=1.0, batch_size=4)

    def shares(seed: int, epoch: int) -> list[float]:
        return [float(targets[1, 1]) for _, targets in mixed([four_images()] * 3, config, 3, (seed, epoch))]

    np.random.seed(7)
    first, expected = shares(0, 0), np.random.RandomState(7).rand()
    assert np.random.rand() == expected
    assert shares(0, 0) == first
    assert len({*first, *shares(0, 1), *shares(1, 0)}) == 9


def test_a_training_with_mixed_images_is_reproducible() -> None:
    assert same(fitted(mixup=0.8), fitted(mixup=0.8))
    assert not same(fitted(mixup=0.8), fitted(mixup=0.8, seed=10**10))
    with pytest.raises(TrainingError, match=r"pair images: expected an even batch; got 15"):
        fit(small_network(), dark_and_bright(15), Fit(epochs=1, lr=0.1, batch_size=16, mixup=0.5))


def test_targets_are_smoothed_and_may_know_fewer_classes_than_the_network() -> None:
    logits, targets = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.3, 0.7], [1, 0]])
    smooth = 0.9 * torch.tensor([[0.3, 0.7, 0, 0], [1, 0, 0, 0]]) + 0.1 / 4
    expected = -(smooth * torch.log_softmax(logits, 1)).sum(1).mean()
    config = Fit(epochs=1, lr=1.0, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, targets, config), expected)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({"epochs": 3, "warmup": 1, "schedule": "cosine"}, 2, [1 / 3, 2 / 3, 1.0, 0.8535534, 0.5, 0.1464466]),
        ({"epochs": 3, "warmup": 1, "milestones": [2]}, 2, [1 / 3, 2 / 3, 1.0, 1.0, 0.1, 0.1]),
        ({"iterations": 5, "warmup": 0.6}, 5, [0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"iterations": 1, "warmup": 0.9, "schedule": "cosine"}, 1, [1.0]),
    ],
)
def test_warmup(settings: dict[str, Any], steps: int, expected: list[float]) -> None:
    config = Fit(**{"epochs": 1, "lr": 1.0, "optimizer": "adamw", **settings})
    optimizer = make_optimizer(small_network(), config)
    schedule, rates = make_schedule(optimizer, config, steps), []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_a_clipped_step_has_the_length_of_the_clip() -> None:
    long, short = (fitted(iterations=1, clip=clip, **PLAIN) for clip in (0.0, 1e-2))
    start = flat(small_network())
    assert float((flat(short) - start).norm()) == pytest.approx(1e-2, rel=1e-3)
    directions = [F.normalize(flat(network) - start, dim=0) for network in (long, short)]
    torch.testing.assert_close(*directions, atol=1e-4, rtol=1e-3)


def test_a_regularizer_acts_between_backward_and_step() -> None:
    network, calls = small_network(), []

    def erase() -> None:
        calls.append(all(bool((p.grad != 0).any()) for p in network[4].parameters()))  # type: ignore[index]
        for p in network.parameters():
            p.grad = None

    start = flat(network)
    fit(network, dark_and_bright(), Fit(epochs=2, **PLAIN), regularize=erase)
    assert calls == [True] * 8
    assert torch.equal(flat(network), start)


def test_channels_last_leaves_an_ordinary_network() -> None:
    def trained(channels_last: bool) -> nn.Sequential:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        network[2].register_forward_pre_hook(
            lambda module, inputs: seen.append(module.weight.is_contiguous() or inputs[0].is_contiguous())
        )
        fit(network, dark_and_bright(), Fit(epochs=1, lr=0.1, batch_size=16, channels_last=channels_last))
        return network

    seen: list[bool] = []
    fast, plain = trained(True), trained(False)
    assert seen == [False] * 4 + [True] * 4
    assert all(value.is_contiguous() for value in fast.state_dict().values())
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), atol=1e-5, rtol=1e-4)


def test_a_compiled_forward_trains_the_network_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend=backend))
    for width in range(2, 12):  # more networks than one forward may have versions of
        network, plain = (
            nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 2)) for _ in range(2)
        )
        plain.load_state_dict(network.state_dict())
        fit(plain, dark_and_bright(16), Fit(epochs=2, **PLAIN))
        fit(network, dark_and_bright(16), Fit(epochs=2, compile=True, **PLAIN))
        torch.testing.assert_close(network.state_dict(), plain.state_dict())
    assert len(graphs) == 10


def test_all_at_once_is_reproducible() -> None:
    settings: dict[str, Any] = {
        **{"epochs": 2, "optimizer": "adamw", "schedule": "cosine", "lr": 1e-2, "warmup": 0.5, "label_smoothing": 0.1},
        **{"mixup": 0.2, "cutmix": 0.5, "ema": 0.5, "distill": 0.5, "clip": 1.0, "channels_last": True, "bf16": True},
    }
    first, second = (fitted(teacher=small_network(1), **settings) for _ in range(2))
    assert same(first, second)
    assert all(bool(torch.isfinite(value).all()) for value in first.state_dict().values())


def test_a_batch_in_parts() -> None:
    seen: list[int] = []

    def trained(accumulate: int) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        settings = Fit(epochs=2, lr=0.1, batch_size=16, label_smoothing=0.1, clip=1.0, accumulate=accumulate)
        fit(network, dark_and_bright(), settings)
        return network

    whole, count = trained(1), len(seen)
    torch.testing.assert_close(flat(trained(4)), flat(whole))
    assert seen == [16] * count + [4] * 4 * count
    with pytest.raises(ValueError, match="must be a multiple of accumulate"):
        Fit(epochs=1, lr=0.1, batch_size=16, accumulate=3)
