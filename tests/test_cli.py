"""The command line.

* help has examples; commands print results to stdout and progress to stderr
* a user's mistake is one line on stderr and exit code 2, without a traceback and without a run folder;
  with --debug the traceback shows
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import TINY

Command = Callable[..., subprocess.CompletedProcess[str]]
Here = Callable[..., tuple[int, str, str]]


def test_the_command_answers(command: Command, tmp_path: Path) -> None:
    result = command("meta-train", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "Example" in result.stdout
    assert "'quickstart'" in wrong(command, tmp_path, "meta-train", "quickstrat")
    assert list(tmp_path.iterdir()) == []


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


def test_debug_shows_the_traceback(command: Command, tmp_path: Path) -> None:
    result = command("--debug", "report", "nowhere", cwd=tmp_path)
    assert result.returncode != 0
    assert "Traceback" in result.stderr


# -- many short calls, so in this process ------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    """Call `gmn ARGS` in an empty folder: exit code, stdout, stderr."""
    from gmn.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gmn", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def mistake(here: Here, *arguments: str) -> str:
    """The one line that a wrong call prints."""
    code, out, err = here(*arguments)
    assert (code, out) == (2, "")
    # a busy machine takes a second for what takes none, and progress says so
    lines = [line for line in err.splitlines() if not re.search(r": \d+\.\d s(,|$)", line)]
    assert len(lines) == 1
    assert lines[0].startswith("gmn: ")
    return lines[0]


@pytest.mark.parametrize("name", ["meta-train", "prune", "report", "cost", "inspect", "convert", "export"])
def test_help_has_an_example(here: Here, name: str) -> None:
    code, out, _ = here(name, "--help")
    assert code == 0
    assert f"gmn {name}" in out
    assert "Example" in out


def test_help_says_that_curves_are_not_fine_tuned(here: Here) -> None:
    said = " ".join(here("curve", "--help")[1].split())
    assert "By default nothing is fine-tuned" in said
    assert "--finetune-images, as many as" in said


def test_version(here: Here) -> None:
    assert here("--version") == (0, f"gmn {metadata.version('gmn')}\n", "")


def test_mistakes_in_the_call(here: Here, tmp_path: Path) -> None:
    assert "'epochs'" in mistake(here, "meta-train", "quickstart", "--set", "meta_train.epoch=3")
    assert "nothing learnt here" in mistake(here, "prune", "quickstart", "--meta", "nowhere")
    assert "not a run folder" in mistake(here, "report", "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_the_options(here: Here, tmp_path: Path) -> None:
    assert mistake(here, "prune", "quickstart") == "gmn: Missing option '--meta'; see gmn prune --help"
    assert "No such command 'prun'" in mistake(here, "prun")
    assert "'--seed'" in mistake(here, "meta-train", "quickstart", "--seed", "-1")
    assert "'MODEL...'; see gmn bench latency --help" in mistake(here, "bench", "latency")
    code, out, err = here("zoo")
    assert (code, "Usage: gmn zoo" in out, err) == (2, True, "")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_file(here: Here, tmp_path: Path) -> None:
    overrides = ["--set", "data.name=parquet", "--set", "data.train=no.parquet", "--set", "data.test=no.parquet"]
    assert "no.parquet" in mistake(here, "meta-train", "quickstart", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_speed_up_out_of_reach(here: Here, tmp_path: Path) -> None:
    overrides = [part for override in [*TINY, "prune.speed_up=500"] for part in ("--set", override)]
    line = mistake(here, "meta-train", "quickstart", *overrides)
    assert "out of reach" in line
    assert "max_ratio" in line
    assert list(tmp_path.iterdir()) == []  # found out before anything was trained


def test_weights_with_nan(here: Here, tmp_path: Path) -> None:
    import gmn

    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 4, "shortcut": "B"})
    state = model.state_dict()
    state["layer1.0.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "bad.pt")
    overrides = [part for override in [*TINY, "network.weights=bad.pt"] for part in ("--set", override)]
    line = mistake(here, "meta-train", "quickstart", *overrides)
    assert "not finite" in line
    assert "layer1.0.conv1.weight" in line


def test_inspect(here: Here, tmp_path: Path) -> None:
    code, out, err = here("inspect", "cifar.resnet8", "--set-option", "shortcut=B", "--draw", "graph.png")
    assert (code, err) == (0, "")
    assert "conv1  Conv2d  weight [16, 3, 3, 3]  in the graph" in out
    assert "layer1.0.conv1" in out
    assert "parameters: 78,042, in the graph 78,042 (100%)" in out
    assert (tmp_path / "graph.png").stat().st_size > 5000
    code, shorter, _ = here("inspect", "cifar.resnet8", "--set-option", "shortcut=B", "--no-groups")
    assert len(shorter) < len(out)


def test_convert_there_and_back(here: Here, tmp_path: Path) -> None:
    import gmn

    model = gmn.build_network("cifar.resnet8", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    there = ("convert", "cifar.resnet8", "--classes", "7", "--weights", "own.pt", "-o", "graph.safetensors")
    code, out, err = here(*there)
    assert (code, err) == (0, "")
    assert "wrote graph.safetensors" in out
    assert "round trip: bit-exact" in out
    code, out, err = here("convert", "graph.safetensors", "-o", "weights.safetensors")
    assert (code, err) == (0, "")
    assert "state dict of cifar.resnet8, 44 tensors" in out
    other = gmn.build_network("cifar.resnet8", num_classes=7)
    gmn.load_weights(other, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    before = (tmp_path / "graph.safetensors").read_bytes()
    assert "the output exists" in mistake(here, *there)
    assert (tmp_path / "graph.safetensors").read_bytes() == before
    assert here(*there, "--overwrite")[0] == 0
    assert "(100%)" in here("inspect", "graph.safetensors")[1]


def test_mistakes_of_inspect_and_convert(here: Here, tmp_path: Path) -> None:
    assert "'cifar.resnet20'" in mistake(here, "inspect", "cifar.resnett20")
    assert "input size" in mistake(here, "inspect", "cifar.resnet8", "--input", "3,x")
    assert "example inputs" in mistake(here, "inspect", "cifar.resnet8", "--input", "32")
    assert "no such file" in mistake(here, "inspect", "nowhere.safetensors")
    assert "no saved network" in mistake(here, "inspect", ".")
    assert "ends in .safetensors" in mistake(here, "convert", "cifar.resnet8", "-o", "graph.pt")
    assert "kind of picture" in mistake(here, "inspect", "cifar.resnet8", "--draw", "graph.doc")
    (tmp_path / "text").write_text("no graph")
    assert "cannot read the file" in mistake(here, "convert", "text", "-o", "weights.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_graph_file_that_names_a_function(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text("from torch import nn\ndef make(num_classes, in_channels):\n"
                                          "    return nn.Linear(in_channels, num_classes)\n")  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    assert here("convert", "own_nets:make", "--input", "6", "--classes", "3", "-o", "g.safetensors")[0] == 0
    refused = mistake(here, "convert", "g.safetensors", "-o", "w.safetensors")
    assert "'own_nets:make'" in refused
    assert "--allow-code" in refused
    code, out, _ = here("convert", "g.safetensors", "--network", "own_nets:make", "-o", "w.safetensors")
    assert code == 0
    assert "2 tensors" in out
