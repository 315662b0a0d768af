"""Recipes: one YAML file that decides a run. Loading, overriding, writing; errors name file and line."""

from __future__ import annotations

import copy
import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from gmn.errors import RecipeError
from gmn.permission import NAMES_CODE, refuse_code
from gmn.recipe_yaml import MOST_BYTES, Dumper, Key, Places, dotted_key, inside, parse
from gmn.settings import MetaTrain, Recipe
from gmn.settings_matrix import MatrixRecipe
from gmn.settings_vote import VoteRecipe

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from pydantic_core import ErrorDetails

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
    content, places, stem = _read(str(source))
    if seed is not None:
        overrides = [*overrides, f"{'common.' * (content.get('method') == 'matrix')}seed={seed}"]
    entries = [override for override in overrides if _ENTRIES.match(override)]
    for override in entries:  # these name files, which are not the caller's own words
        _override(content, places, override)
    if content.get("method") == "matrix":
        _write_out(content, places)
    callers: list[Key] = []
    for override in overrides:
        if override not in entries:
            callers += _override(content, places, override)
    said = {text for key in callers for text in _texts(_at(content, key))}  # ahead of what kinds have from the file
    _write_out_kinds(content)
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
        own = "also" in key or any(key[: len(caller)] == caller for caller in callers)  # a kind has what the recipe has
        if not (own and name in said):
            refuse_code(name, dotted_key(key), _place(key, places), RecipeError)
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
        raise _explain(error.errors(), {(): shown}, kind) from None


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


def _at(content: object, key: Key) -> object:
    for name in key:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _texts(value: object) -> Iterator[str]:
    """The texts in a value, wherever they stand."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    yield from [value] if isinstance(value, str) else (text for item in inner for text in _texts(item))


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
    if _is_file(Path(source)):
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def _read(source: str, seen: tuple[str, ...] = ()) -> tuple[dict[str, Any], Places, str]:
    """Keys and values of a recipe, over those of the recipe that its key `base` names."""
    text, shown, stem = _find(source)
    content, places = parse(text, shown)
    if not isinstance(content, dict):
        raise RecipeError("a recipe is a mapping of keys", got=reprlib.repr(content), where=shown)
    return *_over_base(content, places, seen, shown), stem


def _over_base(
    content: dict[str, Any], places: Places, seen: tuple[str, ...] = (), shown: str = ""
) -> tuple[dict[str, Any], Places]:
    """Keys and values over those of the recipe that the key `base` names, a file beside the one that names it first."""
    base = content.pop("base", None)
    if base is None:
        return content, places
    where = places[("base",)]
    if not isinstance(base, str) or shown in seen:
        expected = "the name or path of another recipe"
        raise RecipeError("bad 'base'", expected=expected, got=reprlib.repr(base), where=where)
    beside = Path(where.rpartition(":")[0]).parent / base
    under, below, _ = _read(str(beside) if _is_file(beside) else base, (*seen, shown))
    under.pop("name", None)
    return _over(content, under), {**below, **places}


def _over(content: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; anything else replaces what is in the base, and so does another network."""
    merged = dict(base)
    for key, value in content.items():
        below = merged.get(key)
        merged[key] = value
        if isinstance(value, dict) and isinstance(below, dict) and not (key == "network" and _renamed(value, below)):
            merged[key] = _over(value, below)
    return merged


def _renamed(network: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether the base has another network: its options and weights are no use then."""
    return network.get("name", base.get("name")) != base.get("name")


# Entries of a matrix


_ENTRIES = re.compile(r"\s*(common(\.base)?|entries(\.[^.=]+(\.base)?)?)\s*=")  # overrides that say what there is


def _entries(content: dict[str, Any]) -> dict[Any, Any]:
    entries = content.get("entries")
    return entries if isinstance(entries, dict) else {}


def _write_out(content: dict[str, Any], places: Places) -> None:
    """Write every entry out in full: its base, over that what is common, over that its own keys."""
    common, entries = content.get("common", {}), _entries(content)
    if not isinstance(common, dict):
        expected, got = "a mapping of keys", reprlib.repr(common)
        raise RecipeError("bad value for 'common'", expected=expected, got=got, where=places["common",])
    content["common"], shared = {}, _under(places, ("common",))
    for label, entry in entries.items():
        key = ("entries", str(label))
        if isinstance(entry, str):
            entry, places[(*key, "base")] = {"base": entry}, places[key]
        if isinstance(entry, dict):
            entries[label], where = _entry(str(label), entry, common, _under(places, key), shared)
            places.update({(*key, *inner): place for inner, place in where.items()})


def _entry(
    label: str, own: dict[str, Any], common: dict[str, Any], places: Places, shared: Places
) -> tuple[dict[str, Any], Places]:
    base = {"base": own.pop("base")} if "base" in own else {}
    under, where = _over_base({**common, **base}, {**shared, **places})
    entry, where = copy.deepcopy({"name": label, **_over(own, under)}), {**where, **places}
    if entry.get("method", "metanetwork") != "metanetwork":
        expected, got = "metanetwork recipes", f"method: {reprlib.repr(entry['method'])} of {label}"
        raise RecipeError("no entry of a matrix", expected=expected, got=got, where=_place(["method"], where))
    return entry, where


# Kinds of networks to learn on


def _write_out_kinds(content: dict[str, Any]) -> None:
    """Write every kind of `data_models.also` out in full: its own keys over those of the recipe, or of the entry."""
    for recipe in (content, *_entries(content).values()):
        models = recipe.get("data_models") if isinstance(recipe, dict) else None
        also = models.get("also") if isinstance(models, dict) else None
        if models and isinstance(also, dict):
            shared = _shared(recipe, models)
            models["also"] = {
                label: _over(own, shared) if isinstance(own, dict) else own for label, own in also.items()
            }


def _shared(recipe: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of its own kind of networks."""
    shared = copy.deepcopy({key: recipe[key] for key in ("data", "network") if key in recipe})
    shared["data_models"] = {key: value for key, value in models.items() if key != "also"}
    training, usual = recipe.get("meta_train"), MetaTrain.model_fields["pruner_reg"].default
    return shared | {"pruner_reg": training.get("pruner_reg", usual) if isinstance(training, dict) else usual}


def _under(places: Places, key: Key) -> Places:
    """The places of a section's keys, as that section counts them."""
    return {place[len(key) :]: where for place, where in places.items() if place[: len(key)] == key}


# Overriding


def _override(content: dict[str, Any], places: Places, override: str) -> list[Key]:
    """Set a value of a recipe, from `section.key=value`; in every entry, if it is common to a matrix's. Its keys."""
    dotted, equals, text = (part.strip() for part in override.partition("="))
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError("bad override", expected="section.key=value", got=repr(override))
    shared = keys[0] == "common" and not _ENTRIES.match(override)
    found = [("entries", str(label), *keys[1:]) for label in _entries(content)] if shared else [tuple(keys)]
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
    everywhere = f"for all entries: common.{name}" if "common" in keys else None
    return RecipeError(
        f"unknown key {name!r}",
        expected=f"one of {', '.join(keys)}",
        where=inside(_place(error["loc"], places), parents),
        hint=f"did you mean {near[0]!r}?" if near else everywhere,
    )


def _missing(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    *parents, name = error["loc"]
    meaning = _section(parents, kind).model_fields[str(name)].description
    where = inside(_place(parents, places), parents)
    return RecipeError(f"missing key {name!r}", expected=meaning, where=where)


def _rejected(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    name = dotted_key(error["loc"]) or "recipe"
    text = error["msg"].removeprefix("Value error, ")
    return RecipeError(f"bad {name!r}: {text}", where=_place(error["loc"], places))


def _wrong_value(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    wanted = re.sub(r"^.* should (be |have )?|^Value | after validation.*", "", error["msg"])
    if error["type"] in ("model_type", "dict_type"):
        wanted = "a mapping of keys"
    return RecipeError(
        f"bad value for {dotted_key(error['loc'])!r}",
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
    names = iter(key)
    for name in names:
        kind = model.model_fields[str(name)].annotation
        model = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
        if get_origin(kind) is dict:
            next(names, None)  # a label
    return model
