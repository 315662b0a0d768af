"""Recipes: what loads, what does not, and what the message says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmn.errors import RecipeError
from gmn.recipe import dump_recipe, load_recipe
from gmn.recipe_bases import builtin_recipes
from gmn.settings import Recipe

MINIMAL = """\
data: {name: digits}
network: {name: cifar.resnet8}
data_models:
  fit:
    epochs: 3
    lr: 1e-3
meta_train:
  epochs: 2
  steps_per_epoch: 3
  batch_size: 4
finetune:
  after_prune: {epochs: 1, lr: 0.01}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write my.yaml: the minimal recipe, with one text replaced."""
    monkeypatch.chdir(tmp_path)

    def _write(old: str = "", new: str = "") -> str:
        assert old in MINIMAL
        Path("my.yaml").write_text(MINIMAL.replace(old, new, 1) if old else new + MINIMAL)
        return "my.yaml"

    return _write


def message(source: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_loads_and_comes_back_from_its_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name.split("/")[-1]
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_builtins_are_the_files_of_the_repository() -> None:
    folder = Path(__file__).parent.parent / "recipes"
    files = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    assert set(builtin_recipes()) == files >= {"quickstart", "paper/resnet56-cifar10"}


def test_odd_values_survive_a_dump(write, tmp_path: Path) -> None:
    options = 'network.options={a: "1e-3", b: 1e-7, c: "no", d: [1, {e: ü}], f: "1"}'
    recipe = load_recipe(write(), [options, "network.weights=w/x.safetensors"])
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.network.options == {"a": "1e-3", "b": 1e-7, "c": "no", "d": [1, {"e": "ü"}], "f": "1"}
    assert again.network.weights == Path("w/x.safetensors")


def test_exponents_are_numbers_and_the_name_is_the_stem(write) -> None:
    recipe = load_recipe(write())
    assert recipe.data_models.fit is not None
    assert recipe.data_models.fit.lr == 0.001
    assert recipe.name == "my"
    assert load_recipe(write(), ["meta_train.lr=5e-4"]).meta_train.lr == 0.0005


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "sed: 1\n", ["unknown key 'sed'", "my.yaml:1", "did you mean 'seed'?"]),
        (
            "epochs: 2",
            "epoch: 2",
            ["unknown key 'epoch'", "my.yaml:8 (meta_train)", "'epochs'? (and 1 more)"],
        ),
        ("lr: 1e-3", "lr: 1e-3\n    lrr: 1", ["'lrr'", "my.yaml:7 (data_models.fit)", "did you mean 'lr'?"]),
        ("epochs: 2", "epochs: 2\n  epochs: 3", ["key 'epochs' comes twice", "my.yaml:9 (meta_train)"]),
        ("epochs: 2", "epochs: many", ["'meta_train.epochs'", "valid integer", "got 'many'", "my.yaml:8"]),
        ("epochs: 2", "epochs: true", ["'meta_train.epochs'", "valid integer", "got True"]),
        ("epochs: 2", "epochs: 0", ["'meta_train.epochs'", "greater than or equal to 1; got 0"]),
        (
            "  batch_size: 4\n",
            "",
            ["missing key 'batch_size'", "images per mini-batch", "my.yaml:7 (meta_train)"],
        ),
        ("data: {name: digits}\n", "", ["missing key 'data'", "the images", "my.yaml"]),
        (
            "{name: digits}",
            "digits",
            ["bad value for 'data'", "a mapping of keys", "got 'digits'", "my.yaml:1"],
        ),
        ("{name: digits}", "{name: [", ["not valid YAML, expected ',' or ']'", "my.yaml:3"]),
        ("digits", "!!python/object:os.system x", ["not valid YAML", "my.yaml:1"]),
        ("", "graph: {layout: resnet5}\n", ["'graph.layout'", "'resnet56'", "my.yaml:1"]),
        ("", "metanetwork: {hidden: 7}\n", ["'metanetwork.hidden'", "a multiple of 2", "got 7"]),
        ("", "device: gpu\n", ["bad 'device'", "auto, cpu, cuda or cuda:N", "got 'gpu'", "my.yaml:1"]),
        (
            "lr: 1e-3",
            "lr: 1e-3\n    milestones: [1, 3]",
            ["'data_models.fit'", "below epochs (3)", "my.yaml:4"],
        ),
        ("digits", "digits, mean: [0.5]", ["bad 'data'", "mean and std must come together"]),
        (
            "  fit:\n    epochs: 3\n    lr: 1e-3",
            "  fit: null",
            ["nothing trains the network", "network.weights"],
        ),
    ],
)
def test_a_wrong_recipe_says_what_and_where(write, old: str, new: str, said: list[str]) -> None:
    text = message(write(old, new))
    assert all(part in text for part in said), text


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_a_recipe_is_a_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert "a recipe is a mapping of keys" in message(str(tmp_path / "x.yaml"))


def test_overrides_replace_and_create(write) -> None:
    overrides = ["meta_train.epochs=5", "finetune.after_meta.epochs=2", "finetune.after_meta.lr=0.1"]
    recipe = load_recipe(write(), [*overrides, "data.mean=[0.5]", "data.std=[0.2]"])
    assert recipe.meta_train.epochs == 5
    assert recipe.finetune.after_meta is not None
    assert (recipe.data.mean, recipe.data.std) == ([0.5], [0.2])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "bad override: expected section.key=value; got 'seed'"),
        ("=1", "bad override"),
        ("seed.x=1", "bad override: expected a section"),
        ("meta_train.epochs=[", "not valid YAML"),
        ("meta_train.epoch=3", "in --set meta_train.epoch=3 (meta_train); did you mean 'epochs'?"),
        ("meta_train.epochs=x", "got 'x'; in --set meta_train.epochs=x"),
        ("finetune.after_meta.epochs=2", "missing key 'lr'"),
    ],
)
def test_a_bad_override_is_named(write, override: str, said: str) -> None:
    assert said in message(write(), "seed=1", override)


def test_a_missing_file_lists_the_built_in_recipes() -> None:
    text = message("quikstart.yaml")
    assert "no recipe 'quikstart.yaml'" in text
    assert "paper/vgg19-cifar100" in text
    assert text.endswith("did you mean 'quickstart'?")


def test_recipes_do_not_change_after_loading(write) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write()).seed = 3


def test_pretrained_builders_need_no_training(write) -> None:
    untrained = ["data_models.fit=null", "network.options={pretrained: true}"]
    assert load_recipe(write(), untrained).data_models.fit is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data_models.initial_speed_up=3"], r"must be above data_models.initial_speed_up \(3\)"),
        (
            ["data_models.fit=null", "data_models.initial_fit=null", "network.weights=w.pt"],
            r"several data models without a training are all the same",
        ),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", overrides)


def test_a_base_recipe_is_overridden_key_by_key(write, tmp_path: Path) -> None:
    write()
    Path("child.yaml").write_text("base: my.yaml\ndata_models:\n  fit: {epochs: 7}\nmeta_train: {lr: 0.5}\nseed: 3\n")
    child, base = load_recipe("child.yaml", ["meta_train.epochs=5"]), load_recipe("my.yaml")
    assert (child.name, base.name, child.seed) == ("child", "my", 3)
    assert (child.data_models.fit.epochs, child.data_models.fit.lr) == (7, 1e-3)
    assert (child.meta_train.lr, child.meta_train.epochs, child.meta_train.batch_size) == (0.5, 5, 4)
    assert child.finetune == base.finetune
    assert load_recipe(write_dump(tmp_path, child)) == child


def write_dump(folder: Path, recipe: Recipe) -> Path:
    path = folder / "dump.yaml"
    path.write_text(dump_recipe(recipe))
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: child.yaml\n", "child.yaml:1"),  # of itself
        ("base: [my.yaml]\n", "bad 'base': expected the name or path of another recipe; got ['my.yaml']"),
        ("base: nothing.yaml\n", "no recipe 'nothing.yaml'"),
        ("base: my.yaml\nmeta_train: {epochs: many}\n", "child.yaml:2"),
        ("base: my.yaml\nmetatrain: {epochs: 1}\n", "did you mean 'meta_train'?"),
    ],
)
def test_a_wrong_base_says_what_and_where(write, text: str, said: str) -> None:
    write()
    Path("child.yaml").write_text(text)
    assert said in message("child.yaml")


def test_a_mistake_in_the_base_is_placed_there(write) -> None:
    write("lr: 1e-3", "lr: -1")
    Path("child.yaml").write_text("base: my.yaml\nseed: 1\n")
    assert "my.yaml:6" in message("child.yaml")


def test_methods(write) -> None:
    assert "unknown method: expected one of metanetwork, vote, matrix; got 'voting'" in message(
        write("", "method: voting\n")
    )
    assert "unknown key" in message(write("", "method: vote\n"))
    assert load_recipe("graph-mask-voting").method == "vote"
    said = message("graph-mask-voting", "vote.fit={epochs: 3, lr: 0.1}")
    assert "give vote.fit.iterations" in said
    assert "vote.neighbours (99) are more than zoo.tasks" in message("graph-mask-voting", "vote.neighbours=99")
    assert "give one of fit and simsiam" in message("graph-mask-voting", "pretrain={}")
    assert "votes are of the whole network" in message("quickstart", "prune.votes=x")
    said = message("graph-mask-voting", "vote.fit.batch_size=16")
    assert "vote.fit.batch_size is 16, zoo.filters.batch_size 64" in said
    assert "train and test name parquet files, and name is digits" in message("quickstart", "data.train=x.parquet")
