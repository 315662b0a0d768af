"""The keys that a recipe can have, with what each takes, its default and its meaning: what `gmn keys` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table

from gmn.consoles import wide_console
from gmn.errors import GmnError
from gmn.names import nearest, refuse_unknown
from gmn.recipe import METHODS
from gmn.recipe_errors import section_model

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "mapping"}


@dataclass(frozen=True)
class RecipeKey:
    """A key as it is written after `--set`; the default as YAML, None where the key must be given."""

    key: str
    takes: str
    default: str | None
    meaning: str


def keys(method: str = "metanetwork", section: str = "") -> list[RecipeKey]:
    """The keys of a section and of those in it, or of that name; without one the outermost of a recipe of this method.

    Raises:
        GmnError: no such method, no such section.

    >>> [key.default for key in keys(section="prune.steps")]
    ['200']
    """
    every = all_keys(method)
    if not section:
        return [key for key in every if "." not in key.key]
    if not (found := [key for key in every if f"{key.key}.".startswith(f"{section}.")]):
        hint = nearest(section, [key.key for key in every])
        raise GmnError("no such section or key", expected="one that `gmn keys` lists", got=section, hint=hint)
    return found


def all_keys(method: str) -> list[RecipeKey]:
    """Every key of a recipe of this method, in the order of the sections; GmnError if there is no such method."""
    refuse_unknown("method", method, METHODS)
    return list(_keys(METHODS[method], ""))


def show(method: str, section: str) -> None:
    """Print keys as a table."""
    table = Table(title=f"recipes with method: {method}")
    table.add_column("key", no_wrap=True)  # whole, for it is copied
    for name in ("takes", "default", "meaning"):
        table.add_column(name)
    for key in keys(method, section):
        default = "must be given" if key.default is None and key.key != "name" else key.default
        table.add_row(key.key, key.takes, default, key.meaning)
    wide_console().print(table)


def _keys(model: type[BaseModel], prefix: str) -> Iterator[RecipeKey]:
    schema = model.model_json_schema()
    properties = schema.get("$defs", {}).get(model.__name__, schema)["properties"]  # in $defs where it holds itself
    for name, field in model.model_fields.items():
        yield RecipeKey(f"{prefix}{name}", _takes(properties[name]), _default(field), field.description or "")
        inner = section_model(field.annotation)
        if inner is not None and get_origin(field.annotation) is not dict:  # what has labels ends here
            yield from _keys(inner, f"{prefix}{name}.")


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _takes(schema: dict[str, Any]) -> str:
    """What a key takes, in words.

    >>> _takes({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'whole number >= 1 or null'
    """
    if "anyOf" in schema:
        return " or ".join(_takes(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        return "section"
    if schema.get("type") == "array":
        return f"list of {_takes(schema.get('items', {}))}"
    kind: str = schema.get("const") or schema["type"]
    bounds = [f" {sign} {schema[bound]:g}" for bound, sign in BOUNDS.items() if bound in schema]
    return TYPES.get(kind, kind) + ",".join(bounds)
