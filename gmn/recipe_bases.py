"""Where recipes come from: files and built-in names, the bases under them, entries and kinds written out in full."""

from __future__ import annotations

import copy
import difflib
import reprlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from gmn.errors import RecipeError
from gmn.recipe_errors import place_of
from gmn.recipe_yaml import MOST_BYTES, Key, Places, parse
from gmn.settings import MetaTrain

if TYPE_CHECKING:
    from importlib.abc import Traversable


def builtin_recipes() -> list[str]:
    """List the names of the recipes that come with gmn.

    >>> "quickstart" in builtin_recipes()
    True
    """
    return sorted(_builtins(resources.files("gmn.recipes")))


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


def read_source(source: str, seen: tuple[str, ...] = ()) -> tuple[dict[str, Any], Places, str]:
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
    under, below, _ = read_source(str(beside) if _is_file(beside) else base, (*seen, shown))
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


def entries_of(content: dict[str, Any]) -> dict[Any, Any]:
    entries = content.get("entries")
    return entries if isinstance(entries, dict) else {}


def write_out_entries(content: dict[str, Any], places: Places) -> None:
    """Write every entry out in full: its base, over that what is common, over that its own keys."""
    common, entries = content.get("common", {}), entries_of(content)
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
        raise RecipeError("no entry of a matrix", expected=expected, got=got, where=place_of(["method"], where))
    return entry, where


# Kinds of networks to learn on


def write_out_kinds(content: dict[str, Any]) -> None:
    """Write every kind of `data_models.also` out in full: its own keys over those of the recipe, or of the entry."""
    for recipe in (content, *entries_of(content).values()):
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
