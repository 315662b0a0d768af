"""Names that users write: functions by `package.module:function`, and hints for names that are unknown."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gmn.errors import GmnError


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """A hint that names the nearest valid names, or None.

    >>> nearest("cifar11", ["cifar10", "svhn"])
    "did you mean 'cifar10'?"
    """
    close = difflib.get_close_matches(name, list(valid), n=3)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else None


def refuse_unknown(what: str, name: str, known: Iterable[str]) -> None:
    """Raise GmnError, with the nearest names, unless a name is known.

    >>> refuse_unknown("colour", "red", ["red", "blue"])
    """
    if name not in (valid := list(known)):
        raise GmnError(f"no such {what}", expected=f"one of {', '.join(valid)}", got=name, hint=nearest(name, valid))


def import_function(name: str, error: type[GmnError]) -> Callable[..., Any]:
    """The callable that `package.module:function` names; raises `error` when there is none.

    >>> import_function("math:sqrt", GmnError)(9.0)
    3.0
    """
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except (ImportError, ValueError, SyntaxError) as problem:
        raise error(f"cannot import module {module_name!r}", got=str(problem), where=name) from problem
    if not callable(found):
        raise error("no such function", expected=f"{attribute!r} in module {module_name!r}", where=name)
    return found


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function takes as keywords.

    >>> accepted(lambda num_classes: None, {"num_classes": 10, "in_channels": 3})
    {'num_classes': 10}
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-ins have no signature: nothing is known to be accepted
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {key: value for key, value in arguments.items() if key in names}


def printable(content: object) -> bool:
    """Whether a terminal can show all texts in some JSON: none has control characters.

    >>> printable({"a": ["b"]}), printable(["\\x1b[2J"])
    (True, False)
    """
    if isinstance(content, dict):
        return all(map(printable, [*content, *content.values()]))
    return all(map(printable, content)) if isinstance(content, list) else str(content).isprintable()
