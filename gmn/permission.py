"""Whether functions that a file names, `package.module:function`, may be called: not unless the user says so.

What a caller writes himself, as an argument or with `--set`, is his own and is not asked about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gmn.errors import GmnError

NAMES_CODE = "may name a function to call"
"""Mark of such a field: `Annotated[str, NAMES_CODE]`."""

_ALLOWED: ContextVar[frozenset[str] | None] = ContextVar("allowed", default=frozenset())  # None: all


@contextmanager
def allow_code(*, only: Iterable[str] | None = None) -> Iterator[None]:
    """Inside the `with`, files may name functions to be called: recipes, saved networks, graph files.

    Args:
        only: Their names, such as `["my.networks:build"]`; None allows all.

    >>> with allow_code(only=["my.networks:build"]):
    ...     refuse_code("my.networks:build", "network.name", "my.yaml:3")
    """
    before = _ALLOWED.get()
    token = _ALLOWED.set(None if only is None or before is None else before | frozenset(only))
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def allowed_code() -> frozenset[str] | None:
    """The names that are allowed here, None for all: for `allow_code` in a process that works for this one."""
    return _ALLOWED.get()


def refuse_code(name: object, key: str, where: str, error: type[GmnError] = GmnError) -> None:
    """Raise `error` if a name that was read from a file is a function's, and nobody allowed it.

    Args:
        name: What the file says.
        key: Under which key.
        where: The file, perhaps with a line.

    >>> refuse_code("os:abort", "network.name", "my.yaml:3")
    Traceback (most recent call last):
    gmn.errors.GmnError: network.name wants to run code: got 'os:abort'; in my.yaml:3; if you trust it, allow it \
with --allow-code, in Python inside `with gmn.allow_code():`
    """
    allowed = allowed_code()
    if isinstance(name, str) and ":" in name and allowed is not None and name not in allowed:
        hint = "if you trust it, allow it with --allow-code, in Python inside `with gmn.allow_code():`"
        raise error(f"{key} wants to run code", got=repr(name), where=where, hint=hint)
