"""What ends a command: one line for the user, and an exit code that scripts can tell apart.

    0    done                                       3    the disk: full, read-only, no permission, broken
    1    a check found something (`gmn zoo verify`)  4    out of memory, of the machine or of the accelerator
    2    a mistake in the call, a recipe or a file   130  stopped with Ctrl-C

A bug keeps its traceback, and exit code 1. So ends, without a word, what writes to a pipe that nobody reads any more
(`gmn report RUN | head`): the libraries of the command line see to it. What a signal ends has 128 + its number, as
always. A download that fails is a mistake, though Python has it among the errors of the disk.
"""

from __future__ import annotations

from gmn.errors import GmnError, first_line, no_memory, one_line

MISTAKE, DISK, MEMORY, STOPPED = 2, 3, 4, 130
WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
CONNECTIONS = {"urllib", "urllib3", "http", "httpx", "requests", "huggingface_hub", "socket", "ssl"}
"""The libraries whose errors are of connections; most are errors of the system too."""
KEPT = "what is finished is kept: go on with --resume"
SMALLER = "smaller batches, metanetwork.max_chunk_mb and bf16 take less"


class Stopped(BaseException):
    """Ctrl-C, under a name that the library of the command line does not catch."""


def verdict(error: BaseException, *, resumable: bool = False) -> tuple[int, str] | None:
    """The exit code and the line for an error; None if it is a bug.

    Args:
        error: What ended the command.
        resumable: Whether the command has `--resume`.

    >>> verdict(OSError(28, "No space left on device", "a.json"), resumable=True)
    (3, 'No space left on device: a.json; what is finished is kept: go on with --resume')
    >>> verdict(FileNotFoundError(2, "No such file or directory", "b.json"))
    (2, 'No such file or directory: b.json')
    >>> verdict(ConnectionResetError(104, "Connection reset by peer"))
    (2, 'a connection failed: ConnectionResetError: [Errno 104] Connection reset by peer')
    """
    kept = [KEPT] if resumable else []
    if isinstance(error, GmnError):
        return MISTAKE, str(error)
    if (usage := _of_call(error)) is not None:
        return MISTAKE, usage
    if _of_connection(error):
        return MISTAKE, "; ".join([f"a connection failed: {one_line(error)}", *kept])
    if isinstance(error, WRONG_PATH):
        return MISTAKE, _of_system(error)
    if isinstance(error, OSError):
        return DISK, "; ".join([_of_system(error), *kept])
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        return STOPPED, "; ".join(["stopped", *kept])
    if no_memory(error):
        return MEMORY, "; ".join([f"out of memory: {first_line(error)}".removesuffix(": "), SMALLER, *kept])
    return None


def _of_call(error: BaseException) -> str | None:
    """What the library of the command line says is wrong with a call: an error of click's, which typer may bring along.

    Nothing where a command was called without anything, and shows its help.
    """
    context, explain = getattr(error, "ctx", None), getattr(error, "format_message", None)
    if context is None or explain is None:
        return None
    said = str(explain()).strip()
    return f"{said.rstrip('.')}; see {context.command_path} --help" if said and "\n" not in said else said


def _of_connection(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return error.filename is None  # a disk in the network has files
    return any(kind.__module__.partition(".")[0] in CONNECTIONS for kind in type(error).__mro__)


def _of_system(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename or ''}".removesuffix(": ")
