"""Contract of `gmn bench metanetwork` and `gmn bench metastep`.

* Workers take turns in processes of their own; one that fails is reported and stops nobody.
* The published way of a step gives the gradient of ours.
* A pass and a step are measured by their parts, with their memory; unknown names are refused with a hint.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from zoo import Residual, small

import gmn
from gmn import bench_metanetwork, bench_metastep
from gmn.bench_metanetwork import Cases
from gmn.bench_workers import Worker, in_turns
from gmn.errors import GmnError
from gmn.meta_train import DataModel, meta_step
from gmn.phases import Stopwatch


def test_a_pass_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = Cases(("resnet20",), ("blocks",), (1,), ("forward", "backward"))
    forward, both = bench_metanetwork.bench(cases, rounds=2, chunk_mb=None)
    assert (forward.nodes, forward.edges) == (both.nodes, both.edges) == (701, 30_672)
    assert (forward.rounds, both.rounds) == (2, 2)
    assert 0 < forward.seconds < both.seconds
    assert both.peak_mb > forward.peak_mb > 0
    states, features = 4 * 32 * 30_672, 4 * sum(e.numel() for e in bench_metanetwork.graph_of("resnet20").edge_features)
    assert forward.least_gb == pytest.approx((10 * states + 2 * features) / 1e9)
    assert both.least_gb == pytest.approx((24 * states + 4 * features) / 1e9)
    assert both.moved_gb > forward.moved_gb > forward.least_gb
    bench_metanetwork.show([forward, both], tmp_path / "found.json")
    assert [row["backward"] for row in json.loads((tmp_path / "found.json").read_text())] == [False, True]
    assert "resnet20 fwd" in capsys.readouterr().out


def test_a_step_is_measured_by_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench_metastep.bench("resnet20", ["gmn", "bf16"], [1], images=4, batch_size=2, rounds=1)
    assert [row.images for row in found] == [4, 4]
    assert [row.way for row in found] == ["gmn", "bf16"]
    for row in found:
        assert row.seconds.keys() == set(bench_metastep.PHASES)
        assert 0 < row.share < 1
    bench_metastep.show(found, None, Console(width=80))
    assert "share of the metanetwork" in capsys.readouterr().out


def test_a_failing_worker_stops_nobody() -> None:
    facts = {
        "graph": "resnet20",
        "backend": "blocks",
        "threads": 1,
        "backward": False,
        "chunk_mb": None,
        "device": "cpu",
    }
    workers = [Worker("gmn.bench_metanetwork", {**facts, "graph": "nonsense"}), Worker("gmn.bench_metanetwork", facts)]
    bad, good = in_turns(workers, 1, lambda: None)
    assert bad.failed == "ended with code 1"
    assert bad.rounds == 0
    assert (good.failed, good.rounds) == ("", 1)


def test_the_published_step_has_the_same_gradient() -> None:
    model = small(Residual(4), width=4).eval()
    graph = gmn.to_graph(model, torch.zeros(1, 3, 8, 8))
    subject = DataModel(model, graph, gmn.Importance(graph.spec, gmn.couplings(graph.spec)))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4) % 2) for _ in range(3)]
    gradients = []
    for backend in ("pyg", "blocks"):
        torch.manual_seed(1)
        size = {"layers": 2, "hidden": 4, "zero_init": False, "backend": backend}
        metanetwork = gmn.MetaNetwork(gmn.MetaNetworkConfig(len(graph.spec.columns), graph.spec.edge_kinds, **size))
        if backend == "pyg":
            watch = Stopwatch()
            bench_metastep._published_step(metanetwork, subject, batches, watch)
            assert watch.seconds.keys() == set(bench_metastep.PHASES) - {"images", "optimizer"}
            assert min(watch.seconds.values()) > 0
        else:
            meta_step(metanetwork, subject, batches, pruner_reg=1.0)
        gradients.append([torch.zeros(()) if p.grad is None else p.grad for p in metanetwork.parameters()])
    scale = max(float(g.abs().max()) for g in gradients[0])
    for published, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-5 * scale)


def test_channels_last_changes_the_memory_only() -> None:
    model = small(Residual(4), width=4).eval()
    graph = gmn.to_graph(model, torch.zeros(1, 3, 8, 8))
    subject = DataModel(model, graph, gmn.Importance(graph.spec, gmn.couplings(graph.spec)))
    batches = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2)]
    seen: list[bool] = []
    model.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    losses = []
    for channels_last in (False, True):
        torch.manual_seed(1)
        metanetwork = gmn.MetaNetwork(gmn.MetaNetworkConfig(len(graph.spec.columns), graph.spec.edge_kinds, hidden=4))
        losses.append(meta_step(metanetwork, subject, batches, pruner_reg=1.0, channels_last=channels_last)["loss"])
    assert seen == [False, True]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"graphs": ["resnet21"]}, r"no such graph.*resnet20"),
        ({"backends": ["block"]}, r"no such backend.*blocks"),
        ({"passes": ["both"]}, r"no such pass"),
    ],
)
def test_unknown_names(options: dict[str, list[str]], said: str) -> None:
    with pytest.raises(GmnError, match=said):
        Cases(**options)
    with pytest.raises(GmnError, match=r"no such way.*published"):
        bench_metastep.bench("resnet20", ["publisht"], [1], images=1, batch_size=1, rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_an_accelerator_that_is_not_there() -> None:
    with pytest.raises(GmnError, match="no such device"):
        Cases(device="cuda")
    with pytest.raises(GmnError, match="no such device"):
        bench_metastep.bench("resnet20", None, [1], images=1, batch_size=1, rounds=1, device="cuda:7")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_the_clock_and_the_memory_of_an_accelerator() -> None:
    cases = Cases(("resnet20",), ("blocks", "pyg"), device="cuda")
    for row in bench_metanetwork.bench(cases, rounds=2, chunk_mb=None):
        assert (row.failed, row.device) == ("", torch.cuda.get_device_name(0))
        assert min(row.seconds, row.peak_mb, row.moved_gb) > 0
    (step,) = bench_metastep.bench("resnet20", ["gmn"], [1], images=8, batch_size=4, rounds=1, device="cuda")
    assert min(step.base_mb, step.peak_mb, step.share) > 0
