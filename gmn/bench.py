"""`gmn bench convert`: convert every network of a suite, each in a process of its own, and keep what was found.

The results are JSON lines, appended as they come: a stopped run goes on where it was. A network that crashes, hangs
or wants too much memory costs its own line only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gmn.bench_convert import AFTERWARDS
from gmn.bench_report import section, show, write_section
from gmn.errors import GmnError
from gmn.jsonl import append_line, read_lines
from gmn.memory import machine_memory
from gmn.progress import say, track
from gmn.suites import Entry, suite

Row = dict[str, Any]
MEMORY_SHARE = 0.9  # of the machine's, for all processes together


@dataclass(frozen=True)
class Limits:
    """What the processes may take.

    Attributes:
        seconds: Time for one network.
        jobs: Processes at a time; they share the cores and the memory.
    """

    seconds: float = 300.0
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.jobs < 1:
            raise GmnError("a time limit and a number of jobs above 0, please", got=f"{self.seconds:g} s, {self.jobs}")


class Processes:
    """The processes of a run; once it is stopped they end, and no other one starts."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, command: list[str], seconds: float, log: IO[bytes], environment: dict[str, str]) -> int | None:
        """The exit code of a command; None if it is not done after so many seconds, or the run is stopped.

        What the command writes to stderr goes to `log`, what it writes to stdout goes nowhere.
        """
        with self.lock:
            if self.stopped:
                return None
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
            self.running.add(process)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()
            self.running.discard(process)

    def stop(self) -> None:
        """End them all."""
        with self.lock:
            self.stopped = True
            for process in list(self.running):
                process.kill()


def select(entries: Iterable[Entry], only: str | None) -> list[Entry]:
    """The networks whose name matches and whose packages are installed.

    Args:
        entries: A suite.
        only: A regular expression that is searched in the names; None takes all.

    Raises:
        GmnError: if it is no regular expression, or no name matches.
    """
    try:
        pattern = re.compile(only or "")
    except re.error as problem:
        raise GmnError("bad regular expression", got=repr(only), hint=str(problem), where="--only") from problem
    chosen = [entry for entry in entries if pattern.search(entry.name)]
    for entry in (entry for entry in chosen if entry.missing):
        say(f"{entry.name}: skipped, it needs {entry.needs} (pip install {entry.needs})")
    if not chosen:
        raise GmnError("no network of that name", got=repr(only), where="--only")
    return [entry for entry in chosen if not entry.missing]


def load_rows(path: Path) -> dict[str, Row]:
    """The latest row of every network in a file of results; none if there is no file."""
    return {row["name"]: row for row in read_lines(path) if "name" in row and "ok" in row}


def convert(entries: Sequence[Entry], out: Path, limits: Limits, *, retry_failed: bool = False) -> dict[str, Row]:
    """Convert what the file of results does not have yet, and return the rows of the entries.

    Args:
        entries: What to convert.
        out: The file; rows are appended.
        limits: Time and processes.
        retry_failed: Also convert anew what failed before.
    """
    done, processes = load_rows(out), Processes()
    waiting = [e for e in entries if e.name not in done or (retry_failed and not done[e.name]["ok"])]
    with track("gmn bench convert", len(waiting)) as advance, ThreadPoolExecutor(limits.jobs) as pool:
        futures = [pool.submit(run_entry, entry, limits, processes) for entry in waiting]
        try:
            for future in as_completed(futures):
                row = future.result()
                append_line(out, row)
                done[row["name"]] = row
                advance(f"{row['name']}: {row['error'] or 'ok'}")
        except BaseException:  # Ctrl-C too: what is not done stays undone
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return {entry.name: done[entry.name] for entry in entries}


def run_entry(entry: Entry, limits: Limits, processes: Processes | None = None) -> Row:
    """Convert one network in a process of its own; a row whatever happens there."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "gmn.bench_convert", json.dumps(asdict(entry)), str(result)]
        with (Path(folder) / "log").open("w+b") as log:
            ended = _run([*command, *_memory(limits.jobs)], limits, log, processes or Processes())
            found = _read(result)
            if ended and found.get("stage") == AFTERWARDS:
                found |= {"frozen": None, "frozen_error": ended}
            elif ended and not found["error"]:
                stage = f" in the stage '{found['stage']}'" if "stage" in found else ""
                found |= {"ok": False, "error": f"{ended}{stage}{_last_line(log)}"}
    return {"name": entry.name, "family": entry.family, "options": entry.options, **found}


def _run(command: list[str], limits: Limits, log: IO[bytes], processes: Processes) -> str:
    """Run a process and say how it ended: nothing if it ended well."""
    threads = max(1, (os.cpu_count() or 1) // limits.jobs)
    environment = {"OMP_NUM_THREADS": str(threads)} if limits.jobs > 1 else {}
    code = processes.run(command, limits.seconds, log, {**os.environ, **environment})
    if code is None:
        return f"no result after {limits.seconds:g} s"
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"the process ended with code {code}" if code else ""


def _memory(jobs: int) -> list[str]:
    """The memory that a process may take, in MB, as the last argument of the command."""
    total = machine_memory()
    return [] if total is None else [f"{MEMORY_SHARE * total / jobs:.0f}"]


def _read(path: Path) -> Row:
    try:
        row: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # killed before the first stage, or in the middle of a line
        return {"ok": False, "error": ""}
    return {"error": "", **row}


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""


def bench(
    suite_name: str, out: Path | None, limits: Limits, *, only: str | None, retry: bool, page: Path | None
) -> bool:
    """Convert a suite, print the table, and tell whether no network failed.

    Args:
        suite_name: Which suite.
        out: The file of results; None takes `bench/convert-SUITE.jsonl`.
        limits: Time and processes.
        only: A regular expression that is searched in the names.
        retry: Also convert anew what failed before.
        page: A Markdown file whose section of this suite is written anew, from all rows of the file of results.
    """
    out = out or Path("bench") / f"convert-{suite_name}.jsonl"
    entries = suite(suite_name)
    rows = convert(select(entries, only), out, limits, retry_failed=retry)
    show(f"gmn bench convert --suite {suite_name}", list(rows.values()))
    if page is not None:
        text = section(suite_name, list(load_rows(out).values()), [entry.name for entry in entries])
        write_section(page, suite_name, text)
    return all(row["ok"] for row in rows.values())
