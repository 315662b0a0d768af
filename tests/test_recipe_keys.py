"""Contract of `gmn keys`.

* Every key of every built-in recipe is listed, with all defaults written out; nothing is listed that a recipe lacks.
* A default that is shown is what a recipe gets that leaves the key out.
* A wrong name is refused with the nearest ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from gmn.errors import GmnError
from gmn.recipe import METHODS, AnyRecipe, dump_recipe, load_recipe
from gmn.recipe_bases import builtin_recipes
from gmn.recipe_keys import RecipeKey, all_keys, keys, show

LISTED = {method: {key.key: key for key in all_keys(method)} for method in METHODS}


@pytest.fixture(scope="module")
def recipes() -> list[AnyRecipe]:
    return [load_recipe(name) for name in builtin_recipes()]


def written(content: dict[str, Any], known: dict[str, RecipeKey], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of a recipe with all defaults written out; what a mapping has by label is a value of that mapping."""
    for name, value in content.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict) and any(key.startswith(f"{prefix}{name}.") for key in known):
            yield from written(value, known, f"{prefix}{name}.")


def found_in(recipe: AnyRecipe) -> set[str]:
    return {key for key, _ in written(yaml.safe_load(dump_recipe(recipe)), LISTED[recipe.method])}


def test_sections_hold_all_keys() -> None:
    for method, known in LISTED.items():
        assert [key for outer in keys(method) for key in keys(method, outer.key)] == list(known.values())


def test_recipes_have_no_other_keys(recipes: list[AnyRecipe]) -> None:
    for recipe in recipes:
        assert found_in(recipe) <= set(LISTED[recipe.method]), recipe.name


@pytest.mark.parametrize("method", ["metanetwork", "vote"])
def test_all_keys_are_those_of_some_recipe(method: str, recipes: list[AnyRecipe]) -> None:
    found = {key for recipe in recipes if recipe.method == method for key in found_in(recipe)}
    assert {key for key in LISTED[method] if not key.startswith("rewrite.")} <= found | {"data_models.initial_fit"}


def test_defaults_are_what_a_recipe_gets(tmp_path: Any) -> None:
    least = {
        "data": {"name": "digits"},
        "network": {"name": "cifar.resnet8"},
        "data_models": {"fit": {"epochs": 1, "lr": 0.1}},
        "meta_train": {"epochs": 1, "steps_per_epoch": 1, "batch_size": 8},
        "finetune": {"after_prune": {"epochs": 1, "lr": 0.1}},
    }
    (tmp_path / "least.yaml").write_text(yaml.safe_dump(least))
    recipe = load_recipe(tmp_path / "least.yaml")
    known = LISTED["metanetwork"]
    given = {"name", "prune.speed_up"} | {key for key, _ in written(least, known)}  # null is 2 where channels go
    checked = 0
    for key, value in written(yaml.safe_load(dump_recipe(recipe)), known):
        if key not in given and known[key].takes != "section":
            assert yaml.safe_load(known[key].default) == value, key
            checked += 1
    assert checked > 80


def test_what_a_key_takes() -> None:
    takes = {key.key: key.takes for key in keys(section="prune")}
    assert takes["prune.speed_up"].startswith("number > 1")
    assert takes["prune.ranking"] == "global, local"
    assert takes["prune.keep"] == "list of text"
    assert LISTED["metanetwork"]["data_models.initial_speed_up"].takes == "number >= 1 or auto"


def test_wrong_names() -> None:
    with pytest.raises(GmnError, match=r"no such section or key.*got prune\.spedup.*did you mean 'prune\.speed_up'"):
        keys(section="prune.spedup")
    with pytest.raises(GmnError, match=r"no such method.*votes"):
        keys("votes")


@pytest.mark.parametrize("width", [60, 120])
def test_a_narrow_table_has_whole_keys(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show("metanetwork", "data_models")
    shown = capsys.readouterr().out
    assert "data_models.initial_fit.images_per_epoch" in shown
    assert max(map(len, shown.splitlines())) <= width


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show("metanetwork", "meta_train")
    shown = capsys.readouterr().out
    assert "learning rate of AdamW" in shown
    assert "must be given" in shown


def test_the_command(command: Callable[..., Any], tmp_path: Any) -> None:
    result = command("keys", "prune.steps", cwd=tmp_path)
    assert result.returncode == 0
    assert "200" in result.stdout
