"""Contract of `gmn.reptile`.

* A round moves theta a part of the way to what a task made of it: parameters and statistics, but not the head.
* A round starts from the cut network: silent units are heard by nobody, the new head included.
* Silent units can come back: they stay as they were made, and what reads them learns again.
* The strongest units of every layer stay, as many as the ratio leaves, whatever the pre-trained head thinks of them.
* The backbone is not changed; the same seed gives the same network, another one another.
* It is a better start for a new task than a random part of the same size.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import gmn.reptile
from gmn.backbone import Backbone
from gmn.costs import training_flops
from gmn.data import Data, load_data
from gmn.errors import DataError, PruningError
from gmn.networks import build_network
from gmn.reptile import reptile
from gmn.settings import Fit
from gmn.settings_vote import Reptile
from gmn.surgery import remove
from gmn.tasks import sample_tasks, task_data, with_head
from gmn.training import evaluate, fit
from gmn.vote import vote
from gmn.zoo import Task

SHORT = Reptile(rounds=3, iterations=3, batch_size=16)
Start = dict[str, Tensor]


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"shortcut": "B"})


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def backbone(digits: Data) -> Backbone:
    model = resnet(0)
    fit(model, digits.train, Fit(epochs=3, lr=0.1, batch_size=64), seed=0)
    return Backbone.of(model, digits.example_inputs())


@pytest.fixture(scope="module")
def tasks(digits: Data) -> list[Task]:
    return sample_tasks(digits.class_names, [2, 3], 4, 0, seed=0)


def instead_of_fit(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module, int], None]) -> list[nn.Module]:
    """Let `change(network, round)` stand for the training on a task; the networks that the rounds started from."""
    starts: list[nn.Module] = []

    def train(model: nn.Module, *_: object, log: Callable[[dict[str, float]], None], **__: object) -> None:
        starts.append(copy.deepcopy(model))
        with torch.no_grad():
            change(model, len(starts))
        log({"loss": 0.0})

    monkeypatch.setattr(gmn.reptile, "fit", train)
    return starts


def add(model: nn.Module, _: int) -> None:
    for parameter in model.parameters():
        parameter += 1
    for buffer in model.buffers():
        buffer += 2


def left_as_it_was(_: nn.Module, __: int) -> None:
    pass


def filters(backbone: Backbone, layer: str) -> slice:
    return next(slice(g.start, g.start + g.size) for g in backbone.spec.groups if g.name == layer)


def test_a_round_against_hand_arithmetic(
    backbone: Backbone, digits: Data, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_fit(monkeypatch, add)
    config = SHORT.model_copy(update={"rounds": 1, "step": 0.25})
    whole = reptile(backbone, digits, tasks, config, ratio=0.0).model.state_dict()
    for name, before in backbone.model.state_dict().items():
        moved = 2 if name.endswith("num_batches_tracked") else 0.5 if "running" in name else 0.25
        torch.testing.assert_close(whole[name], before if name.startswith("linear.") else before + moved)


def test_a_whole_step_and_a_whole_network_are_plain_training(
    backbone: Backbone, digits: Data, tasks: list[Task]
) -> None:
    config = Reptile(rounds=1, iterations=4, step=1.0, lr=0.02, batch_size=16)
    found = reptile(backbone, digits, tasks[:1], config, ratio=1e-6, seed=2)
    seed = 2 * 10007
    plain = with_head(backbone.model, backbone.head, len(tasks[0].classes), seed=seed)
    steps = Fit(epochs=1, iterations=4, lr=0.02, batch_size=16)
    fit(plain, task_data(digits, tasks[0].classes).train, steps, seed=seed)
    state = found.model.state_dict()
    assert bool(found.keep.keep.all())
    assert not torch.equal(state["conv1.weight"], backbone.model.state_dict()["conv1.weight"])
    assert all(torch.equal(state[n], value) for n, value in plain.state_dict().items() if not n.startswith("linear."))
    assert torch.equal(state["linear.weight"], backbone.model.state_dict()["linear.weight"])


@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_every_layer_ends_at_its_ratio(ratio: float, backbone: Backbone, digits: Data, tasks: list[Task]) -> None:
    before, training = copy.deepcopy(backbone.model.state_dict()), backbone.model.training
    entries: list[dict[str, float]] = []
    found = reptile(backbone, digits, tasks, SHORT, ratio=ratio, log=entries.append)
    coupled = backbone.coupled
    found.keep.validate(backbone.spec, coupled)
    kept = torch.bincount(coupled.group[found.keep.keep[coupled.first_nodes]])
    sizes = torch.bincount(coupled.group)
    prunable = torch.isin(torch.arange(len(sizes)), coupled.group[coupled.prunable])
    torch.testing.assert_close(kept, torch.where(prunable, ((1 - ratio) * sizes).round().long(), sizes))
    assert [entry["epoch"] for entry in entries] == [1, 2, 3]
    assert all(entry["loss"] > 0 and 0 <= entry["accuracy"] <= 1 for entry in entries)
    assert found.training_flops == training_flops(backbone.model, backbone.example, 3 * 3 * 16)
    assert backbone.model.training == training
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())


def test_the_strongest_stay(
    backbone: Backbone, digits: Data, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strengthen(model: nn.Module, _: int) -> None:
        model.get_submodule("layer2.0.conv1").weight[torch.tensor([3, 7, 8, 30])] *= 50

    instead_of_fit(monkeypatch, strengthen)
    config = SHORT.model_copy(update={"rounds": 1})
    keep = reptile(backbone, digits, tasks, config, ratio=0.875).keep.keep
    assert keep[filters(backbone, "layer2.0.conv1")].nonzero().flatten().tolist() == [3, 7, 8, 30]


def test_the_pre_trained_head_has_no_say(
    backbone: Backbone, digits: Data, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_fit(monkeypatch, left_as_it_was)
    loud = dataclasses.replace(backbone, model=copy.deepcopy(backbone.model))
    with torch.no_grad():
        loud.model.get_submodule("linear").weight[:, ::2] *= 1000
    keeps = [reptile(start, digits, tasks, SHORT, ratio=0.5).keep.keep for start in (backbone, loud)]
    assert torch.equal(*keeps)


def test_a_round_starts_from_the_cut_network(
    backbone: Backbone, digits: Data, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = instead_of_fit(monkeypatch, left_as_it_was)
    found = reptile(backbone, digits, tasks[1:2], SHORT, ratio=0.5)
    heard = found.keep.keep[filters(backbone, "layer3.0.conv2")]
    cut = with_head(found.model, backbone.head, 3, seed=0)
    with torch.no_grad():
        head = starts[1].get_submodule("linear")
        cut.get_submodule("linear").weight.copy_(head.weight[:, heard])
        cut.get_submodule("linear").bias.copy_(head.bias)
    images = next(digits.test.batches(50))[0]
    with torch.no_grad():
        torch.testing.assert_close(starts[1].eval()(images), cut.eval()(images), atol=1e-5, rtol=1e-4)
    whole, made = starts[0].state_dict(), starts[1].state_dict()
    assert not torch.equal(made["layer2.0.conv2.weight"], whole["layer2.0.conv2.weight"])
    assert torch.equal(made["conv1.weight"], whole["conv1.weight"])
    assert all(torch.equal(value, whole[name]) for name, value in made.items() if "bn" in name)


def test_what_reads_a_silent_unit_learns_again(
    backbone: Backbone, digits: Data, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Start] = []
    real = fit

    def train(model: nn.Module, *options: object, **more: object) -> None:
        before = copy.deepcopy(model.state_dict())
        real(model, *options, **more)  # type: ignore[arg-type]
        ends.append(
            {name: value - before[name] for name, value in model.state_dict().items() if before[name].dim() == 4}
        )
        ends[-1]["zeros"] = before["layer3.0.conv2.weight"].abs().amax((0, 2, 3)) == 0

    monkeypatch.setattr(gmn.reptile, "fit", train)
    reptile(backbone, digits, tasks, SHORT.model_copy(update={"rounds": 2}), ratio=0.5)
    silent = ends[1].pop("zeros")
    assert int(silent.sum()) == 32
    learnt = ends[1]["layer3.0.conv2.weight"].abs().amax((0, 2, 3))
    assert int((learnt[silent] > 0).sum()) > 24  # a few never fire
    assert learnt[silent].max() < 10 * learnt[~silent].max()  # and not by leaps


def test_silent_units_come_back(
    backbone: Backbone, digits: Data, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round makes one unit weak, the second one strong."""

    def change(model: nn.Module, number: int) -> None:
        model.get_submodule("layer1.0.conv1").weight[5] *= 1e-3 if number == 1 else 1e6

    def run(rounds: int) -> tuple[Tensor, list[float]]:
        instead_of_fit(monkeypatch, change)
        entries: list[dict[str, float]] = []
        config = SHORT.model_copy(update={"rounds": rounds, "step": 1.0})
        found = reptile(backbone, digits, tasks, config, ratio=0.5, log=entries.append)
        return found.keep.keep[filters(backbone, "layer1.0.conv1")], [entry["returned"] for entry in entries]

    (once, none), (twice, returned) = run(1), run(2)
    assert (bool(once[5]), bool(twice[5])) == (False, True)
    assert int((once & ~twice).sum()) == 1
    assert (none, returned) == ([0], [0, 1])


def test_every_task_has_its_turn(
    backbone: Backbone, digits: Data, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = instead_of_fit(monkeypatch, left_as_it_was)
    reptile(backbone, digits, tasks, SHORT.model_copy(update={"rounds": 12}), ratio=0.5)
    sizes = [len(start.get_submodule("linear").weight) for start in starts]
    assert min(sizes.count(2), sizes.count(3)) > 2
    heads = {start.get_submodule("linear").bias[0].item() for start in starts}
    assert len(heads) == 12


def test_it_is_decided_by_its_seed(backbone: Backbone, digits: Data, tasks: list[Task]) -> None:
    run = partial(reptile, backbone, digits, tasks, SHORT, ratio=0.5)
    found, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert torch.equal(found.keep.keep, again.keep.keep)
    states = [r.model.state_dict() for r in (found, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["bn1.running_mean"], states[2]["bn1.running_mean"][: len(states[0]["bn1.bias"])])


def test_it_is_a_better_start_than_a_random_part(backbone: Backbone, digits: Data) -> None:
    planned = sample_tasks(digits.class_names, [3], 6, 3, seed=0)
    config = Reptile(rounds=12, iterations=8, lr=0.02, batch_size=32)
    found = reptile(backbone, digits, planned[:6], config, ratio=0.5)
    everything = torch.ones(1, backbone.spec.num_nodes, dtype=torch.bool)
    mask = vote(everything, backbone.coupled, ratio=0.5, generator=torch.Generator().manual_seed(0))
    assert int(mask.keep.sum()) == int(found.keep.keep.sum())

    def accuracy(model: nn.Module, task: Task) -> float:
        own = task_data(digits, task.classes)
        tuned = with_head(model, backbone.head, 3, seed=0)
        fit(tuned, own.train, Fit(epochs=1, iterations=5, lr=0.01, batch_size=32), seed=0)
        return evaluate(tuned, own.val).accuracy

    def mean(model: nn.Module) -> float:
        return sum(accuracy(model, task) for task in planned[6:]) / 3

    cut = partial(remove, spec=backbone.spec, mask=mask, example_inputs=backbone.example, coupled=backbone.coupled)
    assert mean(found.model) > max(mean(cut(resnet(1))), mean(cut(backbone.model))) + 0.15


def test_no_tasks_and_unknown_classes(backbone: Backbone, digits: Data) -> None:
    with pytest.raises(DataError, match="no tasks to learn from: expected one at least; got 0; plan tasks"):
        reptile(backbone, digits, [], SHORT, ratio=0.5)
    with pytest.raises(DataError, match="no such class"):
        reptile(backbone, digits, [Task("t", (3, 99), ("3", "99"))], SHORT, ratio=0.5)


def test_a_network_of_which_nothing_may_go(digits: Data, tasks: list[Task]) -> None:
    linear = Backbone.of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits.example_inputs())
    with pytest.raises(PruningError, match="nothing can be pruned: all channels must stay"):
        reptile(linear, digits, tasks, SHORT, ratio=0.5)


def test_the_result_has_the_backbones_head(backbone: Backbone, digits: Data, tasks: list[Task]) -> None:
    found = reptile(backbone, digits, tasks, SHORT, ratio=0.5)
    heard = found.keep.keep[filters(backbone, "layer3.0.conv2")]
    head = found.model.state_dict()["linear.weight"]
    assert torch.equal(head, backbone.model.state_dict()["linear.weight"][:, heard])
