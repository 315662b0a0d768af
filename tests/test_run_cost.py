"""What a run cost: the log's lines, and what `gmn cost` makes of them.

* A stage logs its own seconds and peaks: not those of a stage inside it, and nothing if it ends in an error.
* Parts of a stopped run add up; of work that was done again the later line counts.
* C(N) = P + A / N and the break-even by hand, with the training of the data models and without.
* A metanetwork from another run brings its costs along; one from nowhere has none, and its figures are left out.
* The command prints tables and writes JSON; a run without costs, or of the other method, is one line.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import call

from gmn import stages
from gmn.checkpoint import load_json
from gmn.cost_cli import even, learning, pruning
from gmn.learnt import _costs
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run
from gmn.run_cost import account, break_even, meta_training, prunings
from gmn.stages import Spent, stage

Clock = Callable[[float, float], None]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock and a memory that stand still unless told: `passes(seconds, megabytes)`."""
    now, peak = [100.0], [0.0]

    def go_on(seconds: float, megabytes: float) -> None:
        now[0] += seconds
        peak[0] = max(peak[0], megabytes)

    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stages, "peak_memory", lambda: peak[0])
    monkeypatch.setattr(stages, "memory_now", lambda: peak.__setitem__(0, 0.0))
    return go_on


def logged() -> tuple[list[tuple[Any, ...]], Callable[..., None]]:
    lines: list[tuple[Any, ...]] = []
    return lines, lambda event, **values: lines.append((event, *values.values()))


def test_stages_inside_one_another(passes: Clock) -> None:
    lines, log = logged()
    passes(50, 9000)  # before all stages: nobody's
    with stage(log, "outer", row="a"):
        passes(1, 500)
        with stage(log, "inner"):
            passes(10, 800)
        passes(2, 600)
    assert lines == [("cost", "inner", 10.0, 800.0, 0.0), ("cost", "outer", "a", 3.0, 600.0, 0.0)]


def test_parts_of_a_stage(passes: Clock) -> None:
    lines, log = logged()
    with stage(log, "learning") as part:
        passes(3, 100)
        part(epoch=1)
        with stage(log, "looking"):
            passes(7, 50)
        passes(4, 200)
        part(epoch=2)
        passes(1, 10)
    assert [line[1:4] for line in lines] == [("learning", 1, 3.0), ("looking", 7.0, 50.0), ("learning", 2, 4.0)]


def test_a_stage_that_fails_is_not_logged(passes: Clock) -> None:
    lines, log = logged()

    def fail() -> None:
        with stage(log, "inner"):
            passes(5, 100)
            raise InterruptedError

    with stage(log, "outer"):
        with pytest.raises(InterruptedError):
            fail()
        passes(1, 50)
    assert lines == [("cost", "outer", 1.0, 50.0, 0.0)]


def test_memory_of_an_accelerator(passes: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {0: 0, 1: 0}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda gpu: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", used.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: used.__setitem__(gpu, 0))
    lines, log = logged()
    used[0] = 9 * 2**30
    with stage(log, "outer"):
        with stage(log, "inner"):
            used[1] = 3 * 2**20
        used[0] = 2**20
    assert [line[-1] for line in lines] == [3.0, 1.0]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_of_this_process() -> None:
    lines, log = logged()
    with stage(log, "large"), mmap.mmap(-1, 256 * 2**20) as memory:  # not from what the process holds already
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
    with stage(log, "small"):
        pass
    large, small = (line[3] for line in lines)
    assert 200 < large - small < 400


# A literal run: minutes of a pruning are 1 (direct), 4 (sparse), 3 (metanetwork); learning takes 30 + 20 + 10.


def line(name: str, minutes: float, peak: float = 500.0, **labels: Any) -> dict[str, Any]:
    return {
        **{"time": 0.0, "event": "cost", "stage": name, **labels},
        **{"seconds": 60 * minutes, "peak_mb": peak, "cuda_mb": 0.0},
    }


def of_row(row: str, tuning: float, last: float, speed_up: float = 3.0, **seed: int) -> list[dict[str, Any]]:
    labels = {"row": row, "seed": 0, **seed}
    first = [line("rewriting", 0.5, **labels), line("first fine-tuning", tuning, **labels)] if tuning else []
    after = [
        line("pruning", 0.25, **labels, speed_up=speed_up),
        line("last fine-tuning", last, **labels, speed_up=speed_up),
    ]
    return [*first, *after]


LEARNING = [
    *(line("network", 15, network=f"data-models/{index}") for index in (0, 1)),
    *(line("meta-training", 10, 900.0, epoch=epoch) for epoch in (1, 2)),
    line("choosing", 4, 700.0, checkpoint=0),
    line("choosing", 3, 700.0, checkpoint=1),
    line("choosing", 3, 700.0, checkpoint=2),
    line("network", 99, network="models/base"),
]
PRUNING = [
    line("network", 0.25, network="models/start"),
    *of_row("metanetwork", 1, 1),
    *of_row("direct", 0, 0.75),
    *of_row("sparse", 1.5, 1.5),
]


def run(folder: Path, lines: list[dict[str, Any]], *overrides: str) -> Path:
    made = Run(folder, dump_recipe(load_recipe("quickstart", overrides)))
    made.start()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return folder


def test_figures_by_hand(tmp_path: Path) -> None:
    content = account(run(tmp_path / "run", [*LEARNING, *PRUNING]), [1, 5, 20])
    learnt = content["meta_training"]["metanetwork"]
    assert {name: spent["seconds"] / 60 for name, spent in learnt["parts"].items()} == {
        **{"data models": 30, "meta-training": 20, "choosing": 10}
    }
    assert (learnt["seconds"], learnt["seconds_without_data_models"], learnt["peak_mb"]) == (3600, 1800, 900)
    rows = {entry["row"]: entry for entry in content["pruning"]}
    assert {row: entry["seconds"] / 60 for row, entry in rows.items()} == {"metanetwork": 3, "direct": 1, "sparse": 4}
    assert next(iter(rows["metanetwork"]["stages"])) == "initial pruning"
    assert "initial pruning" not in rows["direct"]["stages"]
    minutes = {
        way: {count: seconds / 60 for count, seconds in own.items()}
        for way, own in rows["metanetwork"]["amortised"].items()
    }
    assert minutes == {"all": {"1": 63, "5": 15, "20": 6}, "without data models": {"1": 33, "5": 9, "20": 4.5}}
    assert rows["sparse"]["amortised"] == {"all": {"1": 240, "5": 240, "20": 240}}
    assert rows["metanetwork"]["break_even"] == {
        "all": {"direct": None, "sparse": 60},
        "without data models": {"direct": None, "sparse": 30},
    }
    assert rows["direct"]["break_even"] == {}


def test_break_even_is_where_the_curves_meet() -> None:
    for count in range(1, 40):
        enough = 3 + 100 / count <= 8
        assert enough == (count >= (break_even(3, 100, 8) or 0))
    assert break_even(3, 0, 8) == 1
    assert break_even(8, 0, 3) is None


def test_a_resumed_run_adds_up_its_parts(tmp_path: Path) -> None:
    repeated = [line("meta-training", 5, epoch=2), line("network", 1, network="data-models/1")]
    folder = run(tmp_path / "run", [*LEARNING, *repeated, line("choosing", 8, probe=1, finetune_images=0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "cost", "sta')  # killed here
    parts = meta_training(folder)
    assert {name: spent.seconds / 60 for name, spent in parts.items()} == {
        **{"data models": 16, "meta-training": 15, "choosing": 18}
    }


def test_seeds_and_speed_ups(tmp_path: Path) -> None:
    lines = [
        *of_row("direct", 0, 0.75, seed=0),
        *of_row("direct", 0, 1.75, seed=1),
        *of_row("sparse", 1, 1, 2.0),
        *of_row("sparse", 0, 3, 3.0),  # what comes before pruning was made for 2x
        line("pruning", 9, row="direct", seed=2, speed_up=3.0),  # not finished
    ]
    found = prunings(run(tmp_path / "run", lines))
    assert [(own.row, own.speed_up, own.seeds, own.whole.seconds / 60) for own in found] == [
        ("sparse", 2.0, 1, 2.75),
        ("direct", 3.0, 2, 1.5),
        ("sparse", 3.0, 1, 4.75),
    ]
    assert account(tmp_path / "run", [1])["meta_training"] == {"metanetwork": None}


def test_a_metanetwork_brings_its_costs_along(tmp_path: Path) -> None:
    origin = run(tmp_path / "origin", LEARNING)
    parts = _costs(origin / "checkpoints" / "epoch-001.safetensors", tmp_path / "mine")
    assert parts == {name: vars(spent) for name, spent in meta_training(origin).items()}
    assert _costs(tmp_path / "lonely.safetensors", tmp_path / "mine") == {}
    assert _costs(origin / "metanetwork.safetensors", origin) == {}
    learnt = [
        {"event": "learnt", "row": "metanetwork", "from": "origin", "parts": parts},
        {"event": "learnt", "row": "ours", "from": "lonely.safetensors", "parts": {}},
    ]
    folder = run(tmp_path / "mine", [*learnt, *PRUNING, *of_row("ours", 1, 1)], "report.metanetworks={ours: x}")
    content = account(folder, [10], ["ours"])
    rows = {entry["row"]: entry for entry in content["pruning"]}
    assert rows["metanetwork"]["amortised"] == {"all": {"10": 540}, "without data models": {"10": 360}}
    assert (rows["ours"]["amortised"], rows["ours"]["break_even"]) == ({}, {})
    assert content["meta_training"]["ours"] is None
    assert meta_training(folder)["choosing"] == Spent(600.0, 700.0)
    cells = [list(column.cells) for column in pruning({"recipe": "x", **content}).columns]
    assert cells[0] == ["metanetwork", "metanetwork, data models at hand", "direct", "sparse training", "ours"]
    assert cells[3] == ["9.00", "6.00", "1.00", "4.00", "?"]


def test_tables(tmp_path: Path) -> None:
    content = {"recipe": "quickstart", **account(run(tmp_path / "run", [*LEARNING, *PRUNING]), [1, 20])}
    (learnt,) = learning(content)
    assert [list(column.cells) for column in learnt.columns] == [
        ["training the data models", "meta-training", "choosing the checkpoint", "together", "without the data models"],
        ["30.00", "20.00", "10.00", "60.00", "30.00"],
        ["500", "900", "700", "900", "900"],
    ]
    drawn = pruning(content)
    assert [column.header for column in drawn.columns] == ["network", "minutes", "peak MB", "over 1", "over 20"]
    assert list(drawn.columns[4].cells) == ["6.00", "4.50", "1.00", "4.00"]
    crossing = even(content)
    assert crossing is not None
    assert [list(column.cells) for column in crossing.columns] == [
        ["metanetwork", "metanetwork, data models at hand"],
        ["sparse training", "sparse training"],
        ["60", "30"],
    ]
    gpu = [{**entry, "cuda_mb": 2000.0} for entry in PRUNING]
    content = {"recipe": "x", **account(run(tmp_path / "gpu", gpu[5:]), [1])}
    assert [column.header for column in pruning(content).columns] == [
        "network",
        "minutes",
        "peak MB",
        "GPU MB",
        "over 1",
    ]
    assert even(content) is None


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run", [*LEARNING, *PRUNING])
    assert call(monkeypatch, "cost", str(folder), "--networks", "2", "-o", str(tmp_path / "cost.json")) == 0
    out, err = capsys.readouterr()
    assert "over 2" in out
    assert "data models at hand" in out
    assert err == ""
    written = load_json(tmp_path / "cost.json")
    assert written == {"recipe": "quickstart", **account(folder, [2])}


@pytest.mark.parametrize(
    ("lines", "arguments", "said"),
    [
        ([], [], "the run's log has no costs of a pruning"),
        (LEARNING, [], "the run's log has no costs of a pruning"),
        (PRUNING, ["--networks", "0"], "--networks"),
        (PRUNING, ["--networks", "few"], "--networks"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    lines: list[dict[str, Any]],
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "cost", str(run(tmp_path / "run", lines)), *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_vote_run_has_no_metanetwork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Run(tmp_path / "run", dump_recipe(load_recipe("graph-mask-voting")))
    made.start()
    assert call(monkeypatch, "cost", str(tmp_path / "run")) == 2
    assert "the run has no metanetwork" in capsys.readouterr().err
    assert call(monkeypatch, "cost", str(tmp_path)) == 2
    assert "not a run folder" in capsys.readouterr().err
