"""`gmn bench scaling`.

* a process takes its steps and says what they cost; a process that fails is an error in one line
* a zoo is built and searched: its bytes are those of its files, the search ends for every similarity
* the table shows times per task; the JSON has what was measured
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import gmn
from gmn import bench_scaling
from gmn.bench_scaling import Step, bench_step, bench_zoo, show


def test_steps_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    bench_scaling._work("resnet20", images=4, rounds=1)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"seconds", "accuracy", "metanetwork", "peak_mb"}
    assert 0 < found["accuracy"] + found["metanetwork"] < found["seconds"]


def test_a_process_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(gmn.GmnError, match="did you mean 'resnet20'"):
        bench_step("resnet2", [1], images=4, rounds=1)
    monkeypatch.setattr(bench_scaling.sys, "executable", "false")
    with pytest.raises(gmn.GmnError, match=r"a process failed.*2 processes"):
        bench_step("resnet20", [2], images=4, rounds=1)


def test_a_zoo_is_measured(tmp_path: Path) -> None:
    (found,) = bench_zoo("resnet20", [2])
    assert found.tasks == 2
    assert found.index_bytes < found.bytes
    assert 2 * 90_000 < found.bytes < 2 * 200_000  # 27 k parameters of four bytes
    assert min(found.plan, found.claim, found.add, found.shared_classes, found.prototypes, found.leep) > 0
    steps = [Step(1, "resnet20", 100, 4.0, 3.0, 0.5, 10.0), Step(2, "resnet20", 100, 2.5, 1.5, 0.5, 9.0)]
    text = io.StringIO()
    show(steps, [found], tmp_path / "found.json", Console(file=text, width=160))
    assert "1.60x" in text.getvalue()
    assert f"{1000 * found.leep / 2:.2f}" in text.getvalue()
    assert f"│ {1000 * found.plan:.2f} │ {1000 * found.claim:.2f} │ {1000 * found.add:.2f} │" in " ".join(
        text.getvalue().split()
    )
    content = json.loads((tmp_path / "found.json").read_text())
    assert [row["processes"] for row in content["steps"]] == [1, 2]
    assert content["zoos"][0]["bytes"] == found.bytes
