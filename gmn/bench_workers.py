"""Processes that measure something in turns, so that a drift of the machine falls on all alike (A B A B).

Each has its own memory: what it reports is its own; on an accelerator it gives back after a turn what it can. A worker
imports a module, calls its `prepare` with the facts, and then takes one turn whenever it is told to.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gmn.errors import first_line
from gmn.memory import limit_memory, machine_memory, memory_now, peak_memory

if TYPE_CHECKING:
    import torch

Numbers = dict[str, float]
Turn = Callable[[bool], Numbers]  # told whether it is the last one, whose time and memory do not count
MEMORY_SHARE = 0.7  # of the machine's: a worker that wants more fails, before the system kills somebody


@dataclass(frozen=True)
class Outcome:
    """What a worker measured: medians over its turns but the first and the last, and the memory in MB that they added.

    `last` is what the last turn said.
    """

    about: dict[str, Any]
    median: Numbers
    last: Numbers
    rounds: int
    peak_mb: float
    failed: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """What every table says of it."""
        return {"rounds": self.rounds, "peak_mb": self.peak_mb, "failed": self.failed}


class Worker:
    """A process that takes turns.

    Args:
        module: Its `prepare(facts)` returns what it built, as numbers, and the function of a turn.
        facts: JSON; its `threads` and `device` are the worker's too.
    """

    def __init__(self, module: str, facts: dict[str, Any]) -> None:
        code = "import sys; from gmn.bench_workers import serve; serve(*sys.argv[1:])"
        safe = ["-P"] if sys.version_info >= (3, 11) else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(facts["threads"])}
        self.process = subprocess.Popen(
            [sys.executable, *safe, "-W", "ignore", "-c", code, module, json.dumps(facts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.said: list[Numbers] = []
        self.failed = ""
        self.about = self._read()

    def turn(self, word: str = "go") -> None:
        """One turn, the last one if the word is `last`; nothing if the process has failed."""
        if self.failed or self.process.stdin is None:
            return
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        found = self._read()
        if not self.failed:
            self.said.append(found)

    def result(self) -> Outcome:
        """What it measured; the process is ended."""
        with suppress(BrokenPipeError):
            self.process.communicate()  # closes its input, which ends it
        if self.failed:
            return Outcome(self.about, {}, {}, 0, 0.0, self.failed)
        _, *counted, last = self.said
        median = {key: statistics.median(turn[key] for turn in counted) for key in counted[0] if key != "peak_mb"}
        return Outcome(self.about, median, last, len(counted), counted[-1]["peak_mb"] - self.about["base_mb"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.failed = f"ended with code {code}" + (" (out of memory?)" if code == -9 else "")
            return {}
        found: dict[str, Any] = json.loads(line)
        self.failed = found.get("failed", "")
        return found


def in_turns(workers: Sequence[Worker], rounds: int, tell: Callable[[], None]) -> list[Outcome]:
    """Let all take turns, one that is not counted before and one after, and return what they measured."""
    for word in ["go"] * (rounds + 1) + ["last"]:
        for worker in workers:
            worker.turn(word)
        tell()
    return [worker.result() for worker in workers]


def serve(module: str, settings: str) -> None:
    """The worker's side: build, say what was built, then one turn per line of input."""
    import torch

    facts = json.loads(settings)
    device = torch.device(facts["device"])
    if device.index is not None:
        torch.cuda.set_device(device)  # events and waits are of the current one
    torch.set_num_threads(facts["threads"])
    total = machine_memory()
    if device.type == "cpu" and total is not None:  # a driver maps more than it takes
        limit_memory(MEMORY_SHARE * total)
    try:
        about, turn = importlib.import_module(module).prepare(facts)
        gc.collect()
        _say(**about, base_mb=_held(device))
        for word in sys.stdin:
            _say(**turn(word.strip() == "last"), peak_mb=_peak(device))
            torch.cuda.empty_cache()
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises a RuntimeError
        text = first_line(error)
        _say(failed="out of memory" if "memory" in text else text)


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """How long a step takes; an accelerator's own clock says it for what it computes, events before and after."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    import torch

    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def device_name(device: torch.device) -> str:
    """As its maker calls it; `cpu` for a processor."""
    import torch

    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _held(device: torch.device) -> float:
    """MB of the process, or of its tensors on an accelerator; from here on the peak counts anew."""
    if device.type == "cpu":
        return memory_now()
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def _peak(device: torch.device) -> float:
    if device.type == "cpu":
        return peak_memory() or 0.0
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**20


def _say(**numbers: Any) -> None:
    print(json.dumps(numbers), flush=True)
