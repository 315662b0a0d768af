"""A finished run without any training, and a way to call the command in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import randomise

import gmn
from gmn.checkpoint import save_json

CNN = {"name": "cifar.resnet8", "num_classes": 4, "in_channels": 3, "options": {"width": 4, "shortcut": "B"}}


def built(network: dict[str, Any], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(gmn.build_network(**network), seed)


def make_run(folder: Path) -> Path:
    """Two rows; the second seed of `direct` is the best on validation images."""
    results = []
    for row, seed, accuracy in (("metanetwork", 0, 0.7), ("direct", 0, 0.6), ("direct", 1, 0.8)):
        facts = {"row": row, "seed": seed, "validation_accuracy": accuracy}
        model = built(CNN, len(results))
        gmn.save_model(folder / "models" / f"{row}-seed{seed}", model, CNN, **facts, input_shape=(3, 16, 16))
        results.append(facts)
    gmn.save_model(folder / "models" / "base", built(CNN, 3), CNN, input_shape=(3, 16, 16))
    (folder / "recipe.yaml").write_text("name: made-up\n")
    save_json(folder / "report.json", {"results": results})
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `gmn ARGS`."""
    from gmn.cli import main

    monkeypatch.setattr("sys.argv", ["gmn", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
