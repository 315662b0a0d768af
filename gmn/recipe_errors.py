"""What pydantic finds wrong in a recipe, as one line that names the key, file and line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel

from gmn.errors import RecipeError
from gmn.recipe_yaml import Places, dotted_key, inside

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def explain(errors: Sequence[ErrorDetails], places: Places, kind: type[BaseModel]) -> RecipeError:
    """Turn what pydantic found into one line; unknown keys first, they often cause the rest."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    one_line = {"extra_forbidden": _unknown, "missing": _missing, "value_error": _rejected}
    error = one_line.get(first["type"], _wrong_value)(first, places, kind)
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
        where=inside(place_of(error["loc"], places), parents),
        hint=f"did you mean {near[0]!r}?" if near else everywhere,
    )


def _missing(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    *parents, name = error["loc"]
    meaning = _section(parents, kind).model_fields[str(name)].description
    where = inside(place_of(parents, places), parents)
    return RecipeError(f"missing key {name!r}", expected=meaning, where=where)


def _rejected(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    name = dotted_key(error["loc"]) or "recipe"
    text = error["msg"].removeprefix("Value error, ")
    return RecipeError(f"bad {name!r}: {text}", where=place_of(error["loc"], places))


def _wrong_value(error: ErrorDetails, places: Places, kind: type[BaseModel]) -> RecipeError:
    wanted = re.sub(r"^.* should (be |have )?|^Value | after validation.*", "", error["msg"])
    if error["type"] in ("model_type", "dict_type"):
        wanted = "a mapping of keys"
    return RecipeError(
        f"bad value for {dotted_key(error['loc'])!r}",
        expected=wanted,
        got=reprlib.repr(error["input"]),
        where=place_of(error["loc"], places),
    )


def place_of(key: Sequence[int | str], places: Places) -> str:
    """Where the key, or the nearest section around it, was written."""
    found = (tuple(key[:end]) for end in range(len(key), -1, -1))
    return next(places[prefix] for prefix in found if prefix in places)


def _section(key: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    """The model that reads the section at this key."""
    names = iter(key)
    for name in names:
        kind = model.model_fields[str(name)].annotation
        inner = section_model(kind)
        assert inner is not None, "pydantic finds mistakes below sections only"
        model = inner
        if get_origin(kind) is dict:
            next(names, None)  # a label
    return model


def section_model(annotation: Any) -> type[BaseModel] | None:
    """The model that reads a field, a section or sections by label; None of any other field."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
