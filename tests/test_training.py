"""The training loop.

* fitting separates what can be separated, and is the same for the same seed
* milestones and cosine give the learning rates they promise, also after a resume
* a loss that is not finite stops the run with one clear error
* recalibration gives batch norms the statistics of the images
* evaluation restores the mode of the network
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gmn.data import Augment, Split
from gmn.errors import TrainingError
from gmn.settings import Fit
from gmn.training import evaluate, fit, generator, make_optimizer, make_schedule, recalibrate


def dark_and_bright(count: int = 64) -> Split:
    """Class 1 is brighter than class 0."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 40, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return Split((noise + 100 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, torch.zeros(1), torch.ones(1))


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def test_fit_learns_and_is_deterministic() -> None:
    split, config = dark_and_bright(), Fit(epochs=5, lr=0.1, batch_size=16)
    first, second = small_network(), small_network()
    before = evaluate(first, split).loss
    history: list[dict[str, float]] = []
    fit(first, split, config, seed=3, log=history.append)
    fit(second, split, config, seed=3)
    assert evaluate(first, split).accuracy == 1.0
    assert evaluate(first, split).loss < before / 2
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_another_seed_sees_other_batches() -> None:
    split, config = dark_and_bright(), Fit(epochs=1, lr=0.1, batch_size=16)
    first, second = small_network(), small_network()
    fit(first, split, config, seed=1)
    fit(second, split, config, seed=2)
    assert not torch.equal(first[0].weight, second[0].weight)  # type: ignore[index]


def test_images_per_epoch_shortens_an_epoch() -> None:
    seen: list[int] = []
    network = small_network()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    fit(network, dark_and_bright(), Fit(epochs=2, lr=0.1, batch_size=8, images_per_epoch=24))
    assert seen == [8] * 6


@pytest.mark.parametrize("done", [0, 3])
def test_milestones(done: int) -> None:
    config = Fit(epochs=3, lr=1.0, milestones=[1, 2])
    optimizer = make_optimizer(small_network(), config)
    schedule = make_schedule(optimizer, config, steps=2, done=done)
    rates = []
    for _ in range(done, 6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01][done:])


def test_cosine_ends_at_zero() -> None:
    config = Fit(epochs=2, lr=1.0, schedule="cosine")
    optimizer = make_optimizer(small_network(), config)
    schedule = make_schedule(optimizer, config, steps=2)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(4):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    network = small_network()
    with torch.no_grad():
        network[4].bias.fill_(float("nan"))  # type: ignore[index, union-attr]
    with pytest.raises(TrainingError, match=r"my training: loss is not finite.*epoch 1.*lower the learning rate"):
        fit(network, dark_and_bright(), Fit(epochs=1, lr=0.1, batch_size=8), title="my training")


def test_recalibration_computes_the_statistics_anew() -> None:
    split, network = dark_and_bright(), small_network().eval()
    recalibrate(network, split, len(split))
    features = network[0](next(split.batches(len(split)))[0])  # type: ignore[index]
    assert torch.allclose(network[1].running_mean, features.mean((0, 2, 3)), atol=1e-5)  # type: ignore[index, union-attr]
    assert not network.training


def test_recalibration_sees_what_training_sees() -> None:
    split, network = dark_and_bright(), small_network().eval()
    recalibrate(network, split, len(split), seed=3, augment=Augment(crop=2))
    images = next(split.batches(len(split), generator=generator(3, 0), augment=Augment(crop=2)))[0]
    assert torch.allclose(network[1].running_mean, network[0](images).mean((0, 2, 3)), atol=1e-5)  # type: ignore[index, union-attr, operator]
    whole = network[0](next(split.batches(len(split)))[0]).mean((0, 2, 3))  # type: ignore[index, operator]
    assert not torch.allclose(network[1].running_mean, whole, atol=1e-3)  # type: ignore[index, union-attr]


def test_evaluation_restores_the_mode() -> None:
    network = small_network().train()
    next(network.children()).eval()
    modes = [module.training for module in network.modules()]
    evaluate(network, dark_and_bright())
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize(("images", "read"), [(250, 250), (499, 498), (700, 699), (10_000, 600)])
def test_recalibration_reads_the_images_it_is_given(images: int, read: int) -> None:
    class Counting(nn.BatchNorm1d):
        seen = 0

        def forward(self, input: Tensor) -> Tensor:
            Counting.seen += len(input)
            return super().forward(input)

    split = dark_and_bright(700 if images == 700 else 600)
    recalibrate(nn.Sequential(nn.Flatten(), Counting(16)), split, images)
    assert Counting.seen == read


def test_recalibration_is_deterministic_and_drops_a_single_last_image() -> None:
    torch.manual_seed(0)
    body = [nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)]
    network = nn.Sequential(*body)
    split = dark_and_bright(251)
    means = []
    for _ in range(2):
        recalibrate(network, split, 251, seed=4)
        means.append(network[3].running_mean.clone())  # type: ignore[operator, union-attr]
    assert torch.equal(*means)


def test_a_limited_evaluation_takes_images_from_everywhere() -> None:
    split = dark_and_bright()
    by_class = split.subset(split.labels.argsort())  # as in folders of images
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.copy_(torch.tensor([1.0, 0.0]))  # always says class 0
    assert evaluate(network, by_class, limit=32).accuracy == 0.5


def test_iterations_count_steps_over_as_many_passes_as_that_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass is that of a training by epochs with the same seed; 7 steps of 4 are one pass of 5 and 2 more."""
    seen: list[list[int]] = []

    def note(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[-1] += inputs[0].flatten(1).sum(1).tolist()

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model.register_forward_pre_hook(note)
    split = Split(
        torch.arange(240).view(20, 3, 2, 2).to(torch.uint8), torch.arange(20) % 2, torch.zeros(3), torch.ones(3)
    )
    for config in (Fit(epochs=1, iterations=7, lr=0.1, batch_size=4), Fit(epochs=2, lr=0.1, batch_size=4)):
        seen.append([])
        fit(model, split, config, seed=3)
    assert [len(images) for images in seen] == [28, 40]
    assert seen[0] == seen[1][:28]
    with pytest.raises(ValueError, match="in place of epochs"):
        Fit(iterations=7, epochs=2, lr=0.1)
