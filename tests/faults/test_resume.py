"""Trainings that go on in their middle.

* Stopped after any step, a training ends with the weights, the averages and the log of one that was not stopped, with
  dropout, mixed images, averaged weights, warm-up and momentum; also when the newest file is damaged, or all are.
* So does self-supervised training.
* Two files are kept; a short training leaves none; seconds before the stop count.
* Files of before the epoch that a run starts with are not used; those of another training are refused, not taken.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import dark_and_bright
from torch import Tensor, nn

import gmn
from gmn import stages
from gmn.bookmark import Bookmark, Place
from gmn.checkpoint import load_tensors, save_tensors
from gmn.errors import CheckpointError
from gmn.settings import Fit
from gmn.settings_vote import SimSiam
from gmn.simsiam import pretrain
from gmn.training import fit

CONFIGS = {
    "sgd": Fit(epochs=3, lr=0.05, batch_size=16, schedule="cosine", warmup=0.5, ema=0.9, mixup=0.4, clip=1.0),
    "adamw": Fit(epochs=3, lr=0.01, batch_size=16, optimizer="adamw", milestones=[1], label_smoothing=0.1),
}
STEPS = 4  # in an epoch


class Stop(Exception):
    """What ends a training in its middle."""


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


def train(config: Fit, bookmark: Bookmark | None, *, stop: int | None = None) -> tuple[dict[str, Tensor], list[Any]]:
    """The state and the log of a training, which may end in an error before its step `stop` is taken, from 0."""
    model, log, taken = network(), [], 0

    def note() -> None:
        nonlocal taken
        if taken == stop:
            raise Stop
        taken += 1

    fit(model, dark_and_bright(), config, seed=3, log=log.append, regularize=note, bookmark=bookmark)
    return model.state_dict(), log


def stopped(config: Fit, folder: Path, stop: int) -> None:
    with pytest.raises(Stop):
        train(config, Bookmark(folder / "x", 1e-9), stop=stop)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_stopped_training_goes_on(tmp_path: Path, name: str, stop: int) -> None:
    config = CONFIGS[name]
    state, log = train(config, None)
    stopped(config, tmp_path, stop)
    assert len(list(tmp_path.iterdir())) == min(2, stop)
    again, rest = train(config, Bookmark(tmp_path / "x", 60.0), stop=3 * STEPS - stop)  # so many steps are left
    assert same(state, again)
    assert rest == log[max(0, stop - 1) // STEPS :]  # an epoch that was all but logged is logged


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_files(tmp_path: Path, damaged: int, capfd: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS["sgd"]
    stopped(config, tmp_path, 6)
    for path in sorted(tmp_path.iterdir())[-damaged:]:
        os.truncate(path, 2000)
    again, _ = train(config, Bookmark(tmp_path / "x", 60.0))
    assert same(train(config, None)[0], again)
    said = capfd.readouterr().err
    assert said.count("warning: cannot read the file") == damaged
    assert ("goes on in epoch 2, after 1 steps" in said) == (damaged == 1)


def test_a_short_training_leaves_no_file(tmp_path: Path) -> None:
    train(CONFIGS["sgd"], Bookmark(tmp_path / "x", 60.0))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    """What it is part of may have been killed after it."""
    config = CONFIGS["sgd"]
    state, log = train(config, Bookmark(tmp_path / "x", 1e-9))
    again, rest = train(config, Bookmark(tmp_path / "x", 1e-9), stop=0)
    assert same(state, again)
    assert rest == log[-1:]


def test_seconds_before_the_stop_count(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    model, bookmark = nn.Linear(2, 2), Bookmark(tmp_path / "x", 1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bookmark.save(Place(0, STEPS, seconds=[500.0]), {"model": model}, optimizer)
    with stages.stage(lambda event, **values: lines.append(values), "learning"):
        place, _ = bookmark.restore({"model": copy.deepcopy(model)}, optimizer, 0, 1, STEPS)
        stages.spend(place.since(0))
    assert 500 <= lines[0]["seconds"] < 501


class Stopping(Bookmark):
    """Ends the training when it has kept it so often."""

    left = 3

    def save(self, *state: Any) -> None:
        super().save(*state)
        self.left -= 1
        if not self.left:
            raise Stop


def test_self_supervised_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In its second epoch of two steps each."""
    split, options = gmn.load_data("digits", limit=64).train, {"width": 4, "shortcut": "B"}
    config = SimSiam(epochs=2, batch_size=len(split) // 2, projection=16, bottleneck=8)

    def train(bookmark: Bookmark | None) -> tuple[dict[str, Tensor], list[Any]]:
        torch.manual_seed(0)
        model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options=options)
        log: list[Any] = []
        pretrain(model, split, config, torch.zeros(2, 1, 8, 8), seed=3, log=log.append, bookmark=bookmark)
        return model.state_dict(), log

    state, log = train(None)
    with pytest.raises(Stop):
        train(Stopping(tmp_path / "x", 1e-9))
    again, rest = train(Bookmark(tmp_path / "x", 60.0))
    assert "SimSiam goes on in epoch 2, after 1 steps" in capfd.readouterr().err
    assert same(state, again)
    assert rest == log[1:]


def test_files_of_earlier_epochs_are_not_used(tmp_path: Path) -> None:
    model, bookmark = nn.Linear(2, 2), Bookmark(tmp_path / "x", 1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bookmark.save(Place(1, 3, seconds=[1.0, 1.0]), {"model": model}, optimizer)
    assert bookmark.restore({"model": model}, optimizer, 2, 3, STEPS)[0] == Place(2)
    assert bookmark.restore({"model": model}, optimizer, 1, 3, STEPS)[0].step == 3


def other_kind(name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Make the state of a training one that this training cannot have."""
    changes: dict[str, Any] = {
        "epoch": lambda: meta.update(epoch=3),
        "step": lambda: meta.update(step=STEPS + 1),
        "seconds": lambda: meta.update(seconds=[]),
        "sums": lambda: meta.update(sums={"event": 1.0}),
        "type": lambda: meta.update(skipped="2"),
        "field": lambda: meta.update(more=1),
        "weights": lambda: tensors.update({"model.5.weight": torch.zeros(3, 16)}),
        "lost": lambda: tensors.pop("model.5.bias"),
        "moments": lambda: tensors.update({"optimizer.0.exp_avg": torch.zeros(1)}),
        "another optimizer": lambda: tensors.pop("optimizer.0.exp_avg"),
        "count": lambda: tensors.update({"optimizer.0.step": torch.tensor(-1.0)}),
        "parameter": lambda: tensors.update({"optimizer.77.step": torch.tensor(1.0)}),
        "random numbers": lambda: tensors.update({"random.cpu": torch.zeros(3)}),
    }
    changes[name]()


KINDS = ["epoch", "step", "seconds", "sums", "type", "field", "weights", "lost", "moments", "another optimizer"]


@pytest.mark.parametrize("name", [*KINDS, "count", "parameter", "random numbers"])
def test_a_state_of_another_training_is_refused(tmp_path: Path, name: str) -> None:
    stopped(CONFIGS["adamw"], tmp_path, 6)
    newest = max(tmp_path.iterdir())
    tensors, meta = load_tensors(newest)
    other_kind(name, tensors, meta)
    save_tensors(newest, tensors, meta)
    with pytest.raises(CheckpointError, match=rf"not of this training.*{newest.name}; delete .*, and it begins anew"):
        train(CONFIGS["adamw"], Bookmark(tmp_path / "x", 60.0))
