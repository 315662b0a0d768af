"""What several test files share: a recipe small enough for a test, and a way to call the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gmn.recipe import load_recipe
from gmn.settings import Recipe
from gmn.settings_vote import VoteRecipe

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


def quickstart(*overrides: str) -> Recipe:
    """The quickstart's recipe, changed."""
    loaded = load_recipe("quickstart", overrides)
    assert isinstance(loaded, Recipe)
    return loaded


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The quickstart, shortened to seconds."""
    return quickstart(*TINY)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `gmn ARGS` as a user does, in its own process."""

    def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "gmn", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )

    return call


VOTE_TINY = [
    *("data.limit=300", "network.options={width: 8, shortcut: B}"),
    *("pretrain.fit={epochs: 8, lr: 0.1, batch_size: 32}", "ratio=0.5"),
    *("zoo.tasks=12", "zoo.targets=2", "zoo.classes=[3]"),
    "zoo.filters={iterations: 8, interval: 8, final_iterations: 2, lr: 0.02, batch_size: 16, score_images: 40}",
    f"similarity.parents={json.dumps({str(digit): 'digit' for digit in range(10)})}",
    *("similarity.images=60", "vote.fit={iterations: 10, lr: 0.02, schedule: cosine, batch_size: 16}"),
    *("reptile={rounds: 2, iterations: 2, batch_size: 16}", "report.seeds=2", "report.long=2"),
]


@pytest.fixture(scope="session")
def tiny_vote_recipe() -> VoteRecipe:
    """The other built-in recipe, shortened to seconds: zoo, vote and all baselines."""
    recipe = load_recipe("graph-mask-voting", VOTE_TINY)
    assert isinstance(recipe, VoteRecipe)
    return recipe


@pytest.fixture(scope="session")
def vote_run(tiny_vote_recipe: VoteRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of that recipe and its report; copy the folder before changing it."""
    from gmn import pipeline

    folder = tmp_path_factory.mktemp("runs") / "votes"
    return folder, pipeline.meta_train(tiny_vote_recipe, folder)
