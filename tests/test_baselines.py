"""The rows of the comparison beside the metanetwork, on a run that asks for every option of the pipeline.

* sparse training adds the gradient of our sparsity loss, and torch-pruning its own, in the first fine-tuning only
* every row reaches the target, sees the same number of images, loads, and stands in the table; a stopped run resumes
* torch-pruning keeps what must stay and what the recipe says, and says in one line what it cannot prune
* the unpruned network teaches where a recipe asks for it; a recipe that cannot work is refused when it is loaded
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, quickstart
from torch import nn

import gmn
from gmn import baselines, curve_cli, pipeline, prune_job
from gmn.baselines import Trial
from gmn.budget import budget, images, merged
from gmn.errors import PruningError, RecipeError
from gmn.library_pruner import library_pruner, prune_with
from gmn.meta_job import MetaJob
from gmn.recipe import dump_recipe, load_recipe
from gmn.report import table
from gmn.run import Run
from gmn.settings import Fit, Prune, Recipe
from gmn.training import make_schedule

ROWS = ("sparse", "torch-pruning", "torch-pruning-sparse")
OPTIONS = [
    *TINY,
    *("report.baselines=[sparse, torch-pruning, torch-pruning-sparse]", "data_models.train=1", "data_models.val=0"),
    *("data_models.initial_speed_up=auto", "data_models.initial_tolerance=100", "finetune.recalibrate_after_meta=50"),
    *("data_models.initial_fit.distill=0.5", "finetune.after_meta.distill=0.5", "finetune.after_prune.distill=0.5"),
    *("finetune.after_prune.mixup=0.2", "finetune.after_prune.ema=0.5", "meta_train.distill=0.5"),
]


def recipe(*more: str) -> Recipe:
    return quickstart(*OPTIONS, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "rows"
    return folder, pipeline.meta_train(recipe(), folder)


def entries(folder: Path, event: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if e["event"] == event]


def test_every_row_is_pruned_alike_and_loads(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    data = gmn.load_data(**recipe().data.model_dump(exclude={"augment"}), seed=0)
    assert [result["row"] for result in report["results"]] == ["metanetwork", *ROWS]
    for result in report["results"]:
        assert 1.8 <= result["speed_up"] < 2.3
        model = gmn.load_model(folder / "models" / f"{result['row']}-seed0")
        assert gmn.evaluate(model, data.test).accuracy == result["test_accuracy"]
        assert gmn.cost(model, data.example_inputs()).flops == result["flops"]
    epochs = Counter(e["title"].split(" seed")[0] for e in entries(folder, "fit"))
    assert [epochs[row] for row in ROWS] == [2, 3, 2]  # two start from a network that was fine-tuned for an epoch


def test_what_was_found_goes_for_the_whole_run(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    assert report["initial_speed_up"] == 1.7  # 100 points may be lost; 1.8 / 1.05 is 1.71
    assert [entry["network"] for entry in entries(folder, "initial")] == [0] * 3
    start, base = (gmn.load_model(folder / "models" / name) for name in ("start", "base"))
    example = torch.zeros(1, 1, 8, 8)
    assert 1.7 <= gmn.cost(base, example).flops / gmn.cost(start, example).flops < 1.8


def test_the_table_explains_the_rows(finished: tuple[Path, dict[str, Any]]) -> None:
    drawn = table(finished[1])
    assert list(drawn.columns[0].cells)[2:] == ["sparse training", "torch-pruning", "torch-pruning, sparse"]
    for part in ("our sparsity loss", "group magnitudes", "GroupNormPruner", "initially pruned to 1.7x"):
        assert part in str(drawn.caption)


def test_an_interrupted_run_resumes(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(finished[0], folder)
    for name in ("models/sparse-seed0", "models/torch-pruning-sparse-seed0", "models/start"):
        shutil.rmtree(folder / name)
    (folder / "report.json").unlink()
    report = pipeline.meta_train(recipe(), folder, resume=True)
    assert report["results"] == finished[1]["results"]
    assert len(entries(folder, "initial")) == len(entries(finished[0], "initial"))


def test_a_metanetwork_of_another_run_finds_its_own_initial_pruning(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    own = recipe("seed=7", "report.baselines=[]", "data_models.initial_tolerance=0")
    report = pipeline.prune_recipe(own, tmp_path / "new", finished[0])
    tried = entries(tmp_path / "new", "initial")
    assert {entry["network"] for entry in tried} == {1}
    assert report["initial_speed_up"] == max([1.0, *(e["wanted"] for e in tried if e["accepted"])])


def test_a_recipe_without_fine_tuning(tmp_path: Path) -> None:
    """What is left is how easy a network is to prune."""
    bare = ["data_models.initial_speed_up=1", "data_models.initial_fit=null", "report.baselines=[direct,torch-pruning]"]
    own = load_recipe("quickstart", [*TINY, *bare, "finetune.after_meta=null", "finetune.after_prune=null"])
    folder = tmp_path / "bare"
    report = pipeline.meta_train(own, folder)
    assert report["finetune_images"] == 0
    for result in report["results"]:
        assert result["validation_accuracy"] == result["stages"]["pruned"]
    assert not [e for e in entries(folder, "fit") if "fine-tuning" in e["title"]]
    with pytest.raises(gmn.GmnError, match="the recipe has no fine-tuning to be brief with"):
        curve_cli.select(folder, min_accuracy=0.1, finetune_images=64, use=False)


def trial(folder: Path, row: str, *more: str) -> Trial:
    own = recipe("data_models.initial_speed_up=1", "data_models.initial_tolerance=0", "report.baselines=[]", *more)
    job = MetaJob(own, Run(folder, dump_recipe(own)))
    model = job.built(0)
    return Trial(job, model, model, job.new_metanetwork([job.subject(model)]), job.layout, row, 0)


def gradients(monkeypatch: pytest.MonkeyPatch, own: Trial) -> dict[str, torch.Tensor]:
    """What the row's regularizer adds to gradients of zero, at the start of the first fine-tuning."""
    added: dict[str, torch.Tensor] = {}

    def fit(model: nn.Module, settings: Any, index: int, title: str, *, teacher: nn.Module, regularize: Any) -> None:
        assert teacher is own.base
        model.train()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        regularize()
        added.update({name: p.grad for name, p in model.named_parameters()})
        raise InterruptedError

    monkeypatch.setattr(own.job, "fit", fit)
    with pytest.raises(InterruptedError):
        baselines.ROWS[own.row](own)
    return added


@pytest.mark.parametrize("scale_invariant", ["true", "false"])
def test_sparse_training_adds_the_gradient_of_the_sparsity_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scale_invariant: str
) -> None:
    own = trial(tmp_path, "sparse", "report.sparse_reg=0.25", f"meta_train.scale_invariant={scale_invariant}")
    added = gradients(monkeypatch, own)
    names = dict(own.start.named_parameters())
    importance = own.job.subject(own.start).importance
    loss = importance.sparsity_loss(names, scale_invariant=own.job.recipe.meta_train.scale_invariant)
    expected = torch.autograd.grad(0.25 * loss, list(names.values()), allow_unused=True)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(added[name], torch.zeros_like(names[name]) if gradient is None else gradient)
    assert float(added["layer1.0.conv1.weight"].abs().sum()) > 0


def test_torch_pruning_shrinks_what_it_may_prune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = trial(tmp_path, "torch-pruning-sparse")
    added = gradients(monkeypatch, own)
    weight = own.start.get_parameter("layer1.0.conv1.weight")
    ratio = (added["layer1.0.conv1.weight"] / weight).detach()  # per output channel at least reg = 1e-4
    assert float(ratio.min()) >= 1e-4 * 0.99
    assert not bool(added["linear.bias"].any())


@pytest.mark.parametrize("row", ["torch-pruning", "direct"])
def test_rows_that_prune_at_once_have_the_whole_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: str
) -> None:
    own, fits = trial(tmp_path, row), []
    monkeypatch.setattr(own.job, "fit", lambda model, settings, *_, **more: fits.append((settings, more)))
    pruned = baselines.ROWS[row](own)
    assert fits == [(merged(own.job.recipe, len(own.job.data.train)), {"teacher": own.base, "mask": None})]
    assert fits[0][0].epochs == 3
    assert gmn.cost(own.base, own.job.example) == own.before  # torch-pruning cuts a copy
    assert 1.8 <= own.before.flops / gmn.cost(pruned, own.job.example).flops < 2.1


@pytest.mark.parametrize(
    "first", [{"images_per_epoch": 20}, {"iterations": 10, "batch_size": 50}, {"batch_size": 64}, {"epochs": 3}]
)
def test_budgets_are_equal_to_a_batch_an_epoch(first: dict[str, Any]) -> None:
    own = recipe("data_models.initial_fit=null")
    tune = {
        "after_meta": Fit(**{"epochs": 1, "lr": 0.01, **first}),
        "after_prune": Fit(epochs=2, lr=0.01, batch_size=32),
    }
    own = own.model_copy(update={"finetune": own.finetune.model_copy(update=tune)})
    whole, total = merged(own, 1078), budget(own, 1078)
    assert whole is not None
    assert total <= images(whole, 1078) < total + 32 * whole.epochs


def test_brief_trainings_warm_up_as_briefly(tmp_path: Path) -> None:
    own = trial(tmp_path, "metanetwork", "finetune.after_meta={epochs: 10, lr: 0.1, warmup: 5}")
    short = own.job.brief(3200)
    assert short is not None
    assert (short.iterations, short.warmup) == (25, 0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=short.lr)
    schedule, rates = make_schedule(optimizer, short, 25), []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[12:] == [0.1] * 13


def test_what_is_recalibrated_in_place_of_a_reconstruction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and rows of torch-pruning, which are not fitted, are not left with the statistics of the whole network."""
    own, seen = trial(tmp_path, "direct", "prune.recalibrate=0", "prune.reconstruct=70"), []
    monkeypatch.setattr(prune_job, "recalibrate", lambda *args, **options: seen.append((args[2], options["augment"])))
    own.job.recalibrate(own.base)
    assert seen == [(70, own.job.augment)]


def test_torch_pruning_keeps_what_must_stay() -> None:
    """Option A shortcuts pad by fixed numbers: only channels inside the blocks may go."""
    torch.manual_seed(0)
    model, example = (
        gmn.build_network("cifar.resnet8", num_classes=10, options={"shortcut": "A", "width": 8}),
        torch.zeros(1, 3, 16, 16),
    )
    before, config = gmn.cost(model, example), Prune(speed_up=1.5, steps=50)
    pruner = library_pruner(model, gmn.to_graph(model, example).spec, example, config)
    smaller = prune_with(pruner, example, 1.5, before, config)
    shapes = {name: tuple(p.shape[:2]) for name, p in smaller.named_parameters() if p.dim() > 1}
    assert shapes["conv1.weight"] == (8, 3)
    assert shapes["linear.weight"] == (10, 32)
    assert shapes["layer3.0.conv2.weight"][0] == 32
    assert 0 < shapes["layer3.0.conv1.weight"][0] < 32
    assert smaller(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("sparse", [False, True])
def test_torch_pruning_keeps_what_the_recipe_says(sparse: bool) -> None:
    torch.manual_seed(0)
    options = {"shortcut": "A", "width": 16}
    whole, example = gmn.build_network("cifar.resnet8", num_classes=10, options=options), torch.zeros(1, 3, 16, 16)
    spec, before = gmn.to_graph(whole, example).spec, gmn.cost(whole, example)

    def left(target: float, **ranking: Any) -> list[int]:
        model, config = copy.deepcopy(whole), Prune(speed_up=target, steps=50, **ranking)
        prune_with(library_pruner(model, spec, example, config, sparse=sparse), example, target, before, config)
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
        return [model.get_parameter(f"layer{stage}.0.conv1.weight").shape[0] for stage in (1, 2, 3)]

    free = left(2.5)
    assert all(count < size / 2 for count, size in zip(free, (16, 32, 64), strict=True))
    kept = left(1.4, keep=["layer1.0.conv1"])
    assert kept[0] == 16
    assert kept[2] < 64
    assert left(1.4, limits={"layer1.*": 0.0})[0] == 16
    some = left(1.6, limits={"layer1.0.conv1": 0.25, "layer2.*": 0.2})
    assert some[0] >= 12 - 3  # a step takes two or three channels
    assert some[1] >= 26 - 3
    assert some[2] < 32
    instead = left(1.3, max_ratio=0.1, limits={"layer3.*": 0.9})
    assert instead[0] >= 15 - 3
    assert instead[2] < 40
    assert all(count % 8 == 0 for count in left(1.8, round_to=8))
    assert left(1.4, round_to=8, limits={"layer1.*": 0.4}, max_ratio=0.8)[0] == 16  # 10 would have to stay
    with pytest.raises(PruningError, match=r"the pattern matches no layer.*prune.keep 'layer9"):
        left(1.4, keep=["layer9.*"])


def test_what_torch_pruning_cannot_do_is_one_line() -> None:
    example, config = torch.zeros(1, 3, 32, 32), Prune(speed_up=2.0, steps=5)
    vit = gmn.build_network("timm.vit_tiny_patch16_224", num_classes=10, options={"depth": 1, "img_size": 32})
    with pytest.raises(PruningError, match=r"do not know attention heads.*report.baselines"):
        library_pruner(vit, gmn.to_graph(vit, example).spec, example, config)
    model = gmn.build_network("cifar.resnet8", num_classes=10, options={"shortcut": "A", "width": 8})
    pruner = library_pruner(model, gmn.to_graph(model, example).spec, example, config)
    reach = r"cannot reach the speed-up: expected 500x; got at most .*prune.max_ratio 0.9; raise prune.max_ratio"
    with pytest.raises(PruningError, match=reach):
        prune_with(pruner, example, 500.0, gmn.cost(model, example), config)


def test_the_unpruned_network_teaches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = trial(tmp_path, "metanetwork", "data_models.initial_speed_up=1.2", "data_models.val=1")
    job, teachers = own.job, []

    def fit(
        model: nn.Module, settings: Any, index: int, title: str, teacher: nn.Module | None = None, **_: Any
    ) -> None:
        teachers.append((title, None if teacher is None else gmn.cost(teacher, job.example)))

    monkeypatch.setattr(job, "fit", fit)
    assert list(job.judges) == [1]
    assert gmn.cost(job.data_model(1), job.example).flops < own.before.flops
    job.score(0)
    baselines.metanetwork(own)
    assert teachers[0] == ("training network 1", None)
    assert len(teachers) == 5
    assert all(said == own.before for _, said in teachers[1:])


def test_brief_trainings_find_the_teacher_of_the_last_one(tmp_path: Path) -> None:
    own = trial(tmp_path, "metanetwork", "finetune.after_meta=null", "report.baselines=[]")
    own.job.unpruned(0)
    assert (tmp_path / "data-models" / "0-unpruned" / "model.json").is_file()


def test_statistics_are_recalibrated_after_the_metanetwork(tmp_path: Path) -> None:
    own = trial(tmp_path, "metanetwork")
    anew = own.job.rewrite(own.start, own.metanetwork, own.layout).state_dict()
    finetune = own.job.recipe.finetune.model_copy(update={"recalibrate_after_meta": 0})
    own.job.recipe = own.job.recipe.model_copy(update={"finetune": finetune})
    kept = own.job.rewrite(own.start, own.metanetwork, own.layout).state_dict()
    assert torch.equal(kept["bn1.running_mean"], own.start.state_dict()["bn1.running_mean"])
    assert not torch.equal(anew["bn1.running_mean"], kept["bn1.running_mean"])
    assert torch.equal(anew["conv1.weight"], kept["conv1.weight"])


def test_prune_in_python_distils_from_the_model() -> None:
    data = gmn.load_data("digits", limit=64)
    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 4, "shortcut": "B"})
    tune = gmn.Fit(epochs=1, lr=0.01, batch_size=32, distill=1.0)
    result = gmn.prune(model, data.example_inputs(), speed_up=1.5, finetune=tune, data=data)
    assert result.report["speed_up"] >= 1.5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["finetune.after_meta=null", "report.baselines=[sparse]"], "sparse of report.baselines trains sparsely"),
        (["finetune.after_meta=null", "report.baselines=[torch-pruning-sparse]"], "torch-pruning-sparse of report"),
        (["data_models.fit.distill=0.5"], "data_models.fit trains the unpruned network itself"),
        (["finetune.after_prune.batch_size=33", "finetune.after_prune.mixup=0.2"], "batch_size must be even; got 33"),
        (["finetune.after_prune.warmup=5"], r"warmup must be below epochs \(5\); got 5"),
        (["report.baselines=[sparsely]"], "report.baselines"),
        (["report.baselines=[direct,random,direct]"], "direct comes twice"),
        (["finetune.after_prune.schedule=cosine"], "schedule cosine has no milestones"),
        (["meta_train.epochs=3"], r"got \[12\]; set both"),
        (["criterion.score=fpgm", "criterion.p=1"], "p has no meaning with score fpgm"),
        (["criterion.images=50"], "images has no meaning with score norm"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", overrides)


def test_a_vote_has_nobody_to_learn_from() -> None:
    with pytest.raises(RecipeError, match="nothing to distil from"):
        load_recipe("graph-mask-voting", ["vote.fit.distill=0.5"])
