"""The command line.

* help has examples; commands print results to stdout and progress to stderr
* a user's mistake is one line on stderr and exit code 2, without a traceback and without a run folder;
  with --debug the traceback shows
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("name", ["meta-train", "prune", "report"])
def test_help_has_an_example(command: Command, tmp_path: Path, name: str) -> None:
    result = command(name, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert f"gmn {name}" in result.stdout
    assert "Example" in result.stdout


def test_the_shortened_quickstart(command: Command, tmp_path: Path) -> None:
    overrides = [part for override in TINY for part in ("--set", override)]
    result = command("meta-train", "quickstart", *overrides, "--set", "report.baselines=[direct]", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "metanetwork" in result.stdout
    assert "direct" in result.stdout
    assert "validation accuracy" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr  # no colours or bars in pipes
    for plot in ("curve", "accuracy", "meta-training"):
        assert (tmp_path / "runs" / "quickstart" / "plots" / f"{plot}.png").stat().st_size > 5000
    again = command("report", "runs/quickstart", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout == result.stdout


def wrong(command: Command, cwd: Path, *arguments: str) -> str:
    """The one line that a wrong call prints."""
    result = command(*arguments, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("gmn: ")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes_in_the_call(command: Command, tmp_path: Path) -> None:
    assert "'quickstart'" in wrong(command, tmp_path, "meta-train", "quickstrat")
    assert "'epochs'" in wrong(command, tmp_path, "meta-train", "quickstart", "--set", "meta_train.epoch=3")
    assert "no metanetwork here" in wrong(command, tmp_path, "prune", "quickstart", "--meta", "nowhere")
    assert "not a run folder" in wrong(command, tmp_path, "report", "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_file(command: Command, tmp_path: Path) -> None:
    overrides = ["--set", "data.name=parquet", "--set", "data.train=no.parquet", "--set", "data.test=no.parquet"]
    assert "no.parquet" in wrong(command, tmp_path, "meta-train", "quickstart", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_speed_up_out_of_reach(command: Command, tmp_path: Path) -> None:
    overrides = [part for override in [*TINY, "prune.speed_up=500"] for part in ("--set", override)]
    line = wrong(command, tmp_path, "meta-train", "quickstart", *overrides)
    assert "out of reach" in line
    assert "max_ratio" in line
    assert list(tmp_path.iterdir()) == []  # found out before anything was trained


def test_weights_with_nan(command: Command, tmp_path: Path) -> None:
    import gmn

    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 4, "shortcut": "B"})
    state = model.state_dict()
    state["layer1.0.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "bad.pt")
    overrides = [part for override in [*TINY, "network.weights=bad.pt"] for part in ("--set", override)]
    line = wrong(command, tmp_path, "meta-train", "quickstart", *overrides)
    assert "not finite" in line
    assert "layer1.0.conv1.weight" in line


def test_debug_shows_the_traceback(command: Command, tmp_path: Path) -> None:
    result = command("--debug", "report", "nowhere", cwd=tmp_path)
    assert result.returncode != 0
    assert "Traceback" in result.stderr
