"""Recipes as YAML: text to keys and values, with the line of every key; errors name file and line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import yaml

from gmn.errors import RecipeError

Key = tuple[int | str, ...]
Places = dict[Key, str]  # where each key was written: "my.yaml:12", or "--set a.b=3"

MOST_BYTES, MOST_KEYS = 500_000, 20_000  # of a recipe; the longest of ours has 3,000 bytes


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number, where YAML 1.1 wants 1.0e-3, and 2:4 as text."""


class Dumper(yaml.SafeDumper):
    """The opposite of `_Loader`; it also writes paths."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
for _digit in "123456789":  # before the rest: YAML 1.1 reads 2:4 as two minutes and four seconds
    _Loader.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def parse(text: str, shown: str) -> tuple[Any, Places]:
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
                raise RecipeError(f"key {child[-1]!r} comes twice", where=inside(where, key))
            own.add(child[-1])
            places[child] = where
            _walk(value, child, places, shown)


def inside(where: str, key: Sequence[int | str]) -> str:
    """A place, and the key that is meant there.

    >>> inside("my.yaml:6", ["data_models", "fit"])
    'my.yaml:6 (data_models.fit)'
    """
    return f"{where} ({dotted_key(key)})" if key else where


def dotted_key(key: Sequence[int | str]) -> str:
    """The key as `--set` takes it."""
    return ".".join(str(name) for name in key)
