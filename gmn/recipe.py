"""Recipes: one YAML file that decides a run. Loading, overriding, writing; errors name file and line."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gmn.errors import RecipeError
from gmn.permission import NAMES_CODE, refuse_code
from gmn.recipe_bases import entries_of, read_source, write_out_entries, write_out_kinds
from gmn.recipe_errors import explain, place_of
from gmn.recipe_yaml import Dumper, Key, Places, dotted_key, parse
from gmn.settings import Recipe
from gmn.settings_matrix import MatrixRecipe
from gmn.settings_vote import VoteRecipe

AnyRecipe = Recipe | VoteRecipe | MatrixRecipe
AnySection = TypeVar("AnySection", bound=BaseModel)
METHODS: dict[str, type[AnyRecipe]] = {"metanetwork": Recipe, "vote": VoteRecipe, "matrix": MatrixRecipe}


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, seed: int | None = None) -> AnyRecipe:
    """Read a recipe from a file, or a built-in one by its name.

    A file of that name goes before a built-in recipe. Relative paths inside a recipe stay as
    they are written: they count from the directory that gmn is started in. Functions that a file names,
    `package.module:function`, are refused outside of `gmn.allow_code()`; those of an override are the caller's own.

    Args:
        source: A path, or a name out of `builtin_recipes()`.
        overrides: Strings such as `"meta_train.epochs=3"`; the value is read as YAML.
        seed: Of everything random; of a matrix, that of all entries that have none of their own.

    Raises:
        RecipeError: On anything wrong, with file and line; also on a function to call that is not allowed.

    >>> load_recipe("quickstart", ["seed=25"]).seed
    25
    """
    content, places, stem = read_source(str(source))
    if seed is not None:
        overrides = [*overrides, f"{'common.' * (content.get('method') == 'matrix')}seed={seed}"]
    entries = [override for override in overrides if _ENTRIES.match(override)]
    for override in entries:  # these name files, which are not the caller's own words
        _override(content, places, override)
    if content.get("method") == "matrix":
        write_out_entries(content, places)
    callers: list[Key] = []
    for override in overrides:
        if override not in entries:
            callers += _override(content, places, override)
    said = {text for key in callers for text in _texts(_at(content, key))}  # ahead of what kinds have from the file
    write_out_kinds(content)
    content.setdefault("name", stem)
    kind = METHODS.get(method) if isinstance(method := content.get("method", "metanetwork"), str) else None
    if kind is None:
        expected, where = f"one of {', '.join(METHODS)}", places[("method",)]
        raise RecipeError("unknown method", expected=expected, got=reprlib.repr(method), where=where)
    try:
        recipe = kind.model_validate(content)
    except ValidationError as error:
        raise explain(error.errors(), places, kind) from None
    for key, name in _functions(recipe):
        if name not in said or not any(own[: len(caller)] == caller for own in _origins(key) for caller in callers):
            refuse_code(name, dotted_key(key), place_of(key, places), RecipeError)
    return recipe


def dump_recipe(recipe: AnyRecipe) -> str:
    """Write a recipe as YAML that loads back to an equal recipe, every default spelled out.

    >>> "speed_up: 2.5" in dump_recipe(load_recipe("quickstart", ["prune.speed_up=2.5"]))
    True
    """
    return yaml.dump(recipe.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def checked(kind: type[AnySection], values: dict[str, Any], shown: str) -> AnySection:
    """A section of a recipe from keyword arguments; RecipeError, which names the function `shown`, if they are wrong.

    >>> from gmn.settings import Ranking
    >>> checked(Ranking, {"round_to": 8}, "gmn.prune").round_to
    8
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain(error.errors(), {(): shown}, kind) from None


def read_value(text: str, shown: str) -> Any:
    """A value on the command line, as YAML; RecipeError, which names the option `shown`, if it is none.

    >>> read_value("[1e-3, null]", "--set x")
    [0.001, None]
    """
    return parse(text, shown)[0]


def _functions(value: object, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """The texts of a recipe that may name a function to call, wherever they stand."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            own = getattr(value, name)
            if NAMES_CODE in field.metadata:
                yield (*key, name), own
            yield from _functions(own, (*key, name))
    elif isinstance(value, (list, tuple, dict)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _functions(item, (*key, name))


def _origins(key: Key) -> list[Key]:
    """The key, and where a kind's value under it may come from.

    >>> _origins(("data_models", "also", "wide", "data", "name"))[1:]
    [('data', 'name')]
    """
    kinds = [end for end in range(2, len(key)) if key[end - 2 : end] == ("data_models", "also")]
    return [key, *(key[: end - 2] + key[end + 1 :] for end in kinds)]


def _at(content: object, key: Key) -> object:
    for name in key:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _texts(value: object) -> Iterator[str]:
    """The texts in a value, wherever they stand."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    yield from [value] if isinstance(value, str) else (text for item in inner for text in _texts(item))


# Overriding


_ENTRIES = re.compile(r"\s*(common(\.base)?|entries(\.[^.=]+(\.base)?)?)\s*=")  # overrides that say what there is


def _override(content: dict[str, Any], places: Places, override: str) -> list[Key]:
    """Set a value of a recipe, from `section.key=value`; in every entry, if it is common to a matrix's. Its keys."""
    dotted, equals, text = (part.strip() for part in override.partition("="))
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError("bad override", expected="section.key=value", got=repr(override))
    shared = keys[0] == "common" and not _ENTRIES.match(override)
    found = [("entries", str(label), *keys[1:]) for label in entries_of(content)] if shared else [tuple(keys)]
    for key in found:
        _set(content, places, key, text, f"--set {override}")
    return list[Key](found)


def _set(content: dict[str, Any], places: Places, key: Sequence[str], text: str, shown: str) -> None:
    *parents, last = key
    target = content
    for depth, name in enumerate(parents, start=1):
        if target.get(name) is None:
            target[name] = {}
            places[tuple(parents[:depth])] = shown
        target = target[name]
        if not isinstance(target, dict):
            got = f"a value at {'.'.join(parents[:depth])!r}"
            raise RecipeError("bad override", expected="a section", got=got, where=shown)
    target[last] = read_value(text, shown)
    for old in [old for old in places if old[: len(key)] == tuple(key)]:
        del places[old]
    places[tuple(key)] = shown
