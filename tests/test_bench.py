"""The bench: what a suite holds, that a run survives networks that do not, and what it reports.

* a network has a process of its own: a crash, a hang, a lack of memory cost one row
* a row that is there is not made again; half a row at the end of the file is ignored
* a real network, there and back, with all that is measured
* a section of a page is rewritten between its markers, and nothing else is
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from gmn import bench, bench_checks, bench_report, cli, jsonl, suites
from gmn.bench import Limits, Row
from gmn.convert import to_graph
from gmn.errors import GmnError, NetworkError
from gmn.example import example_inputs
from gmn.jsonl import Tail, append_line, read_lines
from gmn.networks import build_network
from gmn.suites import SUITES, TIMM, TIMM_OPTIONS, Entry, Input

BAD = """
import os, sys, time
from torch import nn

def hangs():
    time.sleep(60)

def crashes():
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)

def raises():
    raise ValueError("no such\\nthing")

def silent():
    return nn.Identity()
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Entry]:
    """Entries of a module of networks that go wrong, which other processes can import."""
    (tmp_path / "bad_networks.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return lambda name: Entry(name, f"bad_networks:{name}", (Input((1, 3)),))


# -- suites ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_names_networks_once(name: str) -> None:
    entries = suites.suite(name)
    assert len({entry.name for entry in entries}) == len(entries) > 5
    for entry in entries:
        assert Entry.from_json(json.loads(json.dumps(asdict(entry)))) == entry


def test_an_unknown_suite_is_a_users_mistake() -> None:
    with pytest.raises(GmnError, match="'timm'"):
        suites.suite("tim")


def test_torchvision_is_all_classification() -> None:
    from torchvision.models import get_model_builder

    modules = {get_model_builder(entry.name).__module__.split(".")[2] for entry in suites.suite("torchvision")}
    assert not modules & {"detection", "segmentation", "quantization", "optical_flow", "video"}
    assert len(suites.suite("torchvision")) >= 80


TIMM_VERSION = "1.0.31"  # whose families the table holds
LIMIT = 150_000_000  # parameters of a network of the suite


def sizes(family: str) -> Iterator[tuple[int, int, str]]:
    """Parameters, numbers of the input and name of a family's networks; nothing is allocated."""
    for name in timm.list_models(module=family, exclude_filters="test_*"):  # those that timm has for its own tests
        with torch.device("meta"):
            model = timm.create_model(name)
        yield sum(p.numel() for p in model.parameters()), example_inputs(model).numel(), name


def test_the_table_of_timm() -> None:
    families = set(timm.list_modules())
    if timm.__version__ == TIMM_VERSION:
        assert families == set(TIMM)
    for family in families & set(TIMM):
        assert TIMM[family] in timm.list_models(module=family)
    assert set(TIMM_OPTIONS) <= set(TIMM.values())
    for entry in suites.suite("timm"):
        if entry.options:  # those without a network under the limit are cut to it
            with torch.device("meta"):
                assert sum(p.numel() for p in entry.build().parameters()) < LIMIT


@pytest.mark.parametrize("family", ["visformer", "xception_aligned", "dla"])
def test_the_table_of_timm_holds_the_smallest(family: str) -> None:
    assert min(sizes(family))[2] == TIMM[family]


@pytest.mark.parametrize("entry", suites.suite("extra"), ids=lambda entry: entry.name)
def test_the_extra_networks_run(entry: Entry) -> None:
    if entry.missing:
        pytest.skip(f"needs {entry.needs}")
    model = bench_checks.randomise(entry.build())
    first, second = (bench_checks.outputs(model, entry.example(model, seed)) for seed in (0, 1))
    assert not bench_checks.equal(first, second)


def test_an_input_of_the_usual_size() -> None:
    entry = Entry("resnet8", "cifar.resnet8")
    (x,) = entry.example(build_network("cifar.resnet8", num_classes=10), seed=0)
    assert x.shape == (1, 3, 32, 32)


def test_entries_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [Entry("resnet18", "a"), Entry("vit", "b"), Entry("far", "c", needs="no_such_package")]
    assert bench.select(entries, "^res") == entries[:1]
    assert bench.select(entries, None) == entries[:2]
    assert "far: skipped, it needs no_such_package" in capsys.readouterr().err
    with pytest.raises(GmnError, match="regular expression"):
        bench.select(entries, "(")
    with pytest.raises(GmnError, match="no network"):
        bench.select(entries, "swin")


# -- processes ---------------------------------------------------------------------------------------------------------


def test_networks_that_go_wrong_cost_their_own_row(bad: Callable[[str], Entry], tmp_path: Path) -> None:
    out = tmp_path / "results" / "rows.jsonl"
    names = ("crashes", "raises", "silent")
    rows = bench.convert([bad(name) for name in names], out, Limits(seconds=60, jobs=2))
    assert not any(row["ok"] for row in rows.values())
    assert rows["crashes"]["error"] == "the process ended with code 3 in the stage 'build': the last words"
    assert "no such" in rows["raises"]["error"]
    assert rows["raises"]["at"].startswith("gmn/networks.py:")
    assert "no layer that the graph can hold" in rows["silent"]["error"]
    assert rows["silent"]["stage"] == "convert"
    assert bench.load_rows(out) == rows


def test_a_network_that_hangs_is_stopped(bad: Callable[[str], Entry], tmp_path: Path) -> None:
    start = time.perf_counter()
    row = bench.run_entry(bad("hangs"), Limits(seconds=2))
    assert time.perf_counter() - start < 10
    assert not row["ok"]
    assert row["error"].startswith("no result after 2 s")


def test_a_stopped_run_leaves_no_process(
    bad: Callable[[str], Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row that cannot be kept ends the others, which would sleep for a minute, and nothing is recorded."""

    def full_disk(path: Path, row: Row) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(bench, "append_line", full_disk)
    start = time.perf_counter()
    with pytest.raises(OSError, match="no space"):
        bench.convert([bad("crashes"), bad("hangs"), bad("hangs")], tmp_path / "rows.jsonl", Limits(seconds=50, jobs=2))
    assert time.perf_counter() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such limit")
def test_a_limit_of_memory(tmp_path: Path) -> None:
    """The process that wants too much fails; nothing is killed."""
    script = "import sys, torch; from gmn.memory import limit_memory; limit_memory(1000); torch.zeros(2**30)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert "memory" in result.stderr


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    calls: list[str] = []

    def fake(entry: Entry, limits: Limits, processes: bench.Processes) -> Row:
        calls.append(entry.name)
        return {"name": entry.name, "ok": entry.name != "b", "error": "" if entry.name != "b" else "broken"}

    monkeypatch.setattr(bench, "run_entry", fake)
    entries = [Entry(name, name) for name in "abc"]
    bench.convert(entries[:2], out, Limits())
    with out.open("a") as file:
        file.write('{"name": "c", "ok": tr')  # a kill in the middle of a line
    rows = bench.convert(entries, out, Limits())
    assert calls == ["a", "b", "c"]
    assert [row["ok"] for row in rows.values()] == [True, False, True]
    bench.convert(entries, out, Limits(), retry_failed=True)
    assert calls == ["a", "b", "c", "b"]
    assert list(bench.load_rows(out)) == ["a", "b", "c"]
    assert len(list(read_lines(out))) == 4


def test_bad_limits() -> None:
    with pytest.raises(GmnError, match="above 0"):
        Limits(seconds=0)


# -- one network -------------------------------------------------------------------------------------------------------


def test_a_network_end_to_end(tmp_path: Path) -> None:
    row = bench.run_entry(Entry("prelu", "gmn.suite_networks:prelu", (Input((2, 3, 16, 16)),)), Limits(seconds=100))
    assert row["error"] == ""
    assert row["ok"]
    assert row["bit_exact"]
    assert row["edit_shows"]
    assert row["parameters"] == 8 * 27 + 8 + 8 + 16 * 72 + 16 + 1 + 170
    assert row["share"] > 0.99
    assert 0 <= row["frozen"] <= 1
    assert {"build", "trace", "convert", "round trip", "edit"} <= row["seconds"].keys()
    assert row["traced_by"] in ("run", "export")
    assert row["peak_mb"] > 50


def test_randomised_networks_have_nothing_trivial() -> None:
    model = bench_checks.randomise(build_network("cifar.resnet8", num_classes=10))
    assert not model.training
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert tensor.std() > 0, name


def test_a_difference_is_found() -> None:
    one, other = (bench_checks.randomise(nn.BatchNorm1d(4)) for _ in range(2))
    assert set(bench_checks.differing(one, other)) == {"weight", "bias", "running_mean", "running_var"}
    assert bench_checks.differing(one, one) == []
    assert bench_checks.differing(one, one.double()) == []  # in place: the same module
    assert bench_checks.differing(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)) == ["bias", "weight"]


def test_an_edit_reaches_every_parameter() -> None:
    model = bench_checks.randomise(build_network("cifar.resnet8", num_classes=10))
    graph = to_graph(model, torch.randn(1, 3, 32, 32))
    changed = bench_checks.edited(graph)
    assert all(not torch.equal(a, b) for a, b in zip(graph.edge_features, changed.edge_features, strict=True))
    assert bench_checks.unmoved(model, graph) == list(graph.spec.shapes)


def test_outputs_must_be_comparable() -> None:
    model = nn.Linear(2, 2)
    model.weight.data.fill_(float("nan"))
    with pytest.raises(NetworkError, match="finite"):
        bench_checks.outputs(model, (torch.ones(1, 2),))


# -- reports -----------------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    shared: dict[str, Any] = {"versions": {"torch": "2.6", "timm": "1.0"}, "family": "vit", "options": {}}
    good = {"ok": True, "bit_exact": True, "error": "", "share": 0.9, "layer_share": 1.0, "traced_by": "run"}
    sizes = {"parameters": 5_700_000, "nodes": 100, "edges": 2000, "blocks": 3, "frozen": None}
    return [
        {"name": "vit_b", **shared, **good, **sizes, "carried": {"pos_embed": 37_824}},
        {"name": "vit_a", **shared, "ok": False, "error": "killed by signal 9 | [out of memory?]"},
    ]


def test_the_section_names_failures_and_what_is_carried() -> None:
    text = bench_report.section("timm", rows(), ["vit_a", "vit_b", "vit_c"])
    assert "torch 2.6, timm 1.0" in text
    assert "* 1 of 2 round-trip bit-exact" in text
    assert "* 1 not converted yet" in text
    assert "| vit_a | killed by signal 9 \\| [out of memory?] |" in text
    assert "| vit_b | pos_embed 37,824 |" in text
    assert "| vit_b (vit) | 5.7 M | 90.0 % | 100.0 % |  | 100 | 2,000 | 3 | run |" in text
    assert text.index("vit_a") < text.index("vit_b")


def test_a_section_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "coverage.md"
    bench_report.write_section(page, "timm", "former words")
    assert page.read_text().startswith("# What of a network is in its graph\n\nRandom weights")
    bench_report.write_section(page, "extra", "other")
    page.write_text(page.read_text().replace("# What", "By hand.\n\n# What") + "\nThe end.\n")
    bench_report.write_section(page, "timm", "new")
    text = page.read_text()
    assert "<!-- suite:timm -->\nnew\n<!-- /suite -->\n\n<!-- suite:extra -->\nother\n<!-- /suite -->" in text
    assert text.startswith("By hand.\n\n# What")
    assert text.endswith("The end.\n")
    assert "former" not in text


def test_a_section_without_an_end_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "coverage.md"
    page.write_text("<!-- suite:timm -->\n\n<!-- suite:extra -->\n<!-- /suite -->\n")
    before = page.read_text()
    with pytest.raises(GmnError, match="no end"):
        bench_report.write_section(page, "timm", "new")
    assert page.read_text() == before


def test_the_table_shows_brackets_and_failures_last(capsys: pytest.CaptureFixture[str]) -> None:
    bench_report.show("title", rows())
    shown = capsys.readouterr().out
    assert "[out of memory?]" in shown
    assert shown.index("vit_b") < shown.index("vit_a")
    assert "1 of 2 round-trip bit-exact" in shown


def gmn_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of `gmn bench convert ARGUMENTS`, called here: a process of its own takes seconds."""
    monkeypatch.setattr(sys, "argv", ["gmn", "bench", "convert", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 when a network fails; what is in the file is not converted again."""
    monkeypatch.chdir(tmp_path)
    for name, ok in (("lstm", True), ("gru", False)):
        row = {"name": name, "ok": ok, "error": "" if ok else "broken"}
        append_line(tmp_path / "bench" / "convert-extra.jsonl", row)
    both = ("--suite", "extra", "--only", "^(lstm|gru)$", "--markdown", "coverage.md")
    assert gmn_command(monkeypatch, *both) == 1
    assert "broken" in capsys.readouterr().out
    assert "* 14 not converted yet" in (tmp_path / "coverage.md").read_text()
    assert gmn_command(monkeypatch, "--suite", "extra", "--only", "lstm") == 0
    assert gmn_command(monkeypatch, "--suite", "extre") == 2
    assert "'extra'" in capsys.readouterr().err


def test_torn_lines_are_closed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": \xff')
    append_line(path, {"c": 3})
    assert list(read_lines(path)) == [{"a": 1}, {"c": 3}]
    assert list(read_lines(tmp_path / "none")) == []


def test_only_what_was_added_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of another process may be there in part; one that a killed process left stays torn."""
    path = tmp_path / "lines.jsonl"
    tail, read, entries = Tail(path), list[bytes](), jsonl.entries
    monkeypatch.setattr(jsonl, "entries", lambda content: read.append(content) or entries(content))
    assert list(tail.new()) == []
    append_line(path, {"a": 1})
    append_line(path, {"b": 2})
    assert list(tail.new()) == [{"a": 1}, {"b": 2}]
    with path.open("a") as file:
        file.write('{"c"')
    assert list(tail.new()) == []
    with path.open("a") as file:
        file.write(': 3}\n{"d')
    assert list(tail.new()) == [{"c": 3}]
    append_line(path, {"e": 5})
    assert list(tail.new()) == [{"e": 5}]
    assert list(tail.new()) == []
    assert read == [b'{"a": 1}\n{"b": 2}\n', b'{"c"', b'{"c": 3}\n{"d', b'{"d\n{"e": 5}\n', b""]
