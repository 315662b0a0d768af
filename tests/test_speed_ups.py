"""One comparison at several speed-ups, with several metanetworks.

* It ends with the results of a run for each speed-up, bit for bit; what comes before pruning happens once per row.
* A resumed run repeats what is missing and nothing else, with its own copies of the metanetworks.
* The report groups by speed-up, for `gmn report` too; runs with one speed-up, and of an older gmn, look as they did.
* All rows are in one picture that tells them apart, and the curve has those that are fine-tuned before pruning.
* Speed-ups, labels and metanetworks that cannot work are one line, before anything is trained.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, quickstart
from rich.console import Console
from torch import nn

import gmn
from gmn import checkpoint, compare, pipeline, report, report_page
from gmn.baselines import ROWS
from gmn.compare import summarise, tables_of
from gmn.curve import curve_of
from gmn.errors import GmnError, RecipeError
from gmn.meta_job import MetaJob
from gmn.plots import draw, styles
from gmn.recipe import dump_recipe
from gmn.report import TITLES
from gmn.run import Run, load_report
from gmn.run_cost import account, meta_training
from gmn.run_networks import best, side_by_side
from gmn.settings import Recipe
from gmn.settings_report import labelled

SCHEDULED = ["metanetwork", "paper's gradient", "same-schedule", "sparse", "torch-pruning-sparse"]
AT_ONCE = ["direct", "torch-pruning", "random"]
TINIER = [
    *(*TINY, "data.limit=100", "prune.steps=50", "data_models.val=0", "meta_train.epochs=1"),
    "network={name: test_speed_ups:small, options: {}}",
]
BASELINES = f"report.baselines=[{', '.join(row for row in [*SCHEDULED[2:], *AT_ONCE])}]"


def small(num_classes: int, in_channels: int) -> nn.Module:
    """A network that is traced and pruned in no time."""
    return nn.Sequential(
        *(nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes)),
    )


@pytest.fixture(scope="module", autouse=True)
def short_curves() -> Iterator[None]:
    """Curves of four points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "curve_of", partial(curve_of, points=3))
        yield


def recipe(*more: str) -> Recipe:
    return quickstart(*TINIER, *more)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if e["event"] == name]


def other(path: Path, own: Path) -> str:
    """Another metanetwork in a file, as a setting."""
    network, layout, _ = checkpoint.load_metanetwork(own)
    for parameter in network.parameters():
        parameter.data.add_(0.3)
    checkpoint.save_metanetwork(path, network, layout)
    return f'report.metanetworks={{"paper\'s gradient": {path}}}'


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that meta-trained; beside it another metanetwork."""
    folder = tmp_path_factory.mktemp("runs") / "meta"
    pipeline.meta_train(recipe("report.baselines=[]"), folder)
    return folder


@pytest.fixture(scope="module")
def setting(meta: Path) -> str:
    return other(meta.parent / "other.safetensors", meta / "metanetwork.safetensors")


@pytest.fixture(scope="module")
def several(meta: Path, setting: str) -> Path:
    folder = meta.parent / "several"
    pipeline.prune_recipe(recipe(BASELINES, setting, "report.speed_ups=[2.4]"), folder, meta)
    return folder


def comparable(own: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in own.items() if key != "latency"}
    return {**plain, "further": [comparable(part) for part in own.get("further", [])]}


def test_as_a_run_for_each_speed_up(several: Path, meta: Path, setting: str, tmp_path: Path) -> None:
    parts = tables_of(load_report(several))
    assert [part["speed_up"] for part in parts] == [1.8, 2.4]
    for part in parts:
        target = f"{part['speed_up']:g}"
        single = tmp_path / target
        pipeline.prune_recipe(recipe(BASELINES, setting, f"prune.speed_up={target}"), single, meta)
        alone = load_report(single)
        assert [result["row"] for result in alone["results"]] == [*SCHEDULED, *AT_ONCE]
        assert alone["results"] == part["results"]
        assert alone["base"] == part["base"]
        for result in alone["results"]:
            name, where = f"{result['row']}-seed0", several / "models" / ("" if target == "1.8" else "2.4x")
            weights = [folder / name / "weights.safetensors" for folder in (where, single / "models")]
            assert weights[0].read_bytes() == weights[1].read_bytes()
        assert set(alone["curve"]) == {"with metanetwork", "with paper's gradient", "without"}
        assert all(load_report(several)["curve"][name] == points for name, points in alone["curve"].items())
        assert not (single / "models" / "first").exists()
        assert "further" not in alone
    rewritten = [result["stages"]["rewritten"] for result in parts[0]["results"][:2]]
    assert rewritten[0] != rewritten[1]  # two metanetworks


def test_what_comes_before_pruning_happens_once(several: Path) -> None:
    titles = [entry["title"] for entry in events(several, "fit")]
    assert titles.count("initial fine-tuning of network 1") == 1
    first = Counter(title.split(" seed 0: ")[0] for title in titles if title.endswith(" seed 0: fine-tuning"))
    assert first == dict.fromkeys(SCHEDULED, 1)
    last = Counter(title.split(" seed 0, ")[0] for title in titles if "after pruning" in title)
    assert last == {**dict.fromkeys(SCHEDULED, 2), **dict.fromkeys(AT_ONCE, 6)}
    stages = Counter((e["stage"], e["row"]) for e in events(several, "cost") if "row" in e)
    for row in SCHEDULED:
        assert (stages["rewriting", row], stages["first fine-tuning", row], stages["pruning", row]) == (1, 1, 2)
    for row in AT_ONCE:
        assert (stages["rewriting", row], stages["pruning", row], stages["last fine-tuning", row]) == (0, 2, 2)


def test_a_resumed_run_repeats_what_is_missing(several: Path, meta: Path, setting: str, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    shutil.copytree(several, folder)
    shutil.rmtree(folder / "models" / "2.4x" / "sparse-seed0")
    (folder / "report.json").unlink()
    moved = (meta.parent / "other.safetensors").rename(tmp_path / "elsewhere")
    before = len(events(folder, "cost")), len(events(folder, "learnt"))
    own = recipe(BASELINES, setting, "report.speed_ups=[2.4]")
    again = pipeline.prune_recipe(own, folder, meta, resume=True)
    moved.rename(meta.parent / "other.safetensors")
    assert comparable(json.loads(json.dumps(again))) == comparable(load_report(several))
    new = [(e["stage"], e["row"], e["speed_up"]) for e in events(folder, "cost")[before[0] :]]
    assert new == [("pruning", "sparse", 2.4), ("last fine-tuning", "sparse", 2.4)]
    assert len(events(folder, "learnt")) == before[1] == 2


def test_the_run_has_its_own_copies_and_knows_their_cost(several: Path, meta: Path) -> None:
    copy = several / "metanetworks" / "paper's gradient.safetensors"
    assert copy.read_bytes() == (meta.parent / "other.safetensors").read_bytes()
    label, main = events(several, "learnt")
    assert main["parts"] == {name: vars(spent) for name, spent in meta_training(meta).items()}
    assert list(main["parts"]) == ["data models", "meta-training", "choosing"]
    assert (label["row"], label["parts"]) == ("paper's gradient", {})
    content = account(several, [5], ["paper's gradient"])
    assert len(content["pruning"]) == 2 * len([*SCHEDULED, *AT_ONCE])
    assert all(entry["seconds"] > 0 and entry["peak_mb"] > 50 for entry in content["pruning"])


def test_costs_of_a_run_fit_into_its_time(meta: Path) -> None:
    times = [line["time"] for line in map(json.loads, (meta / "metrics.jsonl").read_text().splitlines())]
    costs = events(meta, "cost")
    assert sum(line["seconds"] for line in costs[1:]) <= times[-1] - times[0] + 0.05
    assert {line["stage"] for line in costs} == {
        *("network", "meta-training", "choosing"),
        *("rewriting", "first fine-tuning", "pruning", "last fine-tuning"),
    }


def test_the_report_has_a_table_for_each_speed_up(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(load_report(several), several, Console(width=200))
    out = capsys.readouterr().out
    assert out.index("pruned to 1.8x") < out.index("pruned to 2.4x")
    words = " ".join(out.split())
    assert words.count("direct: pruned at once") == 1
    assert "paper's gradient: as metanetwork, with that of" in words
    text = (several / "report.html").read_text()
    assert "pruned to 1.8x, 2.4x</h1>" in text
    assert "One line per way to prune. Pruned to 2.4x." in text
    assert "Test accuracy and speed-up" in text
    assert "Rows that say so were fine-tuned before it" in text
    content = load_report(several)
    assert set(content["curve"]) == {*SCHEDULED, "with metanetwork", "with paper's gradient", "without"}
    assert all(set(part["latency"]) == {"base", *SCHEDULED, *AT_ONCE} for part in tables_of(content))
    # commands that take one network of a run take those of prune.speed_up
    assert best(several, "paper's gradient") == several / "models" / "paper's gradient-seed0"
    assert len(side_by_side(several)) == 1 + len([*SCHEDULED, *AT_ONCE])
    with gmn.allow_code():  # the network is a function of this file
        assert gmn.load_model(several / "models" / "2.4x" / "direct-seed0")


def test_an_initial_pruning_that_is_found_stays_below_all_targets(tmp_path: Path) -> None:
    auto = ["data_models.initial_speed_up=auto", "data_models.initial_tolerance=100", "report.baselines=[]"]
    for name, more in (("one", []), ("two", ["report.speed_ups=[1.4]"])):
        own = recipe(*auto, *more)
        job = MetaJob(own, Run(tmp_path / name, dump_recipe(own)))
        job.initially_pruned(job.built(0), 0)
    found = [checkpoint.load_json(tmp_path / name / "initial.json")["speed_up"] for name in ("one", "two")]
    assert 1 < found[1] < 1.4 < found[0] < 1.8


def result(row: str, seed: int, speed_up: float, accuracy: float) -> dict[str, Any]:
    measured = {"validation_accuracy": accuracy, "test_accuracy": accuracy, "flops": 10.0, "parameters": 5}
    return {"row": row, "seed": seed, "stages": {}, **measured, "speed_up": speed_up}


def literal() -> dict[str, Any]:
    """A report as an older gmn wrote it."""
    return {
        **{"recipe": "old", "seen": False, "speed_up": 3.0, "validation_images": 10, "test_images": 20},
        **{"initial_speed_up": 1.2, "finetune_images": 1000, "select": [], "meta_train": []},
        "base": {key: value for key, value in result("base", 0, 1.0, 0.9).items() if key not in ("row", "seed")},
        "results": [result("direct", 0, 3.0, 0.5), result("direct", 1, 3.2, 0.7)],
        "latency": {"base": 2.0, "direct": 1.0},
        "curve": {"with metanetwork": [[1.0, 0.9], [2.0, 0.8]], "without": [[1.0, 0.9], [2.0, 0.7]]},
    }


def test_an_old_report_is_one_table(tmp_path: Path) -> None:
    old = literal()
    assert tables_of(old) == [old]
    (table,) = report.tables(old)
    assert table.title == "old: pruned to 3x"
    assert [list(column.cells)[1] for column in table.columns][:2] == ["direct", "60.00 ± 14.14"]
    assert {path.name for path in draw(old, tmp_path)} == {"curve.png", "accuracy.png"}


def test_literal_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    further = {"speed_up": 2.0, "results": [result("direct", 0, 2.1, 0.8)], "latency": {"base": 2.0, "direct": 1.5}}
    content = {**literal(), "further": [further]}
    low, high = tables_of(content)
    assert [(e["row"], e["speed_up"], e["latency"]) for e in summarise(low)[1:]] == [("direct", 2.1, 1.5)]
    assert [(e["row"], e["speed_up"], e["latency"]) for e in summarise(high)[1:]] == [("direct", 3.1, 1.0)]
    drawn: list[tuple[Any, ...]] = []
    from matplotlib.axes import Axes

    original = Axes.errorbar

    def errorbar(self: Axes, x: Any, y: Any, yerr: Any, **style: Any) -> Any:
        drawn.append((x, y, yerr, style["label"]))
        return original(self, x, y, yerr=yerr, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    assert "speed-ups.png" in {path.name for path in draw(content, tmp_path)}
    ((x, y, yerr, label),) = drawn
    assert (x, y, label) == ((2.1, 3.1), (0.8, 0.6), "direct")
    assert yerr == pytest.approx((0.0, 0.1414213562))
    (tmp_path / "recipe.yaml").write_text("name: old\n")
    checkpoint.save_json(tmp_path / "environment.json", {})
    assert report_page.write(content, tmp_path).read_text().count("data:image/png") == 3


def test_every_row_looks_different() -> None:
    labels = [f"ours {number}" for number in range(6)]
    found = styles({"metanetworks": dict.fromkeys(labels, "x")})
    assert set(found) == {"base", *ROWS, *labels}
    assert len({style["color"] for style in found.values()}) == len(found)
    assert len({style["marker"] for style in found.values()}) == len(found)


# What is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["report.speed_ups=[2, 2.4, 2.0]"], r"bad 'report.speed_ups': 2x comes twice"),
        (["report.speed_ups=[1.0]"], "greater than 1; got 1.0"),
        (["report.speed_ups=[2, 1.2]"], r"report.speed_ups \(1.2\) counts .* data_models.initial_speed_up \(1.2\)"),
        (["prune.speed_up=1.1"], r"prune.speed_up \(1.1\) counts from before"),
        (["report.metanetworks={sparse: x}"], "another row has the label 'sparse' already"),
        (["report.metanetworks={Same schedule: x}"], "another row has the label 'Same schedule' already"),
        (["report.metanetworks={ours: x, Ours: y}"], "another row has the label 'Ours' already"),
        (["report.metanetworks={with metanetwork: x}"], "another row has the label 'with metanetwork' already"),
        (["report.metanetworks={a/b: x}"], "a label is letters, digits and"),
        (["report.metanetworks={.hidden: x}"], "a label is letters, digits and"),
        (["report.metanetworks={'ours ': x}"], "a label is letters, digits and"),
        (["report.metanetworks=[x]"], "a mapping of keys"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipe(*overrides)
    assert "\n" not in str(caught.value)


def test_every_name_of_a_row_is_taken() -> None:
    for name in {*ROWS, *TITLES, *TITLES.values()}:
        with pytest.raises(ValueError, match="another row has the label"):
            labelled({name.upper(): "x"})
    assert recipe("report.speed_ups=[3, 1.5]").targets == [1.5, 1.8, 3.0]
    assert recipe("report.speed_ups=[1.8]").targets == [1.8]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("nowhere", "report.metanetworks, 'ours': nothing learnt here.*nowhere"),
        ("models/base/weights.safetensors", "report.metanetworks, 'ours': not a saved metanetwork"),
        ("small.safetensors", "report.metanetworks, 'ours'"),
    ],
)
def test_metanetworks_that_do_not_work_are_refused(meta: Path, tmp_path: Path, found: str, said: str) -> None:
    network = gmn.build_network("torchvision.resnet18", num_classes=10)
    path = meta / found
    if found == "small.safetensors":
        path = tmp_path / found
        job = gmn.to_graph(network, gmn.load_data("digits", limit=10).example_inputs().expand(-1, 3, -1, -1))
        kinds = job.spec.edge_kinds
        made = gmn.MetaNetwork(gmn.MetaNetworkConfig(15, kinds, layers=1, hidden=4))
        from gmn.convert import layouts

        checkpoint.save_metanetwork(path, made, layouts()["cnn"])
    own = recipe("report.baselines=[]", f"report.metanetworks={{ours: {path}}}")
    with pytest.raises(GmnError, match=said) as caught:
        pipeline.meta_train(own, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_speed_ups_share_is_of_one_metanetwork(
    several: Path, meta: Path, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `gmn select --use`, where rows were finished before."""
    folder, learnt = tmp_path / "several", meta.parent / "other.safetensors"
    shutil.copytree(several, folder)
    shutil.copy(learnt, folder / "metanetwork.safetensors")
    own = recipe(BASELINES, setting, "report.speed_ups=[2.4]")
    before = {row["row"]: row for row in load_report(folder)["results"]}
    parts = tables_of(pipeline.prune_recipe(own, folder, learnt, resume=True))
    said = capsys.readouterr().err
    for name in ("", "2.4x/", "first/"):
        assert f"models/{name}metanetwork-seed0: of another metanetwork than the run's; it is made again" in said
    assert said.count("of another metanetwork") == 3  # further rows and baselines stay
    for part in parts:
        rows = {row["row"]: row for row in part["results"]}
        assert rows["metanetwork"]["stages"] == rows["paper's gradient"]["stages"]  # the same one by now
    now = {row["row"]: row for row in parts[0]["results"]}
    assert now["metanetwork"]["metanetwork_sha256"] != before["metanetwork"]["metanetwork_sha256"]
    assert {row for row in now if now[row] != before[row]} == {"metanetwork"}


def test_a_metanetwork_is_not_overwritten(several: Path, meta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    shutil.copytree(several, folder)
    own = recipe("report.baselines=[]", f"report.metanetworks={{ours: {folder}}}")
    with pytest.raises(GmnError, match="'ours': it lies in the run folder that is to be replaced"):
        pipeline.prune_recipe(own, folder, meta, overwrite=True)
    assert (folder / "metanetwork.safetensors").is_file()


def test_a_speed_up_out_of_reach_is_found_before_training(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(GmnError, match=r"out of reach: expected 500x"):
        pipeline.meta_train(recipe("report.speed_ups=[500]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
