"""Recipes: one YAML file that decides a run. Loading, overriding, writing; errors name file and line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gmn.errors import RecipeError
from gmn.permission import NAMES_CODE, refuse_code
from gmn.settings import Recipe
from gmn.settings_vote import VoteRecipe

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from pydantic_core import ErrorDetails

__all__ = [
    "AnyRecipe",
    "Recipe",
    "VoteRecipe",
    "builtin_recipes",
    "checked",
    "dump_recipe",
    "load_recipe",
    "read_value",
]

AnyRecipe = Recipe | VoteRecipe
AnySection = TypeVar("AnySection", bound=BaseModel)
METHODS: dict[str, type[AnyRecipe]] = {"metanetwork": Recipe, "vote": VoteRecipe}

MOST_BYTES, MOST_KEYS = 500_000, 20_000  # of a recipe; the longest of ours has 3,000 bytes

Key = tuple[int | str, ...]
Places = dict[Key, str]  # where each key was written: "my.yaml:12", or "--set a.b=3"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe from a file, or a built-in one by its name.

    A file of that name goes before a built-in recipe. Relative paths inside a recipe stay as
    they are written: they count from the directory that gmn is started in. Functions that a file names,
    `package.module:function`, are refused outside of `gmn.allow_code()`; those of an override are the caller's own.

    Args:
        source: A path, or a name out of `builtin_recipes()`.
        overrides: Strings such as `"meta_train.epochs=3"`; the value is read as YAML.

    Raises:
        RecipeError: On anything wrong, with file and line; also on a function to call that is not allowed.

    >>> load_recipe("quickstart", ["seed=25"]).seed
    25
    """
    content, places, stem = _read(str(source))
    callers = [_override(content, places, override) for override in overrides]
    content.setdefault("name", stem)
    kind = METHODS.get(method) if isinstance(method := content.get("method", "metanetwork"), str) else None
    if kind is None:
        expected, where = f"one of {', '.join(METHODS)}", places[("method",)]
        raise RecipeError("unknown method", expected=expected, got=reprlib.repr(method), where=where)
    try:
        recipe = kind.model_validate(content)
    except ValidationError as error:
        raise _explain(error.errors(), places, kind) from None
    for key, name in _functions(recipe):
        if not any(key[: len(own)] == own for own in callers):
            refuse_code(name, _dotted(key), _place(key, places), RecipeError)
    return recipe


def builtin_recipes() -> list[str]:
    """List the names of the recipes that come with gmn.

    >>> "quickstart" in builtin_recipes()
    True
    """
    return sorted(_builtins(resources.files("gmn.recipes")))


def dump_recipe(recipe: AnyRecipe) -> str:
    """Write a recipe as YAML that loads back to an equal recipe, every default spelled out.

    >>> "speed_up: 2.5" in dump_recipe(load_recipe("quickstart", ["prune.speed_up=2.5"]))
    True
    """
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def checked(kind: type[AnySection], values: dict[str, Any], shown: str) -> AnySection:
    """A section of a recipe from keyword arguments; RecipeError, which names the function `shown`, if they are wrong.

    >>> from gmn.settings import Ranking
    >>> checked(Ranking, {"round_to": 8}, "gmn.prune").round_to
    8
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(error.errors(), {(): shown}, kind) from None


def read_value(text: str, shown: str) -> Any:
    """A value on the command line, as YAML; RecipeError, which names the option `shown`, if it is none.

    >>> read_value("[1e-3, null]", "--set x")
    [0.001, None]
    """
    return _parse(text, shown)[0]


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


# Finding


def _builtins(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _builtins(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


def _find(source: str) -> tuple[str, str, str]:
    """Text of the recipe, the name to show in errors, and the default name of the run."""
    names = builtin_recipes()
    if Path(source).is_file():
        place: Path | Traversable = Path(source)
    elif source in names:
        place = resources.files("gmn.recipes").joinpath(*f"{source}.yaml".split("/"))
    else:
        near = difflib.get_close_matches(source.removesuffix(".yaml"), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise RecipeError(f"no recipe {source!r}", expected=f"a file, or one of {', '.join(names)}", hint=hint)
    try:
        with place.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("recipe cannot be read", got=str(error), where=source) from None
    if len(text) > MOST_BYTES:
        raise RecipeError("not a recipe: too long", expected=f"{MOST_BYTES:,} characters at most", where=source)
    return text, source if isinstance(place, Path) else f"{source}.yaml", PurePath(place.name).stem


def _read(source: str, seen: tuple[str, ...] = ()) -> tuple[dict[str, Any], Places, str]:
    """Keys and values of a recipe, over those of the recipe that its key `base` names."""
    text, shown, stem = _find(source)
    content, places = _parse(text, shown)
    if not isinstance(content, dict):
        raise RecipeError("a recipe is a mapping of keys", got=reprlib.repr(content), where=shown)
    base = content.pop("base", None)
    if base is None:
        return content, places, stem
    if not isinstance(base, str) or shown in seen:
        expected, where = "the name or path of another recipe", places[("base",)]
        raise RecipeError("bad 'base'", expected=expected, got=reprlib.repr(base), where=where)
    under, where, _ = _read(base, (*seen, shown))
    under.pop("name", None)
    return _over(content, under), {**where, **places}, stem


def _over(content: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; anything else replaces what is in the base."""
    merged = dict(base)
    for key, value in content.items():
        below = merged.get(key)
        merged[key] = _over(value, below) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


# YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number; YAML 1.1 wants 1.0e-3."""


class _Dumper(yaml.SafeDumper):
    """The opposite of `_Loader`; it also writes paths."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def _parse(text: str, shown: str) -> tuple[Any, Places]:
    """Read YAML; also return where each key was written."""
    places: Places = {(): shown}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, places
        _walk(node, (), places, shown)
        return loader.construct_document(node), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1}" if mark else shown
        raise RecipeError(f"not valid YAML, {error.problem}", where=where) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"not valid YAML, {str(error).splitlines()[0]}", where=shown) from None


def _walk(node: yaml.Node, key: Key, places: Places, shown: str) -> None:
    """Note the line of every key; a key that comes twice is an error, and so are aliases that make millions of them."""
    if len(places) > MOST_KEYS:
        raise RecipeError("not a recipe: too long", expected=f"{MOST_KEYS:,} keys at most", where=shown)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*key, index)] = f"{shown}:{item.start_mark.line + 1}"
            _walk(item, (*key, index), places, shown)
    elif isinstance(node, yaml.MappingNode):
        own: set[str] = set()
        for name, value in node.value:
            where, child = f"{shown}:{name.start_mark.line + 1}", (*key, str(name.value))
            if child[-1] in own:
                raise RecipeError(f"key {child[-1]!r} comes twice", where=_inside(where, key))
            own.add(child[-1])
            places[child] = where
            _walk(value, child, places, shown)


def _override(content: dict[str, Any], places: Places, override: str) -> Key:
    """Set one value of a recipe, from `section.key=value`; returns its key."""
    dotted, equals, text = (part.strip() for part in override.partition("="))
    shown = f"--set {override}"
    *parents, last = dotted.split(".")
    if not equals or not all([*parents, last]):
        raise RecipeError("bad override", expected="section.key=value", got=repr(override))
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
    key = (*parents, last)
    for old in [old for old in places if old[: len(key)] == key]:
        del places[old]
    places[key] = shown
    return key


# Errors


def _explain(errors: Sequence[ErrorDetails], places: Places, kind: type[BaseModel]) -> RecipeError:
    """Turn what pydantic found into one line; unknown keys first, they often cause the rest."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    explain = {"extra_forbidden": _unknown, "missing": _missing, "value_error": _rejected}
    error = explain.get(first["type"], _wrong_value)(first, places, kind)
    more = len(errors) - 1
    return RecipeError(f"{error} (and {more} more)") if more else error


def _unknown(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    *parents, name = error["loc"]
    keys = list(_section(parents, kind).model_fields)
    near = difflib.get_close_matches(str(name), keys, n=1)
    return RecipeError(
        f"unknown key {name!r}",
        expected=f"one of {', '.join(keys)}",
        where=_inside(_place(error["loc"], places), parents),
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def _missing(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    *parents, name = error["loc"]
    meaning = _section(parents, kind).model_fields[str(name)].description
    where = _inside(_place(parents, places), parents)
    return RecipeError(f"missing key {name!r}", expected=meaning, where=where)


def _rejected(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    name = _dotted(error["loc"]) or "recipe"
    text = error["msg"].removeprefix("Value error, ")
    return RecipeError(f"bad {name!r}: {text}", where=_place(error["loc"], places))


def _wrong_value(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    wanted = re.sub(r"^.* should (be |have )?|^Value | after validation.*", "", error["msg"])
    if error["type"] in ("model_type", "dict_type"):
        wanted = "a mapping of keys"
    return RecipeError(
        f"bad value for {_dotted(error['loc'])!r}",
        expected=wanted,
        got=reprlib.repr(error["input"]),
        where=_place(error["loc"], places),
    )


def _place(key: Sequence[int | str], places: Places) -> str:
    """Where the key, or the nearest section around it, was written."""
    found = (tuple(key[:end]) for end in range(len(key), -1, -1))
    return next(places[prefix] for prefix in found if prefix in places)


def _section(key: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    """The model that reads the section at this key."""
    for name in key:
        kind = model.model_fields[str(name)].annotation
        model = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return model


def _inside(where: str, key: Sequence[int | str]) -> str:
    return f"{where} ({_dotted(key)})" if key else where


def _dotted(key: Sequence[int | str]) -> str:
    return ".".join(str(name) for name in key)
