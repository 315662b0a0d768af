"""The errors a user can meet. Each says what was expected, what was found, where, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class GmnError(Exception):
    """Base of every error that gmn raises on bad input; the CLI prints it as one line.

    Args:
        message: What went wrong, as one sentence.
        expected: What would have been right.
        got: What was found instead.
        where: File, line, module or parameter concerned.
        hint: What the user can do about it.

    >>> print(GmnError("unknown data set", got="'cifar11'", hint="did you mean 'cifar10'?"))
    unknown data set: got 'cifar11'; did you mean 'cifar10'?
    """

    def __init__(
        self,
        message: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        parts = [
            f"expected {expected}" if expected else "",
            f"got {got}" if got else "",
            f"in {where}" if where else "",
            hint or "",
        ]
        details = "; ".join(part for part in parts if part)
        text = f"{message}: {details}" if details else message
        # one line without control characters, whatever a file had in it
        super().__init__("".join(character if character.isprintable() else " " for character in text))


class RecipeError(GmnError):
    """A recipe that cannot be read: unknown key, wrong type, value out of range."""


class DataError(GmnError):
    """A data set that is missing, empty or malformed."""


class NetworkError(GmnError):
    """A network that cannot be built or whose weights do not fit."""


class ConversionError(GmnError):
    """A module or an operation that has no place in the graph."""


class PruningError(GmnError):
    """A pruning that is impossible: nothing to prune, or the target out of reach."""


class TrainingError(GmnError):
    """A training that cannot go on: the loss is not finite, or something that it needs is missing."""


class CheckpointError(GmnError):
    """A saved file that is missing, torn or of another kind."""


MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What code raises that meets content of another form than it expects, such as that of a file."""


@contextmanager
def within(what: str) -> Iterator[None]:
    """Errors of gmn that are raised inside begin with what they concern.

    >>> with within("entry wide"):
    ...     raise GmnError("no such device")
    Traceback (most recent call last):
    gmn.errors.GmnError: entry wide: no such device
    """
    try:
        yield
    except GmnError as error:
        raise type(error)(f"{what}: {error}") from error


def one_line(problem: BaseException) -> str:
    """The kind and the first line of an error; gmn's own errors speak for themselves."""
    first = first_line(problem)
    return first if isinstance(problem, GmnError) else f"{type(problem).__name__}: {first}".removesuffix(": ")


def first_line(problem: BaseException) -> str:
    """What an error says first, without its kind.

    >>> first_line(ValueError("no such thing\\nat line 3"))
    'no such thing'
    """
    return (str(problem).strip().splitlines() or [""])[0]


def no_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, an accelerator's, or that of torch on the CPU, which has no class."""
    torch = sys.modules.get("torch")  # which takes seconds to import
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def of_machine(error: BaseException) -> bool:
    """Whether the memory or the disk failed while a file was read: that says nothing of what is in the file."""
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return no_memory(error) or (isinstance(error, OSError) and error.errno is not None and not missing)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system inside the block names the file: a write that fails does not say which it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def size_within(path: Path, most: int, *, for_whom: str = "", since: str = "") -> int:
    """Bytes of a file that is to be read; CheckpointError if they are more: a file with a hole may claim any size."""
    if (size := path.stat().st_size) > most:
        expected, got = f"{most:,} bytes at most{since}", f"{size:,}"
        raise CheckpointError(f"the file is too large{for_whom}", expected=expected, got=got, where=str(path))
    return size
