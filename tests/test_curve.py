"""Contract of `gmn curve` and `gmn select`, and of looking at checkpoints while the metanetwork learns.

* A curve starts at the whole network; its turning point lies on the line between two points.
* Curves of a run's checkpoints end as JSON and a picture; a checkpoint that is not there is refused.
* The search finds the last checkpoint above a threshold in as many probes as a binary search needs, and says so when
  there is none. Probes are recorded and not made again.
* What `select --use` takes makes the run's rows: those of another metanetwork are made again, and no report mixes both.
* A metanetwork that gets no better for long enough stops learning, also when the run was resumed in between; looks
  are made once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY, quickstart

from gmn import checkpoint_search, curve, pipeline, plots, report_page
from gmn import report as reports
from gmn.checkpoint import load_json, save_json
from gmn.checkpoint_search import Probe, search
from gmn.curve import turning_point
from gmn.curve_cli import curve as draw_curves
from gmn.curve_cli import select
from gmn.errors import GmnError
from gmn.meta_job import MetaJob
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run, load_report
from gmn.settings import Recipe
from gmn.settings_vote import VoteRecipe

LOOKING = [*TINY, "meta_train.epochs=3", "meta_train.eval_every=1", "report.baselines=[]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "looking"
    pipeline.meta_train(load_recipe("quickstart", LOOKING), folder)
    return folder


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def test_turning_points_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_finish", lambda figure, axes, path, **_: drawn.append(axes) or path)
    points = [(1.0, 0.9), (2.0, 0.7)]
    ends = {0: 1.5, 1: None, 3: 1.25}
    entries = [{"checkpoint": epoch, "points": points, "turning_point": end} for epoch, end in ends.items()]
    content = {"curves": entries, "threshold": 0.8, "finetune_images": 0, "axis": "speed-up"}
    plots.curves(content, "test", Path("curve.png"))
    marks = [line.get_xydata().tolist() for line in drawn[0].lines if line.get_marker() == "D"]
    assert marks == [[[1.5, 0.8]], [[1.25, 0.8]]]


def test_turning_points() -> None:
    falling = [(1.0, 0.9), (2.0, 0.8), (3.0, 0.85), (5.0, 0.45)]
    assert turning_point(falling, 0.8) == pytest.approx(3.25)  # 0.8 itself is not under 0.8
    assert turning_point(falling, 0.85) == pytest.approx(1.5)
    assert turning_point(falling, 0.95) == 1.0
    assert turning_point(falling, 0.4) is None


def test_curves_of_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_curves(run, checkpoints="0, 3", points=3, images=50, drop=0.5, finetune_images=0)
    content = json.loads((run / "curves" / "curve.json").read_text())
    with (job := pipeline.reopened_metanetwork(run)).run:
        whole, judge = job.cost(job.built(1)), job.cost(job.data_model(1))
    assert [entry["checkpoint"] for entry in content["curves"]] == [0, 3]
    for entry in content["curves"]:
        speeds = [speed for speed, _ in entry["points"]]
        assert len(speeds) == 4
        assert speeds[0] == whole.flops / judge.flops > 1.2  # they count from before the initial pruning
        assert speeds == sorted(speeds)
        assert entry["turning_point"] == turning_point([(s, a) for s, a in entry["points"]], content["threshold"])
    assert (run / "curves" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "turning point" in capsys.readouterr().out
    with pytest.raises(GmnError, match=r"no such checkpoint.*0, 1, 2, 3.*got 7"):
        draw_curves(run, checkpoints="7", points=3, images=50, drop=0.5, finetune_images=0)


def test_a_curve_says_that_its_networks_are_fine_tuned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_curves(run, checkpoints="0", points=1, images=50, drop=0.5, finetune_images=64)
    assert "(validation, 64 images of fine-tuning)" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_checkpoints_has_no_curve(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(GmnError, match=r"the run has no checkpoints.*gmn meta-train"):
        draw_curves(copy, checkpoints="0", points=1, images=50, drop=0.5, finetune_images=0)


def test_usual_checkpoints_are_none_the_best_and_the_last(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[int]] = []
    nothing = {"axis": "speed-up", "threshold": 0.5, "finetune_images": 0, "curves": []}
    monkeypatch.setattr(curve, "study", lambda _, choices: chosen.append(list(choices.checkpoints)) or nothing)
    draw_curves(run, checkpoints=None, points=3, images=50, drop=0.5, finetune_images=0)
    scores = {entry["epoch"]: entry["validation_accuracy"] for entry in events(run, "select")}
    best = max((1, 2, 3), key=lambda epoch: scores[epoch])
    assert chosen == [sorted({0, best, 3})]


@pytest.mark.parametrize("good", [1, 2, 5, 12, 13])
def test_the_search_is_binary(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(_: object, epoch: int, images: int) -> Probe:
        return Probe(epoch, 0.9 if epoch <= good else 0.8, 0.5)

    monkeypatch.setattr(checkpoint_search, "_probe", probe)
    job: Any = SimpleNamespace(checkpoints=lambda: list(range(1, 14)))
    epoch, probes = search(job, 0.85, finetune_images=0)
    assert epoch == good
    assert len(probes) <= 4
    with pytest.raises(GmnError, match=r"no checkpoint is accurate enough.*95\.00%.*90\.00%"):
        search(job, 0.95, finetune_images=0)


def test_probes_are_recorded_and_made_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        select(run, min_accuracy=0.01, finetune_images=32, use=True)
    probes = events(run, "probe")
    assert [probe["checkpoint"] for probe in probes] == [2, 3]
    assert len([line for line in events(run, "fit") if line["title"] == "fine-tuning after checkpoint 3"]) == 2
    assert "checkpoint 3: gmn prune" in capsys.readouterr().out
    assert events(run, "use")[-1]["checkpoint"] == 3
    with pytest.raises(GmnError, match=r"not an accuracy.*91"):
        select(run, min_accuracy=91, finetune_images=0, use=False)


def test_rows_are_of_the_metanetwork_that_is_used(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recipe = tmp_path / "run", load_recipe(run / "recipe.yaml")
    assert isinstance(recipe, Recipe)
    shutil.copytree(run, folder)
    shutil.copy(folder / "checkpoints" / "epoch-001.safetensors", folder / "metanetwork.safetensors")
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "models" / "metanetwork-seed0")
    first = pipeline.meta_train(recipe, folder, resume=True)
    capsys.readouterr()
    select(folder, min_accuracy=0.01, finetune_images=32, use=True)  # the third
    reports.show(load_report(folder), folder)
    assert "warning: the report is of another metanetwork than the run has now" in capsys.readouterr().err
    second = pipeline.meta_train(recipe, folder, resume=True)
    said = capsys.readouterr().err
    assert "models/metanetwork-seed0: of another metanetwork than the run's; it is made again" in said
    assert first["metanetwork_sha256"] != second["metanetwork_sha256"]
    for report in (first, second):
        assert [result["metanetwork_sha256"] for result in report["results"]] == [report["metanetwork_sha256"]]
    fresh = tmp_path / "fresh"
    shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("report.json", "statistics.json", "metanetwork-seed0"))
    again = pipeline.meta_train(recipe, fresh, resume=True)
    assert {**again, "latency": 0} == {**second, "latency": 0}
    assert load_json(fresh / "statistics.json") == load_json(folder / "statistics.json")
    reports.show(load_report(folder), folder)
    assert "warning" not in capsys.readouterr().err


def test_a_page_without_the_statistics_of_another_metanetwork(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    title = "What the metanetwork did to the weights"
    assert title in report_page.write(load_report(folder), folder).read_text()
    content = load_json(folder / "statistics.json")
    save_json(folder / "statistics.json", {**content, "metanetwork_sha256": "f" * 64})  # stopped before its report
    assert title not in report_page.write(load_report(folder), folder).read_text()


def test_rows_of_an_older_gmn_are_taken_as_they_are(run: Path, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", load_recipe(run / "recipe.yaml")
    assert isinstance(recipe, Recipe)
    shutil.copytree(run, folder)
    path = folder / "models" / "metanetwork-seed0" / "model.json"
    save_json(path, {key: value for key, value in load_json(path).items() if key != "metanetwork_sha256"})
    before = path.read_bytes()
    shutil.copy(folder / "checkpoints" / "epoch-001.safetensors", folder / "metanetwork.safetensors")
    pipeline.meta_train(recipe, folder, resume=True)
    assert path.read_bytes() == before


def test_looks_are_made_once_and_kept_for_the_choice(run: Path) -> None:
    assert [look["epoch"] for look in events(run, "select")] == [1, 2, 3, 0]


@pytest.mark.parametrize(("images", "steps"), [("null", None), ("0", 0), ("320", 10)])
def test_a_look_fine_tunes_briefly_if_it_is_to(images: str, steps: int | None, tmp_path: Path) -> None:
    recipe: Any = quickstart(*LOOKING, f"meta_train.finetune_images={images}")
    with Run(tmp_path / "run", dump_recipe(recipe)) as folder:
        MetaJob(recipe, folder).score(0)
    fits = [line for line in events(tmp_path / "run", "fit") if line["title"] == "fine-tuning after checkpoint 0"]
    assert len(fits) == (recipe.finetune.after_meta.epochs if steps is None else bool(steps))
    if steps:
        batch = recipe.finetune.after_meta.batch_size
        assert MetaJob(recipe, folder).brief(320).iterations == steps == 320 // batch


def test_learning_stops_when_it_gets_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Any = load_recipe("quickstart", [*LOOKING, "meta_train.epochs=6", "meta_train.patience=2"])
    scores = {1: 0.5, 2: 0.6, 3: 0.6, 4: 0.55}
    monkeypatch.setattr(MetaJob, "score", lambda _, epoch: scores[epoch])
    job = MetaJob(recipe, Run(tmp_path / "run", dump_recipe(recipe)))
    job.learn()
    assert job.checkpoints() == [1, 2, 3, 4]
    MetaJob(recipe, Run(tmp_path / "run", dump_recipe(recipe), resume=True)).learn()
    assert job.checkpoints() == [1, 2, 3, 4]
    scores[4] = 0.7
    monkeypatch.setattr(MetaJob, "score", lambda _, epoch: scores.get(epoch, 0.1))
    job.learn()  # what is better at the last moment goes on
    assert job.checkpoints() == [1, 2, 3, 4, 5, 6]


def test_wrong_inputs(tiny_vote_recipe: VoteRecipe, command: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(GmnError, match="patience counts looks"):
        load_recipe("quickstart", ["meta_train.patience=2"])
    without = ["finetune.after_meta=null", "finetune.after_prune=null", "report.baselines=[direct]"]
    with pytest.raises(GmnError, match=r"meta_train.finetune_images: no fine-tuning"):
        load_recipe("quickstart", [*without, "meta_train.finetune_images=320"])
    assert load_recipe("quickstart", [*without, "meta_train.finetune_images=0"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_vote_recipe))
    with pytest.raises(GmnError, match="the run has no metanetwork"):
        draw_curves(tmp_path, checkpoints="0", points=3, images=50, drop=0.5, finetune_images=0)
    answer = command("curve", "nowhere", cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "not a run folder" in answer.stderr
