"""Contract of several kinds of networks in one meta-training (`data_models.also`).

* A kind's own keys go over those of the recipe, and are written out: the recipe that a run keeps says all of it.
* A step reads the images of the network it draws, and weighs sparsity as that kind says; two processes share batches
  of several kinds as one process reads them.
* The metanetwork learns on every kind and is chosen by the mean over the judges of all; it prunes them all.
* A stopped run goes on; what does not go together is an error before anything is trained, and names the kind.
* Without kinds nothing changes, which the tests of meta-training hold fast.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, quickstart

import gmn
from gmn import meta_train, pipeline
from gmn.checkpoint_search import search
from gmn.data import Data
from gmn.distributed import Team
from gmn.errors import GmnError
from gmn.jsonl import read_lines
from gmn.meta_shares import Shares, shares_of
from gmn.meta_train import DataModel, Lesson, train_metanetwork
from gmn.recipe import dump_recipe, load_recipe
from gmn.run_cost import lines, meta_training
from gmn.settings import MetaTrain, Recipe
from gmn.settings_matrix import MatrixRecipe

VGG = "data_models.also.vgg={data: {size: 16}, network: {name: cifar.vgg11_bn, options: {width: 4}}, pruner_reg: 0.03}"
FEW = ["data.limit=120", "meta_train.epochs=2", "prune.steps=60", "report.baselines=[]"]


def recipe(*more: str) -> Recipe:
    return quickstart(*TINY, *FEW, VGG, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "kinds"
    return folder, pipeline.meta_train(recipe(), folder)


# the recipe


def test_a_kind_has_the_rest_from_the_recipe(tmp_path: Path) -> None:
    own = recipe("data_models.fit.epochs=1")
    kind = own.data_models.also["vgg"]
    assert kind.data == own.data.model_copy(update={"size": 16})
    assert kind.data_models == own.data_models.model_copy(update={"also": {}})
    assert (kind.network.name, kind.network.options, kind.pruner_reg) == ("cifar.vgg11_bn", {"width": 4}, 0.03)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(own))
    assert load_recipe(tmp_path / "recipe.yaml") == own
    usual = quickstart(VGG.replace(", pruner_reg: 0.03", ""))
    assert usual.data_models.also["vgg"].pruner_reg == usual.meta_train.pruner_reg


def test_entries_of_a_matrix_have_kinds_of_their_own() -> None:
    matrix = load_recipe("matrix", [f"entries.resnet8.{VGG}", "entries.resnet8.data.limit=77"])
    assert isinstance(matrix, MatrixRecipe)
    kind = matrix.entries["resnet8"].data_models.also["vgg"]
    assert (kind.data.limit, kind.data.size, kind.pruner_reg) == (77, 16, 0.03)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data_models.also=[vgg]", "bad value for 'data_models.also'"),
        ("data_models.also.vgg=3", "bad value for 'data_models.also.vgg'"),
        ("data_models.also.vgg.netwrok={}", "unknown key 'netwrok'.*did you mean 'network'"),
        ("data_models.also.v/g={}", "a label is letters"),
        ("data_models.also.vgg.data_models.fit=null", "data_models.also, vgg: nothing trains the network"),
        ("data_models.also.vgg.data_models.initial_speed_up=2", "data_models.also, vgg: prune.speed_up .1.8. counts"),
        ("data_models.also.vgg.pruner_reg=-1", "bad value for 'data_models.also.vgg.pruner_reg'"),
        ("meta_train.models=3; meta_train.batches=3", "there are 2 data models"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_recipe(override: str, says: str) -> None:
    with pytest.raises(GmnError, match=says):
        recipe(*override.split("; "))


def test_a_kind_has_no_kinds_of_its_own(tmp_path: Path) -> None:
    content = yaml.safe_load(dump_recipe(recipe()))
    kind = content["data_models"]["also"]["vgg"]
    kind["data_models"]["also"] = {"inner": yaml.safe_load(yaml.safe_dump(kind))}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(GmnError, match="vgg cannot have kinds of its own"):
        load_recipe(tmp_path / "recipe.yaml")


def test_code_that_the_caller_names_may_be_a_kinds(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: quickstart\ndata_models: {also: {wide: {data: {size: 16}}}}\n")
    found = load_recipe(path, ["network.name=own:build"])
    assert isinstance(found, Recipe)
    assert found.data_models.also["wide"].network.name == "own:build"


@pytest.mark.parametrize(
    ("written", "overrides"),
    [
        ("data_models: {also: {wide: {network: {name: 'own:build'}}}}", []),
        ("data_models: {also: {wide: {network: {name: 'own:build'}}}}", ["network.name=another:build"]),
        *(  # a kind that the caller writes has its network and its data from the file
            (file, [f"data_models.also{override}"])
            for file in ("network: {name: 'own:build'}", "data: {name: 'own:build'}")
            for override in (
                "={wide: {network: {options: {width: 32}}}}",
                ".wide={data: {size: 16}}",
                ".wide.network={options: {width: 32}}",
                ".wide.data={size: 16}",
                ".wide.data.size=16",
            )
        ),
        ("network: {name: 'own:build'}", ["criterion.score=own:build"]),
    ],
)
def test_code_that_a_file_names_needs_permission(tmp_path: Path, written: str, overrides: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: quickstart\n{written}\n")
    with pytest.raises(GmnError, match=r"name wants to run code: got 'own:build'; in "):
        load_recipe(tmp_path / "mine.yaml", overrides)


def test_an_entry_is_no_kind_whatever_its_label(tmp_path: Path) -> None:
    entries = "{also: {network: {name: 'own:build'}}, other: {}}"
    (tmp_path / "mine.yaml").write_text(f"method: matrix\ncommon: {{base: quickstart}}\nentries: {entries}\n")
    with pytest.raises(GmnError, match=r"entries\.also\.network\.name wants to run code: got 'own:build'"):
        load_recipe(tmp_path / "mine.yaml", ["entries.other.network.name=own:build"])


def test_speed_ups_of_the_report_are_not_those_of_kinds() -> None:
    own = recipe("report.speed_ups=[1.5]", "data_models.also.vgg.data_models.initial_speed_up=1.6")
    assert own.kinds["vgg"].targets == [1.8]


def test_a_recipe_without_sparsity_loss_may_have_kinds() -> None:
    own = quickstart("meta_train.pruner_reg=0", "data_models.also.wide={data: {size: 16}}")
    assert own.data_models.also["wide"].pruner_reg == 0


def test_votes_are_of_one_network() -> None:
    with pytest.raises(GmnError, match=r"prune.votes are of one network"):
        recipe("prune.votes=zoo", "data_models.initial_speed_up=1")


# the steps


@pytest.fixture(scope="module")
def two() -> tuple[list[DataModel], Data]:
    """A small ResNet on digits as they are, a VGG on larger ones with another weight; and the data of the first."""
    subjects: list[DataModel] = []
    for name, size, weight in (("cifar.resnet8", None, 0.1), ("cifar.vgg11_bn", 16, 0.7)):
        data = gmn.load_data("digits", limit=100, size=size)
        torch.manual_seed(0)
        model = gmn.build_network(name, num_classes=10, in_channels=1, options={"width": 4}).eval()
        graph = gmn.to_graph(model, data.example_inputs(), layout="cnn")
        importance = gmn.Importance(graph.spec, gmn.couplings(graph.spec))
        subjects.append(DataModel(model, graph, importance, Lesson(data.train, None, weight)))
    return subjects, gmn.load_data("digits", limit=100)


def items(subjects: list[DataModel], data: Data, config: MetaTrain, plan: Shares) -> list[meta_train.Item]:
    rng = torch.Generator().manual_seed(4)
    return list(meta_train._items(subjects, data.train, config, plan, None, rng))


@pytest.mark.parametrize("models", [1, 2])
def test_a_step_reads_the_images_of_the_network_it_draws(two: tuple[list[DataModel], Data], models: int) -> None:
    config = MetaTrain(epochs=1, steps_per_epoch=8, batch_size=8, batches=2, models=models, lr=1.0)
    drawn = [pair for item in items(*two, config, shares_of(config, Team(0, 1))) for pair in item]
    assert len({id(subject) for subject, _ in drawn}) == 2
    for subject, batches in drawn:
        assert len(batches) == 2 // models
        for images, labels in batches:
            with torch.no_grad():
                assert subject.model(images).shape == (8, 10)  # a VGG halves 8 pixels too often
            assert images.shape[-1] == (16 if subject is two[0][1] else 8)
            assert len(labels) == 8


@pytest.mark.parametrize("models", [1, 2])
def test_two_processes_read_what_one_reads(two: tuple[list[DataModel], Data], models: int) -> None:
    config = MetaTrain(epochs=1, steps_per_epoch=6, batch_size=6, batches=4, models=models, lr=1.0)
    alone = items(*two, config, shares_of(config, Team(0, 1)))
    shares = [items(*two, config, shares_of(config, Team(rank, 2))) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        for subject, batches in whole:
            own = [batch for part in parts for found, each in part if found is subject for batch in each]
            found = torch.cat([images for images, _ in own])
            images = torch.cat([images for images, _ in batches])
            assert sorted(found.flatten(1).sum(1).tolist()) == sorted(images.flatten(1).sum(1).tolist())
            assert len(found) == len(images)


def test_a_small_kind_leaves_the_batches_of_the_others_alone(two: tuple[list[DataModel], Data]) -> None:
    subjects, data = two
    assert subjects[1].lesson is not None
    few = replace(subjects[1].lesson, split=subjects[1].lesson.split.subset(range(5)))
    config = MetaTrain(epochs=1, steps_per_epoch=8, batch_size=8, batches=2, lr=1.0)
    plan = shares_of(config, Team(0, 1))
    drawn = [
        pair for item in items([subjects[0], replace(subjects[1], lesson=few)], data, config, plan) for pair in item
    ]
    sizes = {(subject is subjects[0], len(labels)) for subject, batches in drawn for _, labels in batches}
    assert sizes == {(True, 8), (False, 5)}


def test_without_a_lesson_the_weight_is_that_of_the_training(
    two: tuple[list[DataModel], Data], monkeypatch: Any
) -> None:
    subjects, data = two
    weights: dict[int, float] = {}

    def look(metanetwork: object, subject: DataModel, batches: object, **options: Any) -> dict[str, float]:
        weights[id(subject)] = options["pruner_reg"]
        return {}

    monkeypatch.setattr(meta_train, "meta_step", look)
    plain = replace(subjects[0], lesson=None)
    config = MetaTrain(epochs=1, steps_per_epoch=1, batch_size=8, batches=2, models=2, lr=1.0, pruner_reg=5.0)
    plan = shares_of(config, Team(0, 1))
    for item in items([plain, subjects[1]], data, config, plan), items([subjects[1], plain], data, config, plan):
        meta_train._step(torch.nn.Linear(1, 1), item[0], config, plan, None)  # type: ignore[arg-type]
        assert weights == {id(plain): 5.0, id(subjects[1]): 0.7}


def test_sparsity_weighs_as_the_kind_says(two: tuple[list[DataModel], Data]) -> None:
    subject, data = two[0][1], two[1]
    assert subject.lesson is not None
    config = MetaTrain(epochs=1, steps_per_epoch=1, batch_size=8, batches=1, lr=1e-3, pruner_reg=100.0)
    norms: list[float] = []
    for weight in (0.7, 1.4):
        log: list[dict[str, float]] = []
        torch.manual_seed(0)
        spec = subject.graph.spec
        network = gmn.MetaNetwork(gmn.MetaNetworkConfig(len(spec.columns), spec.edge_kinds, layers=1, hidden=4))
        own = replace(subject, lesson=replace(subject.lesson, pruner_reg=weight))
        train_metanetwork(network, [own], data.train, config, log=log.append)
        norms.append(log[0]["sparsity_gradient"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


# a run


def test_a_run_learns_on_all_kinds_and_is_chosen_by_all(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    for place in ("data-models", "also/vgg/data-models"):
        assert sorted(path.name for path in (folder / place).iterdir()) == ["0", "1"]
    titles = {line["title"] for line in read_lines(folder / "metrics.jsonl") if line["event"] == "fit"}
    assert {"training network 0", "vgg: training network 0", "vgg: fine-tuning after checkpoint 1"} <= titles
    own = pipeline.reopened_metanetwork(folder)
    with own.run:
        models = list(own.judged(1, own.recipe.finetune.after_meta))
        scores = [gmn.evaluate(kind.pruned_to_target(model), kind.data.val).accuracy for kind, model in models]
    assert [kind.source["name"] for kind, _ in models] == ["cifar.resnet8", "cifar.vgg11_bn"]
    assert report["select"][1]["validation_accuracy"] == pytest.approx(sum(scores) / 2)


def test_the_metanetwork_prunes_networks_of_all_kinds(finished: tuple[Path, dict[str, Any]]) -> None:
    meta = gmn.load(finished[0])
    assert isinstance(meta, gmn.Meta)
    for place, size in (("data-models/0", 8), ("also/vgg/data-models/0", 16)):
        model, images = gmn.load_model(finished[0] / place), torch.zeros(1, 1, size, size)
        assert gmn.prune(model, images, meta=meta, speed_up=1.5).report["speed_up"] >= 1.5
        rewritten = meta.rewrite(model, images)
        assert any(not torch.equal(a, b) for a, b in zip(rewritten.parameters(), model.parameters(), strict=True))


def test_probes_of_a_search_look_at_all_kinds(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    own = pipeline.reopened_metanetwork(folder)
    with own.run:
        _, probes = search(own, 0.0, finetune_images=0)
        models = list(own.judged(probes[-1].epoch, None))
        scores = [gmn.evaluate(model, kind.data.val).accuracy for kind, model in models]
    assert probes[-1].accuracy == pytest.approx(sum(scores) / 2)


def test_a_stopped_run_goes_on_where_it_was(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    kept = (folder / "checkpoints/epoch-002.safetensors").read_bytes()
    for name in ("report.json", "metanetwork.safetensors", "checkpoints/epoch-002.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "also/vgg/data-models/0")
    pipeline.meta_train(recipe(), folder, resume=True)
    assert (folder / "checkpoints/epoch-002.safetensors").read_bytes() == kept
    assert (folder / "also/vgg/data-models/0/weights.safetensors").read_bytes() == (
        finished[0] / "also/vgg/data-models/0/weights.safetensors"
    ).read_bytes()


def test_the_cost_of_a_run_knows_whose_networks_were_trained(finished: tuple[Path, dict[str, Any]]) -> None:
    parts = meta_training(finished[0])
    assert parts["data models"].seconds > 0
    own = [line for line in lines(finished[0]) if "data-models/" in str(line.get("network"))]
    assert {line["network"].split("/")[0] for line in own} == {"data-models", "also"}
    assert parts["data models"].seconds == pytest.approx(sum(line["seconds"] for line in own))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data_models.also.vgg.data.size=8", "data_models.also, vgg: "),
        ("data_models.also.vgg.network.weights=nowhere.safetensors", "data_models.also, vgg: .*nowhere"),
        ("data_models.also.vgg.network={name: cifar.resnet8, options: {width: 1}}", "data_models.also, vgg: .*1.8"),
    ],
)
def test_a_kind_that_cannot_work_is_refused_before_anything(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(GmnError, match=says):
        pipeline.meta_train(recipe(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()
