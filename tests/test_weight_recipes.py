"""Runs that prune single weights: the shortened quickstart with each pattern, through every command.

* meta-training lowers the l1 norm on what the pattern takes away, by both forms of the loss
* every row ends with exactly the weights that the pattern leaves, loads, says its pattern and exports
* table, page, curve and `gmn select` measure what is left; an interrupted run resumes to the same report
* a saved metanetwork prunes to another pattern; recipes that make no sense are refused when they are loaded
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, quickstart
from made_runs import call
from torch import Tensor, nn

import gmn
from gmn import pipeline, report
from gmn.errors import RecipeError
from gmn.meta_job import MetaJob
from gmn.meta_train import train_metanetwork
from gmn.recipe import dump_recipe, load_recipe
from gmn.run import Run
from gmn.settings import Recipe
from gmn.weight_ranking import weight_mask

WEIGHTS = [
    *(set_ for set_ in TINY if "initial" not in set_ and not set_.startswith("prune.speed_up")),
    *("data_models.initial_speed_up=1", "data_models.initial_fit=null", "data_models.val=0", "prune.speed_up=null"),
    *("report.sparse_reg=5", "meta_train.pruner_reg=5"),
]
PATTERNS = {
    "2:4": ["prune.pattern=2:4", "report.baselines=[same-schedule, direct]"],
    "unstructured": ["prune.pattern=unstructured", "prune.sparsity=0.7", "report.baselines=[sparse, random]"],
    "1:4": ["prune.pattern=1:4", "report.baselines=[same-schedule, sparse]"],
    "3:4": ["prune.pattern=3:4", "report.baselines=[direct, random]"],
}


def recipe(*more: str) -> Recipe:
    return quickstart(*WEIGHTS, *more)


Finished = tuple[str, Path, dict[str, Any]]


@pytest.fixture(scope="module", params=PATTERNS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("runs") / "weights"
    return request.param, folder, pipeline.meta_train(recipe(*PATTERNS[request.param]), folder)


def only(pattern: str) -> pytest.MarkDecorator:
    """For a test that takes long, and is the same for all patterns."""
    return pytest.mark.parametrize("finished", [pattern], indirect=True)


def layers(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def of_four(pattern: str) -> int | None:
    """N of N:4."""
    return int(pattern[0]) if pattern.endswith(":4") else None


def refuse_more_than_the_pattern(pattern: str, model: nn.Module) -> None:
    weights = layers(model)
    if stay := of_four(pattern):
        stem = weights.pop("conv1")
        assert bool(stem.all())
        for weight in weights.values():
            groups = weight.unflatten(1, (-1, 4))
            assert bool(((groups != 0).sum(2) <= stay).all())
    every = torch.cat([weight.flatten() for weight in weights.values()])
    gone = (4 - stay) * len(every) // 4 if stay else round(0.7 * len(every))
    assert int((every == 0).sum()) == gone


def test_every_row_keeps_the_pattern_and_loads(finished: Finished) -> None:
    pattern, folder, found = finished
    assert len(found["results"]) == 3
    data = gmn.load_data(**recipe().data.model_dump(exclude={"augment"}), seed=0)
    base = gmn.load_model(folder / "models" / "base")
    assert found["base"]["parameters"] == sum(p.numel() for p in base.parameters())
    for result in found["results"]:
        place = folder / "models" / f"{result['row']}-seed0"
        model = gmn.load_model(place)
        refuse_more_than_the_pattern(pattern, model)
        zeros = sum(int((weight == 0).sum()) for weight in layers(model).values())
        assert result["parameters"] == found["base"]["parameters"] - zeros
        assert result["flops"] == found["base"]["flops"]
        assert gmn.evaluate(model, data.test).accuracy == result["test_accuracy"]
        assert json.loads((place / "model.json").read_text())["pattern"] == pattern


def test_the_table_says_what_is_left(finished: Finished) -> None:
    pattern, _, found = finished
    drawn = report.table(found)
    goal = pattern if of_four(pattern) else "70% zeros"
    assert drawn.title == f"quickstart: pruned to {goal}"
    assert "left" in [column.header for column in drawn.columns]
    assert "do not skip zeros" in str(drawn.caption)
    assert ("dense: conv1 (inputs: 1, no multiple of 4)" in str(drawn.caption)) == bool(of_four(pattern))
    left = found["results"][0]["parameters"] / found["base"]["parameters"]
    assert report.cells(found)[1][4] == f"{left:.1%}"


@only("unstructured")
def test_the_page_draws_what_is_left(finished: Finished) -> None:
    _, folder, found = finished
    report.show(found, folder)
    page = (folder / "report.html").read_text()
    assert "Accuracy against the parameters left" in page
    assert "Accuracy and parameters" in page


def test_curves_go_down_to_what_the_pattern_allows(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, folder, found = finished
    assert call(monkeypatch, "curve", str(folder), "--checkpoints", "0,2", "--points", "3") == 0
    said = capsys.readouterr().out
    assert "parameters left where accuracy falls under" in " ".join(said.split())
    content = json.loads((folder / "curves" / "curve.json").read_text())
    places = [place for place, _ in content["curves"][0]["points"]]
    assert len(places) == 4
    assert places[0] == 1.0
    assert places == sorted(places, reverse=True)
    if stay := of_four(pattern):
        left = found["results"][0]["parameters"] / found["base"]["parameters"]
        assert places[4 - stay] == left
    assert call(monkeypatch, "select", str(folder), "--min-accuracy", "0.01", "--finetune-images", "0") == 0
    assert (f"pruned {pattern} %" if of_four(pattern) else "70%") in " ".join(capsys.readouterr().out.split())


@only("unstructured")
def test_an_interrupted_run_resumes(finished: Finished, tmp_path: Path) -> None:
    _, folder, found = finished
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "report.json").unlink()
    shutil.rmtree(tmp_path / "again" / "models" / f"{found['results'][1]['row']}-seed0")
    again = pipeline.meta_train(load_recipe(folder / "recipe.yaml"), tmp_path / "again", resume=True)
    assert again["results"] == found["results"]
    assert json.dumps(again["curve"]) == json.dumps(found["curve"])


def test_networks_are_exported_as_ever(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, folder, _ = finished
    place = str(folder / "models" / "metanetwork-seed0")
    assert call(monkeypatch, "export", place, "-o", str(tmp_path / "out"), "--format", "safetensors") == 0
    refuse_more_than_the_pattern(pattern, gmn.load_model(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "model.json").read_text())["pattern"] == pattern


@only("unstructured")
def test_a_metanetwork_prunes_to_another_pattern(finished: Finished, tmp_path: Path) -> None:
    _, folder, _ = finished
    pipeline.prune_recipe(recipe("report.baselines=[]", "prune.pattern=2:4"), tmp_path / "other", folder)
    refuse_more_than_the_pattern("2:4", gmn.load_model(tmp_path / "other" / "models" / "metanetwork-seed0"))
    data, base = gmn.load_data("digits", limit=64), gmn.load_model(folder / "models" / "base")
    own = {"pattern": "2:4", "data": data, "finetune": gmn.Fit(epochs=1, lr=0.01, batch_size=32)}
    pruned = gmn.prune(base, data.example_inputs(), meta=gmn.load(folder), **own)
    assert pruned.mask is not None
    refuse_more_than_the_pattern("2:4", pruned.model)


@pytest.mark.parametrize("invariant", ["true", "false"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_meta_training_lowers_the_norm_of_what_goes(pattern: str, invariant: str, tmp_path: Path) -> None:
    more = [f"meta_train.scale_invariant={invariant}", "meta_train.pruner_reg=1000", "meta_train.lr=1e-2"]
    size = ["metanetwork.edge_ratio=1.0", "metanetwork.hidden=8"]
    own = recipe(*PATTERNS[pattern], *more, *size, "meta_train.epochs=1", "meta_train.steps_per_epoch=20")
    job = MetaJob(own, Run(tmp_path / "run", dump_recipe(own)))
    subject = job.subject(job.built(0))
    metanetwork = job.new_metanetwork([subject]).train()
    before = share_of_what_goes(job, subject.model)
    train_metanetwork(metanetwork, [subject], job.data.train, own.meta_train)
    after = share_of_what_goes(job, job.rewrite(subject.model, metanetwork, job.layout))
    assert after[int(invariant == "true")] < 0.98 * before[int(invariant == "true")]


def share_of_what_goes(job: MetaJob, model: nn.Module) -> tuple[float, float]:
    """The l1 norm of the weights that would go, and its share of that of all that may."""
    mask = weight_mask(model, job.graph(model).spec, job.recipe.prune)
    weights = {name: model.get_parameter(name).detach().abs() for name in mask.keep}
    gone = sum(float(weights[name][~keep].sum()) for name, keep in mask.keep.items())
    return gone, gone / sum(float(weight.sum()) for weight in weights.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["prune.pattern=2:4", "prune.speed_up=2"], "pattern 2:4 takes no FLOPs away: leave speed_up out"),
        (["prune.pattern=4:2"], "N:M with N below M, such as 2:4; got '4:2'"),
        (["prune.pattern=unstructured", "prune.sparsity=1.2"], "prune.sparsity': expected less than 1; got 1.2"),
        (["prune.pattern=2:4", "data_models.initial_speed_up=1.2"], "initial_speed_up removes channels: leave it out"),
        (
            ["prune.pattern=2:4", "report.baselines=[torch-pruning]"],
            "torch-pruning of report.baselines removes channels",
        ),
        (["prune.pattern=2:4", "prune.votes=runs/zoo"], "votes has no meaning with pattern 2:4"),
    ],
)
def test_recipes_that_make_no_sense(more: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(*more)


def test_a_pattern_is_text_in_yaml_too(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: quickstart\nprune: {pattern: 2:4, speed_up: null}\n")
    own = load_recipe(tmp_path / "own.yaml", ["data_models.initial_speed_up=1"])
    assert isinstance(own, Recipe)
    assert own.prune.n_of_m == (2, 4)
    (tmp_path / "dumped.yaml").write_text(dump_recipe(own))
    assert load_recipe(tmp_path / "dumped.yaml") == own
