"""Run folders that a stranger wrote.

* a link that leaves the folder, and what is neither file nor folder, is refused before anything is written or read
* names that a file of the run states do not lead out of it; another run's network counts only if it is that network
* content of another form than gmn writes is one line that names the file
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from made_runs import CNN, built, call, make_run

import gmn
from gmn.checkpoint import save_json
from gmn.errors import CheckpointError, GmnError
from gmn.jsonl import append_line, read_lines
from gmn.pipeline import reopened
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run, load_report, open_run
from gmn.run_networks import best, side_by_side
from gmn.vote_compare import MEANS, _Results


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart")))
    return folder


@pytest.mark.parametrize("name", ["metrics.jsonl", "plots", "checkpoints/epoch-001.safetensors", "report.html"])
def test_links_do_not_lead_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(tmp_path / "elsewhere")
    recipe = (run / "recipe.yaml").read_text()
    for use in (lambda: open_run(run), lambda: best(run), lambda: Run(run, recipe, resume=True)):
        with pytest.raises(CheckpointError, match="a link that leaves the run folder") as error:
            use()
        assert str(run / name) in str(error.value)
    for command in ("report", "cost", "curve", "join", "export"):
        assert (
            call(monkeypatch, command, str(run), *(["-o", str(tmp_path / "out")] if command == "export" else [])) == 2
        )
    assert not (tmp_path / "elsewhere").exists()


CIRCLES: dict[str, dict[str, str]] = {
    "itself": {"metrics.jsonl": "metrics.jsonl"},
    "two": {"plots": "more", "more": "plots"},
    "through a folder": {"plots": "more/deep", "more": "plots/deep"},
    "a long way": {**{f"{step}": f"{step + 1}" for step in range(60)}, "60": "models"},
    "a long name": {"plots": "x" * 300},
    "through a file": {"plots": "recipe.yaml/deep"},
}


@pytest.mark.parametrize("shape", CIRCLES)
def test_links_that_lead_nowhere(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    """Python's own words for them differ from version to version, and some are no error of the system."""
    for name, target in CIRCLES[shape].items():
        (run / name).symlink_to(target)
    recipe = (run / "recipe.yaml").read_text()
    for use in (lambda: open_run(run), lambda: best(run), lambda: Run(run, recipe, resume=True)):
        with pytest.raises(CheckpointError, match=r"a link that leads nowhere: got .*run/"):
            use()
    for command in ("report", "cost", "join"):
        assert call(monkeypatch, command, str(run)) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_recipe_that_is_a_circle(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").symlink_to("recipe.yaml")
    for command in ("report", "cost", "join"):
        assert call(monkeypatch, command, str(run)) == 2
    with pytest.raises(GmnError, match="not a run folder, and not empty"):
        Run(run, "recipe", overwrite=True)


def test_links_inside_are_fine_and_the_folder_may_be_one(run: Path, tmp_path: Path) -> None:
    (run / "latest").symlink_to("models")
    (tmp_path / "link").symlink_to(run)
    assert open_run(tmp_path / "link") == tmp_path / "link"
    assert best(tmp_path / "link").name == "direct-seed1"


def test_a_pipe_is_not_waited_for(run: Path) -> None:
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="neither file nor folder"):
        open_run(run)


def test_rows_do_not_lead_out(run: Path, tmp_path: Path) -> None:
    gmn.save_model(tmp_path / "away-seed0", built(CNN), CNN, input_shape=(3, 16, 16))
    for row in ("../../away", str(tmp_path / "away"), "x/../../../away"):
        facts = {"row": row, "seed": 0, "validation_accuracy": 1.0}
        save_json(run / "report.json", {"results": [facts]})
        with pytest.raises(CheckpointError, match="kept no pruned network"):
            best(run)


def test_another_runs_network_counts_if_it_is_that_network(run: Path, tmp_path: Path) -> None:
    base, zoo = run / "models" / "base", tmp_path / "zoo"
    zoo.mkdir()
    base.rename(zoo / "network")
    sha256 = hashlib.sha256((zoo / "network" / "weights.safetensors").read_bytes()).hexdigest()
    save_json(run / "voters.json", {"zoo": str(zoo), "network_sha256": sha256})
    assert side_by_side(run)["base"] == zoo / "network"
    save_json(run / "voters.json", {"zoo": str(zoo), "network_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match="began with is not there"):
        side_by_side(run)
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("graph-mask-voting")))
    for content in ([], {}, {"zoo": 3, "network_sha256": ""}, "x"):
        save_json(run / "voters.json", content)
        for use in (side_by_side, reopened):
            with pytest.raises(CheckpointError, match=r"malformed content: .*; in .*voters\.json"):
                use(run)


@pytest.mark.parametrize(
    "content",
    [
        *([], 3, "x", {"results": 3}, {"results": [{"row": "direct"}]}, {"recipe": "\x1b[2J", "results": []}),
        *({"results": [[]]}, {"recipe": "x", "results": [{"row": {}, "seed": 0}]}, {"further": 3, "speed_up": "x"}),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_report_of_another_form(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: Any
) -> None:
    save_json(run / "report.json", content)
    for command in (("report", str(run)), ("export", str(run), "-o", str(run.parent / "out"))):
        assert call(monkeypatch, *command) == 2
        said = capsys.readouterr().err
        assert said.startswith("gmn: ")
        assert said.count("\n") == 1
        assert "\x1b" not in said


def test_a_log_of_another_form(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ('{"event": "cost"}', '{"event": "learnt", "row": "metanetwork"}', "[" * 100_000, '{"event": []}'):
        (run / "metrics.jsonl").write_text(line + "\n")
        assert call(monkeypatch, "cost", str(run)) == 2
        assert capsys.readouterr().err.startswith("gmn: ")


def test_names_in_markup_are_no_styles(run: Path) -> None:
    save_json(run / "report.json", {"results": [], "recipe": "[/b]"})
    with pytest.raises(GmnError):
        best(run)
    assert load_report(run)["recipe"] == "[/b]"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"event": "select", "epoch": [1], "validation_accuracy": 0.5}, "expected epoch: int; got \\[1\\]"),
        ({"event": "select", "epoch": 1, "validation_accuracy": "high"}, "expected validation_accuracy: float"),
        ({"event": "select", "epoch": 1, "validation_accuracy": 10**400}, "expected validation_accuracy: float"),
        ({"event": "select", "epoch": 1}, "expected validation_accuracy: float; got None"),
        ({"event": "select", "epoch": 1, "validation_accuracy": 0.5, "more": {}}, "expected more: float"),
    ],
)
def test_a_log_that_is_gone_on_with(run: Path, line: dict[str, Any], said: str) -> None:
    append_line(run / "metrics.jsonl", line)
    gone_on = Run(run, (run / "recipe.yaml").read_text(), resume=True)
    with pytest.raises(CheckpointError, match=rf"malformed content: {said}.*metrics\.jsonl"):
        gone_on.recorded("select", {"epoch": 1}, lambda: {})


def test_an_environment_of_another_form(run: Path) -> None:
    (run / "environment.json").write_text("[]")
    with (
        pytest.raises(CheckpointError, match="malformed content: expected a mapping"),
        Run(run, (run / "recipe.yaml").read_text(), resume=True) as gone_on,
    ):
        gone_on.start()


def test_results_of_another_form(tmp_path: Path) -> None:
    def known() -> int:
        results = _Results(tmp_path / "results.jsonl")
        results.look()
        return len(results.known)

    whole = {"row": "vote", "target": "t", "seed": 0, "iterations": 5, "neighbours": 1, "similarity": "", "group": 0}
    append_line(tmp_path / "results.jsonl", whole | dict.fromkeys(MEANS, 1) | {"iterations": 5, "neighbours": 1})
    assert known() == 1
    append_line(tmp_path / "results.jsonl", {"row": "another event"})
    assert known() == 1
    append_line(tmp_path / "results.jsonl", whole)
    with pytest.raises(CheckpointError, match="expected validation_accuracy: float; got None"):
        known()


def test_a_recipe_that_is_a_hole(run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text()
    os.truncate(run / "recipe.yaml", 2**40)
    with pytest.raises(CheckpointError, match=r"the file is too large: .*recipe\.yaml"):
        Run(run, recipe, resume=True)


def test_the_zoo_of_another_run_is_a_hole(run: Path, tmp_path: Path) -> None:
    """Its network is hashed, to see whether it is the one that was voted on."""
    (run / "models" / "base").rename(tmp_path / "network")
    os.truncate(tmp_path / "network" / "weights.safetensors", 2**42)
    save_json(run / "voters.json", {"zoo": str(tmp_path), "network_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match="too large for this machine"):
        side_by_side(run)


def test_a_log_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    os.truncate(tmp_path / "metrics.jsonl", 2**40)  # it has no content
    with pytest.raises(CheckpointError, match="the file is too large: expected 100,000,000 bytes at most"):
        list(read_lines(tmp_path / "metrics.jsonl"))
