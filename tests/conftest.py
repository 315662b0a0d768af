"""What several test files share: a recipe small enough for a test, and a way to call the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gmn.recipe import load_recipe
from gmn.settings import Recipe

TINY = [
    *("data.limit=200", "network.options={width: 4, shortcut: B}"),
    *("data_models.train=1", "data_models.val=1", "data_models.fit={epochs: 2, lr: 0.1, batch_size: 32}"),
    *("data_models.initial_speed_up=1.2", "data_models.initial_fit={epochs: 1, lr: 0.01, batch_size: 32}"),
    *("metanetwork.layers=1", "metanetwork.hidden=4"),
    *("meta_train.epochs=2", "meta_train.steps_per_epoch=2", "meta_train.batch_size=16", "meta_train.batches=2"),
    *("meta_train.milestones=[]", "prune.speed_up=1.8", "prune.recalibrate=50", "prune.steps=200"),
    *("finetune.after_meta={epochs: 1, lr: 0.01, batch_size: 32}",),
    *("finetune.after_prune={epochs: 1, lr: 0.01, batch_size: 32}", "report.latency_batch=2", "report.seeds=1"),
]


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The quickstart, shortened to seconds."""
    return load_recipe("quickstart", TINY)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `gmn ARGS` as a user does, in its own process."""

    def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "gmn", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )

    return call
