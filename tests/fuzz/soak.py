"""Changed files by the thousand: each ends in a GmnError or in a valid result, within seconds and 2 GB.

    python tests/fuzz/soak.py --cases 400            # of every kind; a table, exit code 1 if something was found
    python tests/fuzz/soak.py --only graphs --first 17 --cases 1   # one case again

The cases run in a process of their own, one after the other, under a limit of time and of address space. That process
says what it begins and how it ended: a case that kills or hangs it is found too, and the next one runs in a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 10.0  # of processor time for one case
PATIENCE = 180.0  # seconds on the clock, for a case that hangs where no signal reaches it
MEMORY = 2 * 2**30  # bytes more than the libraries take
TOO_MUCH = ("allocate", "MemoryError", "bad_alloc")  # said by what was made to allocate what a file claims


@dataclass
class Outcome:
    """What came of the cases of one kind."""

    kind: str
    cases: int = 0
    errors: int = 0
    valid: int = 0
    slowest: float = 0.0
    peak_mb: float = 0.0
    found: Counter[str] = field(default_factory=Counter)


class TimeUp(BaseException):
    """A case took too long."""


class Ran(BaseException):
    """Code ran that a file named."""


# -- the process of the cases ------------------------------------------------------------------------------------------


def serve(names: Sequence[str], first: int, last: int, seed: int, folder: str, seconds: float) -> None:
    """Run cases of the `kinds.py` in a folder, a line of JSON before and after each."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path[:0] = [folder]
    import kinds

    if "torch" in sys.modules:
        _forbid_code()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _time_up)
    limit = _status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            kind, whole = kinds.KINDS[name], Path(place, "whole", name)
            whole.mkdir(parents=True)
            kind.make(whole)
            kinds.LATER.clear()
            kind.use(shutil.copytree(whole, Path(place, "warm", name)))  # what is imported late is not the file's
            if kinds.LATER:
                raise kinds.LATER[0]
            before = _status("VmRSS")
            for number in range(first, last):
                _say(said, begun=number, kind=name)
                target = Path(place, "case")
                shutil.copytree(whole, target)
                kinds.broken(target, kind, random.Random(f"{seed} {name} {number}"))
                result = _tried(kind, target, kinds.LATER, seconds)
                shutil.rmtree(target)
                _say(said, case=number, kind=name, peak_mb=(_status("VmHWM") - before) / 2**20, **result)


def _tried(kind: Any, target: Path, later: list[Any], seconds: float) -> dict[str, Any]:
    from gmn.errors import GmnError

    start, found, later[:] = time.process_time(), "", []
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        kind.use(target)
    except GmnError as error:
        later.append(error)
    except (Exception, TimeUp, Ran) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/gmn/" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the test"
        found = f"{type(error).__name__} in {place}: {error}".split("\n")[0][:200]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    for error in later:
        if any(word in str(error) for word in TOO_MUCH) or "\n" in str(error).strip():
            found = found or f"said: {error}"[:200]
    return {"seconds": time.process_time() - start, "found": found, "refused": bool(later)}


def _forbid_code() -> None:
    """Nobody allows code here: a function that a file names must not even be looked up."""
    from gmn import networks, scores, similarity, sources

    def refuse(name: str, *_: object) -> NoReturn:
        raise Ran(name)

    for module in (networks, scores, similarity, sources):
        assert hasattr(module, "import_function")
        module.import_function = refuse


def _time_up(*_: object) -> None:
    raise TimeUp


def _status(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _say(file: Any, **what: Any) -> None:
    print(json.dumps(what), file=file, flush=True)


# -- the process that watches ------------------------------------------------------------------------------------------


def soak(
    names: Sequence[str],
    cases: int,
    *,
    seed: int = 0,
    first: int = 0,
    folder: Path = Path(__file__).parent,
    seconds: float = SECONDS,
) -> dict[str, Outcome]:
    """Run so many cases of each kind, and return what came of them by kind.

    Args:
        names: Kinds; they share a process until a case ends it.
        cases: Of each.
        seed: Of all changes.
        first: Number of the first case.
        folder: Where `kinds.py` lies.
        seconds: Processor time for one case.
    """
    outcomes, last = {name: Outcome(name) for name in names}, first + cases
    options = ["--seed", str(seed), "--folder", str(folder), "--seconds", str(seconds)]
    waiting = [(list(names), first)]
    while waiting:
        together, start = waiting.pop()
        ended = _watched(together, start, last, options, outcomes) if together and start < last else None
        if ended is not None:
            name, number = ended
            waiting += [(together[together.index(name) + 1 :], first), ([name], number + 1)]
    return outcomes


def _watched(
    names: Sequence[str], first: int, last: int, options: Sequence[str], outcomes: dict[str, Outcome]
) -> tuple[str, int] | None:
    """The case that ended a process, if one did."""
    command = [sys.executable, __file__, "--serve", *options, "--first", str(first)]
    command += ["--cases", str(last - first), *(part for name in names for part in ("--only", name))]
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None  # zoos are flushed to disk
    with tempfile.TemporaryDirectory(dir=fast) as place:  # ours: a process that is killed leaves its files
        return _heard(command, Path(place), outcomes)


def _heard(command: Sequence[str], place: Path, outcomes: dict[str, Outcome]) -> tuple[str, int] | None:
    """Count what a process says; the case that ended it, if one did."""
    environment, errors = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}, place / "stderr"
    with (
        errors.open("w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment) as process,
    ):
        begun: tuple[str, int] | None = None
        for line in _lines(process):
            if "begun" in line:
                begun = line["kind"], line["begun"]
            else:
                begun = None
                _count(outcomes[line["kind"]], line)
        if process.returncode == 0:
            return None
        if begun is None:
            raise RuntimeError(f"ended between two cases: {errors.read_text(errors='replace')}")
        name, number = begun
        ended = "hangs" if process.returncode == -signal.SIGKILL else f"ended with code {process.returncode}"
        outcomes[name].cases += 1
        outcomes[name].found[f"case {number}: {ended}"] += 1
        return begun


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the process says; it is killed if it says nothing for long."""
    said: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)
        said.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            line = said.get(timeout=PATIENCE)
        except queue.Empty:
            process.kill()
            continue
        if line is None:
            process.wait()
            return
        yield json.loads(line)


def _count(outcome: Outcome, line: dict[str, Any]) -> None:
    outcome.cases += 1
    outcome.slowest = max(outcome.slowest, line["seconds"])
    outcome.peak_mb = max(outcome.peak_mb, line["peak_mb"])
    if line["found"]:
        outcome.found[line["found"] + (f" (case {line['case']})" if not outcome.found[line["found"]] else "")] += 1
    elif line["refused"]:
        outcome.errors += 1
    else:
        outcome.valid += 1


def table(outcomes: dict[str, Outcome]) -> str:
    """A line per kind, as Markdown."""
    lines = ["| kind | cases | errors | valid | found | slowest, s | peak, MB |", "|---|---|---|---|---|---|---|"]
    for own in outcomes.values():
        numbers = f"{own.cases:,} | {own.errors:,} | {own.valid:,} | {own.found.total():,}"
        lines.append(f"| {own.kind} | {numbers} | {own.slowest:.1f} | {own.peak_mb:,.0f} |")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400, help="of every kind; a quarter of those that take long")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a kind; may come again")
    for name, kind in (("--folder", str), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:2]]
    if chosen.serve:
        last = chosen.first + chosen.cases
        serve(chosen.only, chosen.first, last, chosen.seed, chosen.folder, chosen.seconds)
        return 0
    from kinds import KINDS

    names = chosen.only or list(KINDS)
    outcomes: dict[str, Outcome] = {}
    for name in names:  # a process each: the peak is the kind's own
        print(f"{name} ...", file=sys.stderr)
        cases = max(1, round(KINDS[name].share * chosen.cases))
        outcomes |= soak([name], cases, seed=chosen.seed, first=chosen.first)
    print(table(outcomes))
    for own in outcomes.values():
        for what, count in own.found.most_common():
            print(f"{own.kind}: {count} x {what}")
    print(f"{sum(own.cases for own in outcomes.values()):,} cases")
    return 1 if any(own.found for own in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
