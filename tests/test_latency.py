"""Contract of `gmn.latency` and `gmn bench latency`.

* Networks take turns; what warms up does not count; inputs can be a tensor, a tuple or a dict.
* A row says the median and the quartiles of the rounds, and its speed-ups against the first network, in FLOPs and time.
* Fewer FLOPs without less time, and rounds that differ widely, are said.
* A run means its base and the first seed of every row; networks of different inputs are refused.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import CNN, call, make_run
from reading import Made
from rich.console import Console
from torch import nn

import gmn
from gmn.batches import with_batch
from gmn.bench_latency import Range, caption, compared, table
from gmn.checkpoint import save_json
from gmn.costs import Cost, latencies
from gmn.pipeline import network_digest
from gmn.run_networks import side_by_side


def test_networks_take_turns() -> None:
    seen: list[str] = []

    def run(self: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(f"{self.name}{'t' if self.training else ''}")
        return a + b

    one, two = Made(run, name="one"), Made(run, name="two")
    for inputs in ((torch.ones(2), torch.ones(2)), {"a": torch.ones(2), "b": torch.ones(2)}):
        seen.clear()
        times = latencies([one, two], inputs, rounds=3, warmup=1)
        assert seen == ["one", "two"] * 4
        assert [len(series) for series in times] == [3, 3]
        assert all(seconds > 0 for series in times for seconds in series)
    assert len(gmn.latency([one, two], (torch.ones(2), torch.ones(2)), rounds=2)) == 2
    assert one.training


def test_batches() -> None:
    a, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [0, 1]])
    inputs = {"a": a, "mask": mask, "table": torch.zeros(5), "scale": 2.0}
    more = with_batch(inputs, 3)
    assert more["a"].tolist() == [[1, 2], [3, 4], [1, 2]]
    assert more["mask"].tolist() == [[1, 0], [0, 1], [1, 0]]
    assert (more["table"] is inputs["table"], more["scale"]) == (True, 2.0)
    images = torch.randn(2, 3, 8, 8)
    mixed = with_batch(images, 2, shuffled=True)
    assert not torch.equal(mixed, images)
    assert torch.equal(mixed.flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(with_batch(inputs, 2, shuffled=True)["mask"], mask)


COSTS = {"base": Cost(100.0, 50), "half": Cost(50.0, 20), "idle": Cost(25.0, 10)}
SECONDS = [[4.0, 4.0, 6.0, 4.0, 5.0], [2.0, 2.0, 3.0, 4.0, 2.0], [4.0, 4.0, 6.0, 4.0, 5.0]]


def test_medians_quartiles_and_speed_ups() -> None:
    base, half, idle = compared(COSTS, SECONDS, batch=8, threads=2)
    assert base.seconds == Range(4.0, 4.0, 5.0)
    assert half.seconds == Range(2.0, 2.0, 3.0)
    assert (half.speed_up_flops, idle.speed_up_flops) == (2.0, 4.0)
    assert half.speed_up_time == Range(2.0, 2.0, 2.0)  # of 2, 2, 2, 1, 2.5: within a round
    assert [row.in_vain for row in (base, half, idle)] == [False, False, True]


def test_what_the_table_says() -> None:
    rows = compared(COSTS, SECONDS, batch=8, threads=2)
    text = caption(rows, 5)
    assert "fewer FLOPs but no less time: idle (batch 8, threads 2); usual reasons: channels" in text
    assert "half (" not in text
    assert "differ widely" not in text
    assert "FLOPs but" not in caption(rows[:2], 5)
    assert "differ widely" in caption(compared(COSTS, [[1.0, 2.0, 3.0]] * 3, 8, 2), 3)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table([*rows, *compared(COSTS, SECONDS, 1, 1)], "cpu", 5))
    shown = console.export_text()
    assert "2000.00 (2000.00-3000.00)" in shown
    assert "4.00x" in shown
    assert "2.00x (2.00-2.00)" in shown


def latency(monkeypatch: pytest.MonkeyPatch, arguments: str) -> int:
    return call(monkeypatch, "bench", "latency", *arguments.split())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    pruned = gmn.prune(gmn.load_model(run / "models/base"), torch.zeros(1, 3, 16, 16), speed_up=2.0).model
    gmn.save_model(tmp_path / "small", pruned, CNN, input_shape=(3, 16, 16))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert latency(monkeypatch, "run --batch 2,1 --threads 1,2 --rounds 2 --device cpu -o f.json") == 0
    found = json.loads(Path("f.json").read_text())
    assert [(row["network"], row["batch"], row["threads"]) for row in found["timings"]] == [
        (name, batch, number) for batch in (1, 2) for number in (1, 2) for name in ("base", "metanetwork", "direct")
    ]
    assert torch.get_num_threads() == threads
    assert "Latency on cpu" in capsys.readouterr().out
    assert latency(monkeypatch, "run/models/base small --rounds 2 --batch 1 -o g.json") == 0
    base, small = json.loads(Path("g.json").read_text())["timings"]
    assert base["speed_up_flops"] == 1.0
    assert small["speed_up_flops"] >= 2.0
    assert small["parameters"] == sum(p.numel() for p in pruned.parameters())
    assert small["seconds"]["low"] <= small["seconds"]["median"] <= small["seconds"]["high"]


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ("run/models/base", "nothing to compare with"),
        ("run/models/base cifar.resnet8", "different inputs"),
        ("run --classes 3", "--classes has no meaning here"),
        ("run --batch 0", "not a list of numbers"),
        ("run --device cuda:99", "no such device"),
        ("run --device meta", "auto, cpu, cuda or cuda:N"),
        ("run nowhere", "unknown network"),
        ("run/models/base run/models/direct-seed0 --input 8", "does not run on a batch of 1"),
    ):
        assert latency(monkeypatch, arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("COLUMNS", "200")  # names in one line
    assert latency(monkeypatch, "run cifar.resnet8 --input 3,16,16 --rounds 2 --batch 1") == 0
    assert "run: direct" in capsys.readouterr().out


def test_the_networks_of_a_vote_run(tmp_path: Path) -> None:
    """One that prunes with the zoo of another run has its base there; one that only made a zoo has nothing pruned."""
    run = make_run(tmp_path / "run")
    (run / "models" / "base").rename(tmp_path / "network")
    with pytest.raises(gmn.GmnError, match="the run began with is not there"):
        side_by_side(run)
    save_json(run / "voters.json", {"zoo": str(tmp_path), "network_sha256": network_digest(tmp_path)})
    found = side_by_side(run)
    assert list(found) == ["base", "metanetwork", "direct"]
    assert (found["base"], found["direct"].name) == (tmp_path / "network", "direct-seed0")
    (run / "models").rename(tmp_path / "elsewhere")
    with pytest.raises(gmn.GmnError, match="kept no pruned network"):
        side_by_side(run)


def test_a_batch_that_a_network_does_not_take() -> None:
    from gmn.bench_latency import bench
    from gmn.subject import Named

    model = Made(lambda self, a: self.linear(a.reshape(1, 4)), linear=nn.Linear(4, 2))
    networks = {name: Named(model, {}, torch.zeros(1, 4), {}) for name in ("one", "two")}
    with pytest.raises(gmn.GmnError, match="does not run on a batch of 3"):
        bench(networks, [3], [1], device=torch.device("cpu"), rounds=2)
