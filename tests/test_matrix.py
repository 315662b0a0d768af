"""Contract of the transfer matrix.

* Every cell is what the single commands give, bit for bit, for networks of other sizes, images and classes.
* A run stopped anywhere goes on there and ends with the same report; what is finished is not done again.
* An entry that is only a row learns nothing, one that is only a column prunes nothing.
* A network that fits no metanetwork of its row is refused before anything is trained, and nothing is left behind.
* The table on the terminal, in Markdown and on the page says the same.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from made_runs import call
from rich.console import Console
from torch import Tensor, nn

from gmn import matrix_report, matrix_runs, pipeline
from gmn.checkpoint import save_text
from gmn.consoles import plain_console
from gmn.errors import GmnError
from gmn.matrix import Matrix
from gmn.permission import allow_code
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run, load_report
from gmn.settings import Recipe
from gmn.settings_matrix import MatrixRecipe

RECIPE = """
method: matrix
common: {base: quickstart}
entries:
  grey: {}
  rgb:
    data: {name: "test_matrix:coloured", augment: {crop: 0, flip: true}}
    network: {name: "test_matrix:plain", options: {kernels: [3, 3, 3]}}
"""
SHORT = [
    *(f"common.{override}" for override in TINY if not override.startswith("network")),
    *("common.data.limit=120", "common.data_models.val=0", "common.meta_train.epochs=1", "common.prune.steps=60"),
    "entries.grey.network.options={width: 4, shortcut: B}",
]


def coloured() -> list[tuple[Tensor, Tensor]]:
    """Images of three classes, 12 pixels a side: one of the colours is bright."""
    parts: list[tuple[Tensor, Tensor]] = []
    for seed, count in enumerate((120, 60)):
        images = torch.randint(120, (count, 3, 12, 12), generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(count) % 3
        images[torch.arange(count), labels] += 90
        parts.append((images.byte(), labels))
    return parts


def plain(num_classes: int, in_channels: int, kernels: list[int]) -> nn.Module:
    """Convolutions of these sizes, one after the other."""
    layers: list[nn.Module] = []
    for size in kernels:
        layers += [nn.Conv2d(in_channels, 8, size, padding=size // 2), nn.BatchNorm2d(8), nn.ReLU()]
        in_channels = 8
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def loaded(*overrides: str) -> MatrixRecipe:
    Path("small.yaml").write_text(RECIPE)
    recipe = load_recipe("small.yaml", [*SHORT, *overrides])
    assert isinstance(recipe, MatrixRecipe)
    return recipe


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with allow_code():  # the recipes name functions of this file
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(RECIPE)
    with allow_code():
        return folder / "run", pipeline.meta_train(load_recipe(folder / "small.yaml", SHORT), folder / "run")


def results(report: dict[str, Any], row: str) -> list[dict[str, Any]]:
    return [{**result, "row": ""} for result in report["results"] if result["row"] == row]


def test_every_cell_is_what_the_single_commands_give(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, report = finished
    entries, networks = loaded().entries, report["networks"]
    grey = pipeline.meta_train(entries["grey"], tmp_path / "grey")
    rgb = pipeline.prune_recipe(entries["rgb"], tmp_path / "rgb", tmp_path / "grey")
    for alone, label in ((grey, "grey"), (rgb, "rgb")):
        assert results(networks[label], "grey") == results(alone, "metanetwork")
        assert networks[label]["base"] == alone["base"]
        for row in ("direct", "same-schedule"):
            assert results(networks[label], row) == results(alone, row)
    cell, single = folder / "cells" / "rgb" / "grey", tmp_path / "rgb"
    for name in ("base", "start", "metanetwork-seed0"):
        file = f"models/{name}/weights.safetensors"
        assert (cell / file).read_bytes() == (single / file).read_bytes()
    assert (networks["grey"]["seen"], networks["rgb"]["seen"]) == (False, False)


def test_networks_are_trained_once(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    assert {result["row"] for result in report["networks"]["rgb"]["results"]} == {
        *("grey", "rgb", "direct", "same-schedule")
    }
    for row, column in (("grey", "rgb"), ("rgb", "grey")):
        cell = folder / "cells" / row / column
        assert "training network" not in (cell / "metrics.jsonl").read_text()
        assert "training network" in (folder / "entries" / row / "metrics.jsonl").read_text()
        assert (cell / "metanetwork.safetensors").read_bytes() == (
            folder / "entries" / column / "metanetwork.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(
    ("lost", "compared"),
    [
        (["report.json"], 0),
        (["report.json", "cells/rgb/grey/report.json", "cells/rgb/grey/models/metanetwork-seed0/model.json"], 1),
        (["report.json", "cells/grey", "entries/rgb/report.json", "entries/rgb/models/start/model.json"], 2),
    ],
)
def test_a_stopped_run_goes_on(
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: list[str],
    compared: int,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    for name in lost:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    calls: list[Any] = []
    done = matrix_runs.compare
    monkeypatch.setattr(matrix_runs, "compare", lambda *a, **k: calls.append(a) or done(*a, **k))
    assert pipeline.meta_train(loaded(), folder, resume=True) == load_report(finished[0])
    assert len(calls) == compared


def test_a_run_killed_in_a_cell_goes_on(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "cells")

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(matrix_runs, "compare", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.meta_train(loaded(), folder, resume=True)
    assert (folder / "cells" / "grey" / "rgb" / "models" / "base" / "model.json").is_file()
    (folder / "outside").mkdir()  # on a cluster: files that its jobs read
    assert pipeline.meta_train(loaded(), folder, resume=True) == load_report(finished[0])
    assert not (folder / "outside").exists()
    with pytest.raises(GmnError, match="cannot resume with another recipe"):
        pipeline.meta_train(loaded("entries.grey.seed=5"), folder, resume=True)


def test_another_metanetwork_is_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    home = tmp_path / "run" / "entries"
    shutil.copy(home / "rgb" / "checkpoints" / "epoch-001.safetensors", home / "grey" / "metanetwork.safetensors")
    with pytest.raises(GmnError, match="cannot resume with another metanetwork"):
        pipeline.meta_train(loaded(), tmp_path / "run", resume=True)


def test_only_a_row_and_only_a_column(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    columns_only = tmp_path / "run" / "entries" / "grey"
    recipe = loaded("rows=[rgb]", "columns=[grey]")
    save_text(tmp_path / "run" / "recipe.yaml", dump_recipe(recipe))
    shutil.copytree(
        finished[0] / "entries" / "grey", columns_only, ignore=shutil.ignore_patterns("report.json", "models")
    )
    report = pipeline.meta_train(recipe, tmp_path / "run", resume=True)
    full = finished[1]["networks"]["rgb"]
    without = [result for result in full["results"] if result["row"] != "rgb"]
    assert report["networks"] == {"rgb": {**full, "results": without, "seen": None}}
    row_only = tmp_path / "run" / "entries" / "rgb"
    assert {path.name for path in row_only.iterdir()} == {
        *("recipe.yaml", "environment.json", "metrics.jsonl", "models", "report.json")
    }
    assert not (columns_only / "models").exists()
    assert "†" not in matrix_report.text(report)


def test_without_metanetworks_any_criterion_can_be_compared(tmp_path: Path) -> None:
    recipe = loaded(
        "columns=[]", "rows=[grey]", "common.report.baselines=[direct]", "entries.grey.criterion.score=taylor"
    )
    report = pipeline.meta_train(recipe, tmp_path / "run")
    assert {result["row"] for result in report["networks"]["grey"]["results"]} == {"direct"}
    assert not (tmp_path / "run" / "entries" / "grey" / "checkpoints").exists()
    assert "metanetwork" not in matrix_report.caption(report)
    with pytest.raises(GmnError, match="entry grey: the criterion is no sparsity loss"):
        pipeline.meta_train(loaded("entries.grey.criterion.score=taylor"), tmp_path / "learns")


def test_each_network_with_its_own_metanetwork(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    recipe = loaded("columns=own")
    assert (recipe.metanetworks, recipe.cells) == (["grey", "rgb"], [])
    assert load_recipe("small.yaml", [*SHORT, "columns=own", "rows=[rgb]"]).used == ["rgb"]  # type: ignore[union-attr]
    save_text(tmp_path / "run" / "recipe.yaml", dump_recipe(recipe))
    shutil.copytree(finished[0] / "entries", tmp_path / "run" / "entries")
    report = pipeline.meta_train(recipe, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "cells").exists()
    assert report["columns"] == ["own"]
    for label, network in report["networks"].items():
        full = finished[1]["networks"][label]
        assert results(network, "own") == results(full, label)
        assert {result["row"] for result in network["results"]} == {"own", "direct", "same-schedule"}
    said = matrix_report.text(report)
    assert "| network | base | own | direct | none |" in said
    assert said.count("†") == 3  # in both rows, and what it means
    assert "own: the metanetwork that learnt with the settings of its row" in said
    assert "one metanetwork per row" in said
    assert "each network with its own metanetwork" in matrix_report.write(report, tmp_path / "run").read_text()


# -- refused before anything is trained --------------------------------------------------------------------------------


def of_kernels(grey: str, rgb: str, *overrides: str) -> MatrixRecipe:
    sizes = [f"entries.grey.network.options={{kernels: {grey}}}", f"entries.rgb.network.options={{kernels: {rgb}}}"]
    return loaded("entries.grey.network.name='test_matrix:plain'", *sizes, *overrides)


def test_a_network_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(GmnError) as caught:
        pipeline.meta_train(of_kernels("[5, 5]", "[5, 3]"), tmp_path / "run")
    said = str(caught.value)
    assert said.startswith("the network of rgb does not fit the metanetwork of grey: got ")
    assert "expected 5x5, 1; got 3x3" in said
    assert "graph.kernels: padded" in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()
    run = Run(tmp_path / "run", "")
    Matrix(of_kernels("[5, 5]", "[5, 3]", "common.graph.kernels=padded"), run)
    Matrix(of_kernels("[5, 5]", "[5, 3]", "rows=[grey]"), run)
    with pytest.raises(GmnError, match=r"entry rgb: the target speed-up is out of reach.*expected 90x"):
        pipeline.meta_train(loaded("entries.rgb.prune.speed_up=90"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_entries_are_recipes_over_what_is_common(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text("base: quickstart\nseed: 3\nprune: {speed_up: 4, steps: 5}\n")
    (tmp_path / "sub" / "matrix.yaml").write_text(
        "method: matrix\n"
        "common: {prune: {speed_up: 2.5}, network: {options: {width: 8}}, criterion: {p: 1}}\n"
        "entries:\n"
        "  a: mine.yaml\n  b: {base: quickstart, prune: {steps: 7}, network: {name: cifar.vgg11_bn}}\ncolumns: [a]\n"
    )
    change = [
        "entries.a.data_models.fit.epochs=20",
        "entries.a.criterion.alpha=0",
        "common.meta_train.lr=0.5",
        "entries.c=resnet20-cifar10",
    ]
    recipe = load_recipe("sub/matrix.yaml", change)
    assert isinstance(recipe, MatrixRecipe)
    a, b, c = (recipe.entries[label] for label in "abc")
    assert [(entry.name, entry.prune.speed_up, entry.prune.steps) for entry in (a, b, c)] == [
        *(("a", 2.5, 5), ("b", 2.5, 7), ("c", 2.5, 100))
    ]
    assert (a.network.options, b.network.options) == ({"width": 8, "shortcut": "B"}, {})
    assert (a.seed, a.meta_train.lr, b.meta_train.lr, c.meta_train.lr) == (3, 0.5, 0.5, 0.5)
    assert a.data_models.fit is not None
    assert b.data_models.fit is not None
    assert (a.data_models.fit.epochs, b.data_models.fit.epochs) == (20, 15)
    assert [(entry.criterion.p, entry.criterion.alpha) for entry in (a, b)] == [(1, 0), (1, 4)]
    assert (recipe.used, recipe.cells) == (["a", "b", "c"], [("b", "a"), ("c", "a")])
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe("again.yaml") == recipe


def test_what_is_common_replaces_as_in_a_single_recipe() -> None:
    change = "data_models.fit={epochs: 2, lr: 0.1}"
    alone, several = load_recipe("quickstart", [change]), loaded(f"common.{change}")
    assert isinstance(alone, Recipe)
    assert [entry.data_models.fit for entry in several.entries.values()] == [alone.data_models.fit] * 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["entries={}"], "bad value for 'entries': expected at least 1 item"),
        (["entries=[grey]"], "bad value for 'entries': expected a mapping of keys; got ['grey']"),
        (["entries.x=graph-mask-voting"], "expected metanetwork recipes; got method: 'vote' of x"),
        (["entries.x=small.yaml"], "expected metanetwork recipes; got method: 'matrix' of x; in small.yaml:2"),
        (["entries.x=quickstrat"], "no recipe 'quickstrat'"),
        (["entries.x=3"], "bad value for 'entries.x': expected a mapping of keys; got 3"),
        (["entries.direct=quickstart"], "the label 'direct' is the name of another column"),
        (["entries.a/b=quickstart"], "a label is letters, digits, - and _"),
        (["columns=[gray]"], "no entry 'gray', only grey, rgb; did you mean 'grey'?: in --set columns=[gray]"),
        (["columns=owm"], "bad 'columns': expected a list of entries, own or null; got 'owm': in --set"),
        (["entries.own=quickstart"], "the label 'own' is the name of another column"),
        (["rows=[grey, grey]"], "the label 'grey' comes twice"),
        (["rows=[]"], "bad value for 'rows': expected at least 1 item"),
        (["columns=[]", "common.report.baselines=[]"], "nothing to compare in the row grey, which is no column"),
        (["columns=[rgb]", "common.report.baselines=[]"], "nothing to compare in the row grey, which is no column"),
        (["common.report.speed_ups=[1.5]"], "a matrix has one speed-up: leave report.speed_ups out of grey"),
        (["common.report.metanetworks={rgb: runs/x}"], "metanetworks of grey has the name of another column: rgb"),
        (["common.report.metanetworks={none: runs/x}"], "none"),
        (["common=3"], "bad value for 'common': expected a mapping of keys; got 3; in --set common=3"),
        (["comon.seed=3"], "did you mean 'common'?"),
        (["prune.speed_up=3"], "for all entries: common.prune"),
        (["common.prune.sped_up=3"], "in --set common.prune.sped_up=3 (entries.grey.prune); did you mean 'speed_up'?"),
        (
            ["entries.rgb.meta_train.epochs=x"],
            "bad value for 'entries.rgb.meta_train.epochs': expected a valid integer",
        ),
        (["entries.grey.meta_train={}"], "missing key 'epochs'"),
        (["common.prune.speed_up=1.1"], "bad 'entries.grey': prune.speed_up (1.1) counts from before"),
    ],
)
def test_mistakes_in_the_recipe(overrides: list[str], said: str) -> None:
    Path("small.yaml").write_text(RECIPE)
    with pytest.raises(GmnError) as caught:
        load_recipe("small.yaml", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the table ---------------------------------------------------------------------------------------------------------


def made(row: str, test: float, pruned: float = 0.5, speed_up: float = 3.0) -> dict[str, Any]:
    numbers = {"validation_accuracy": test, "test_accuracy": test, "flops": 10.0, "parameters": 5}
    return {"row": row, "seed": 0, "stages": {"pruned": pruned}, "speed_up": speed_up, **numbers}


COMMON = {"speed_up": 3.0, "initial_speed_up": 1.0, "validation_images": 359, "test_images": 360}
REPORT: dict[str, Any] = {
    "recipe": "two",
    "method": "matrix",
    "columns": ["small", "large"],
    "networks": {
        "small": {
            **{**COMMON, "finetune_images": 9702, "seen": False, "base": made("base", 0.98, speed_up=1.0)},
            "results": [
                *(made("small", 0.90, 0.7), made("small", 0.92, 0.8), made("large", 0.95, 0.6), made("large", 0.95)),
                *(made("same-schedule", 0.9, 0.4), made("same-schedule", 0.9, 0.2), made("direct", 0.875, 0.1, 3.25)),
            ],
        },
        "large": {
            **{**COMMON, "finetune_images": 9702, "seen": True, "base": made("base", 0.99, speed_up=1.0)},
            "results": [made("small", 0.96, 0.5), made("large", 0.97), made("same-schedule", 0.96)],
        },
    },
}
MARKDOWN = """\
| network | base | small | large | none | direct |
| --- | --- | --- | --- | --- | --- |
| small | 98.00 | 91.00 ± 1.41† | **95.00 ± 0.00** | 90.00 ± 0.00 | 87.50 |
| large | 99.00 | 96.00 | **97.00**‡ | 96.00 | - |
"""
BEFORE = """\
| network | base | small | large | none | direct |
| --- | --- | --- | --- | --- | --- |
| small | 98.00 | 75.00 | 55.00 | 30.00 | 10.00 |
| large | 99.00 | 50.00 | 50.00 | 50.00 | - |
"""


def test_the_table_of_a_report_written_by_hand() -> None:
    text = matrix_report.text(REPORT)
    assert text.startswith(MARKDOWN)
    assert "; bold: the best of a row; " in text
    assert BEFORE in text
    assert "| small | 1.00x | 3.00x | 3.00x | 3.00x | 3.25x |" in text
    console = Console(width=120, force_terminal=True, highlight=False)
    with console.capture() as captured:
        console.print(matrix_report.table(REPORT))
    shown = captured.get()
    assert "\x1b[1m95.00 ± 0.00*\x1b[0m" in shown
    assert "\x1b[1m97.00*\x1b[0m‡" in shown
    assert "\x1b[1m91" not in shown


def test_a_label_is_no_style(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "[/x] [red]:M:"
    content = {**REPORT, "recipe": odd, "networks": {odd: REPORT["networks"]["large"]}}
    plain_console(width=120).print(matrix_report.table(content))
    shown = capsys.readouterr().out
    assert shown.count(odd) == 2  # title and row
    assert " 97.00* " in shown


def test_what_one_must_know_to_read_the_table() -> None:
    said = matrix_report.caption(REPORT)
    assert "†: the metanetwork learnt on networks of this kind; " in said
    assert "‡: the metanetwork learnt on this very network; " in said
    budget = "pruned to 3x with 9,702 fine-tuning images, 359 validation and 360 test images"
    assert f"small: {budget}, 2 seeds; large: {budget}, 1 seed;" in said
    assert "none: the same schedule without metanetwork" in said
    same = {**REPORT, "networks": dict.fromkeys(("a", "large"), REPORT["networks"]["large"])}
    assert f"; {budget}, 1 seed;" in matrix_report.caption(same)
    assert "direct" not in matrix_report.caption(same)


def test_the_report_of_a_finished_run(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished[0]
    assert call(monkeypatch, "report", str(folder)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert f"page: {folder / 'report.html'}" in out
    accuracy = f"{100 * finished[1]['networks']['grey']['results'][0]['test_accuracy']:.2f}"
    page = (folder / "report.html").read_text()
    for text in (out, page, (folder / "matrix.md").read_text()):
        assert re.search(rf"{accuracy}\*{{0,2}}†", text)
    assert f'<td class="number">{accuracy}' in page
    assert ">How it was made</h2>" in page
    assert call(monkeypatch, "report", str(folder / "cells" / "rgb" / "grey")) == 0  # an ordinary run


def test_other_commands_point_to_the_entries(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(finished[0])
    Path("small.yaml").write_text(RECIPE)
    for arguments, said in (
        (["export", folder, "-o", "out"], f"expected one of the runs in {folder}/entries and {folder}/cells"),
        (["prune", "quickstart", "--meta", folder], f"take a run of the matrix's {folder}/entries"),
        (["prune", "small.yaml", "--meta", folder], "gmn meta-train small"),
        (["curve", folder], "expected a run of a recipe with `method: metanetwork`"),
        (["join", folder], "the run has no zoo"),
    ):
        assert call(monkeypatch, *arguments) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert said in errors[0]
