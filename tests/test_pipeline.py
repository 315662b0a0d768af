"""The whole way, on the shortened quickstart.

* a run leaves recipe, environment, metrics, checkpoints, networks, report and plots, and nothing temporary
* every row has the target speed-up, a test accuracy and a network that loads and gives that accuracy
* a run interrupted anywhere ends with the metrics of an uninterrupted one
* a saved metanetwork prunes a new network, by recipe and in Python
* a run folder is never overwritten or resumed with another recipe by accident
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gmn
from gmn import checkpoint, pipeline
from gmn.meta_job import MetaJob
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run, load_report
from gmn.settings import Recipe


@pytest.fixture(scope="module")
def finished(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, pipeline.meta_train(tiny_recipe, folder)


def without_time(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs between two runs of the same recipe."""
    plain = json.loads(json.dumps(report))
    plain.pop("latency")
    for event in [*plain["select"], *plain["meta_train"]]:
        event.pop("time")
    return plain


def test_a_run_leaves_everything_it_made(finished: tuple[Path, dict[str, Any]], tiny_recipe: Recipe) -> None:
    folder, report = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "report.json", "metanetwork.safetensors"} <= files
    assert {"checkpoints/epoch-001.safetensors", "checkpoints/epoch-002.safetensors"} <= files
    assert {f"data-models/{i}/model.json" for i in (0, 1)} <= files
    rows = ("base", "start", "metanetwork-seed0", "same-schedule-seed0", "direct-seed0")
    assert {f"models/{row}/weights.safetensors" for row in rows} <= files
    assert not [name for name in files if ".tmp" in name]
    assert load_recipe(folder / "recipe.yaml") == tiny_recipe
    assert json.loads(json.dumps(load_report(folder))) == json.loads(json.dumps(report))


def test_every_row_is_pruned_measured_and_loads(finished: tuple[Path, dict[str, Any]], tiny_recipe: Recipe) -> None:
    folder, report = finished
    data = gmn.load_data(**tiny_recipe.data.model_dump(exclude={"augment"}), seed=tiny_recipe.seed)
    assert [result["row"] for result in report["results"]] == ["metanetwork", "direct", "same-schedule"]
    for result in report["results"]:
        assert 1.8 <= result["speed_up"] < 2.1
        model = gmn.load_model(folder / "models" / f"{result['row']}-seed0")
        assert gmn.evaluate(model, data.test).accuracy == result["test_accuracy"]
        assert gmn.cost(model, data.example_inputs()).flops == result["flops"] < report["base"]["flops"]
    assert set(report["latency"]) == {"base", "metanetwork", "same-schedule", "direct"}
    assert set(report["curve"]) == {"with metanetwork", "without"}


def test_every_row_sees_the_same_number_of_images(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    epochs = {"metanetwork": 0, "same-schedule": 0, "direct": 0}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "fit" and entry["title"].split(" seed")[0] in epochs:
            epochs[entry["title"].split(" seed")[0]] += 1
    # the two other rows start from a network that had its initial fine-tuning epoch already
    assert epochs == {"metanetwork": 2, "same-schedule": 2, "direct": 3}
    assert report["finetune_images"] > 0


@pytest.mark.parametrize(
    "lost",
    [
        ["report.json", "models/direct-seed0/model.json"],
        ["report.json", "models", "metanetwork.safetensors", "checkpoints/epoch-002.safetensors"],
        ["report.json", "models", "metanetwork.safetensors", "checkpoints", "data-models/1"],
    ],
)
def test_an_interrupted_run_resumes(
    finished: tuple[Path, dict[str, Any]], tiny_recipe: Recipe, tmp_path: Path, lost: list[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(finished[0], folder)
    for name in lost:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = pipeline.meta_train(tiny_recipe, folder, resume=True)
    assert without_time(report) == without_time(finished[1])


def test_a_saved_metanetwork_prunes_a_new_network(
    finished: tuple[Path, dict[str, Any]], tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe.model_copy(update={"seed": 7})
    report = pipeline.prune_recipe(recipe, tmp_path / "new", finished[0] / "metanetwork.safetensors")
    assert report["base"]["test_accuracy"] != finished[1]["base"]["test_accuracy"]
    assert report["meta_train"] == []
    other = tmp_path / "other.safetensors"
    network, layout, _ = checkpoint.load_metanetwork(finished[0] / "metanetwork.safetensors")
    network.node_encoder.bias.data.add_(1.0)
    checkpoint.save_metanetwork(other, network, layout)
    with pytest.raises(gmn.GmnError, match="another metanetwork"):
        pipeline.prune_recipe(recipe, tmp_path / "new", other, resume=True)
    assert all(1.8 <= result["speed_up"] < 2.3 for result in report["results"])


def test_prune_in_python(finished: tuple[Path, dict[str, Any]], tiny_recipe: Recipe) -> None:
    data = gmn.load_data("digits", limit=200)
    model = gmn.load_model(finished[0] / "models" / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune = gmn.Fit(epochs=1, lr=0.01, batch_size=32)
    meta = gmn.load(finished[0])
    result = gmn.prune(model, data.example_inputs(), meta=meta, speed_up=1.5, finetune=tune, data=data)
    assert 1.5 <= result.report["speed_up"] < 1.8
    assert result.report["flops"] == gmn.cost(result.model, data.example_inputs()).flops
    assert 0 < result.report["validation_accuracy"] <= 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fine_tuning_without_data_is_refused() -> None:
    model = gmn.build_network("cifar.resnet8", num_classes=10)
    with pytest.raises(gmn.GmnError, match=r"fine-tuning needs data.*data=gmn.load_data"):
        gmn.prune(model, torch.zeros(1, 3, 8, 8), finetune=gmn.Fit(epochs=1, lr=0.1))


def test_a_run_folder_is_not_replaced_by_accident(tmp_path: Path, tiny_recipe: Recipe) -> None:
    text = dump_recipe(tiny_recipe)
    Run(tmp_path / "run", text).start()
    with pytest.raises(gmn.GmnError, match=r"the run folder exists.*--resume.*--overwrite"):
        Run(tmp_path / "run", text)
    with pytest.raises(gmn.GmnError, match=r"another recipe.*'seed: 3' instead of 'seed: 0'"):
        Run(tmp_path / "run", dump_recipe(tiny_recipe.model_copy(update={"seed": 3})), resume=True)
    with pytest.raises(gmn.GmnError, match="exclude each other"):
        Run(tmp_path / "run", text, resume=True, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(gmn.GmnError, match="is a file"):
        Run(tmp_path / "file", text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(gmn.GmnError, match="not a run folder"):
        Run(tmp_path / "mine", text, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_torn_checkpoint_is_one_clear_error(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    source = finished[0] / "metanetwork.safetensors"
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(source.read_bytes()[:1000])
    with pytest.raises(gmn.GmnError, match=r"cannot read the file.*torn\.safetensors"):
        gmn.load(torn)
    with pytest.raises(gmn.GmnError, match="nothing learnt here"):
        gmn.load(tmp_path)
    with pytest.raises(gmn.GmnError, match="not a saved metanetwork"):
        gmn.load(finished[0] / "models" / "base" / "weights.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    checkpoint.save_json(path, {"good": 1})
    with pytest.raises(TypeError):
        checkpoint.save_json(path, {"bad": object()})

    def tear(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomic(path, tear)
    assert checkpoint.load_json(path) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_saved_tensors_are_as_readable_as_other_files(tmp_path: Path) -> None:
    checkpoint.save_json(tmp_path / "about.json", {})
    checkpoint.save_tensors(tmp_path / "weights.safetensors", {"w": torch.zeros(2)}, {})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["cifar.resnet8", "cifar.vgg11_bn", "torchvision.mobilenet_v2"])
def test_a_pruned_network_is_saved_and_rebuilt(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = gmn.build_network(name, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    pruned = gmn.prune(model, images, speed_up=1.5).model
    gmn.save_model(tmp_path, pruned, {"name": name, "num_classes": 7, "in_channels": 3, "options": {}})
    with torch.no_grad():
        assert torch.equal(gmn.load_model(tmp_path)(images), pruned(images))


def test_the_base_is_not_touched_by_the_initial_fine_tuning(tiny_recipe: Recipe, tmp_path: Path) -> None:
    models = tiny_recipe.data_models.model_copy(update={"initial_speed_up": 1.0})
    job = MetaJob(tiny_recipe.model_copy(update={"data_models": models}), Run(tmp_path / "run", "recipe"))
    base = job.built(0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = job.initially_pruned(base, 0)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert not torch.equal(tuned.state_dict()["conv1.weight"], before["conv1.weight"])


def test_a_line_torn_by_a_killed_run_does_no_harm(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "recipe")
    run.start()
    run.log("select", epoch=1, validation_accuracy=0.5)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "sel')
    run.log("select", epoch=2, validation_accuracy=0.6)
    assert [entry["epoch"] for entry in run.events("select")] == [1, 2]
