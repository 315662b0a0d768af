"""Runs that kill themselves: a server that imports everything once, and forks a process for every run.

It reads orders from stdin, a line of JSON each: a list of `[verb, recipe, folder, tick, fault]`, which run at the same
time: `gmn VERB` on the folder, with recipe, overrides and options (`select`: options alone). At the tick (null: never)
the fault happens; in place of a number it may be a part of a path, and means the first access to such a file:

    kill        the process sends itself SIGKILL
    interrupt   it sends itself SIGINT, as Ctrl-C does
    full        from here on no file of the folder can be opened for writing or renamed: the disk is full

A tick is a step of an optimizer, or an access to a file of the run folder (open, rename, delete, ...), whatever comes
first, so that the same number is the same moment in every run. The answer is a line of JSON: `[exit status, ticks]` for
each process, with minus the signal for one that was killed.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401  (what a run imports late: once, not in every process)
import torch
import torch._dynamo
import torch_pruning.utils  # noqa: F401
from torch.optim.optimizer import register_optimizer_step_post_hook

import gmn.pipeline  # noqa: F401
from gmn import report
from gmn.cli import main as command

Job = tuple[str, list[str], str, int | str | None, str]
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "sqlite3.connect")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Clock:
    """Counts ticks, and lets a fault happen at one of them."""

    def __init__(self, folder: str, last: int | str | None, fault: str) -> None:
        self.folder, self.last, self.fault, self.ticks = folder, last, fault, 0

    def tick(self, *_: object) -> None:
        self.ticks += 1
        if self.ticks == self.last and self.fault != "full":
            self.end()

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGINT)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python tells what it is about to do; an error here is one of the operation."""
        if event not in FILES or not arguments or self.folder not in str(arguments[0]):
            return
        self.tick()
        if isinstance(self.last, str) and self.last in str(arguments[0]):
            self.end()
        writes = event == "os.rename" or (event == "open" and arguments[2] & WRITING)
        if self.fault == "full" and isinstance(self.last, int) and self.ticks >= self.last and writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


def work(verb: str, recipe: list[str], folder: str, last: int | str | None, fault: str) -> tuple[int, int]:
    """`gmn VERB` in this process; its exit code, and how many ticks it had."""
    clock = Clock(folder, last, fault)
    sys.addaudithook(clock.audit)
    register_optimizer_step_post_hook(clock.tick)
    options = [part for field in recipe[1:] for part in ([field] if field.startswith("--") else ["--set", field])]
    arguments = [verb, *recipe[:1], *options, "--run", folder, "--resume"]
    if verb == "select":
        arguments = [verb, folder, *recipe]
    if verb == "join":
        while not (Path(folder) / "zoo" / "index.sqlite").exists():
            time.sleep(0.01)
        arguments = [verb, folder]
    sys.argv, report.show = ["gmn", *arguments], lambda *_: None  # type: ignore[assignment]  # pictures take long
    try:
        command()
    except SystemExit as end:
        return int(end.code or 0), clock.ticks
    return 0, clock.ticks


def forked(job: Job) -> tuple[int, int]:
    """Start a process; its id, and where its ticks can be read."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code, ticks = work(*job)
            os.write(writing, str(ticks).encode())
        except BaseException:  # whatever it is: a child never returns into the loop of its parent
            traceback.print_exc()
        os._exit(code)
    os.close(writing)
    return pid, reading


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets those it starts with & ignore it
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what the runs print
        for line in sys.stdin:
            answer = []
            for pid, reading in [forked(job) for job in json.loads(line)]:
                ticks = os.read(reading, 100)
                os.close(reading)
                answer.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(ticks or 0)])
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
