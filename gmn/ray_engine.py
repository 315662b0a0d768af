"""Jobs on a Ray cluster: one Ray task each, with its resources and its retries; Ray places them and starts them again.

The function travels once to every machine, the jobs travel one by one, and what they find comes back through Ray. So
workers share no folder with the caller, only the installation of gmn.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from gmn.engine import Found, Job, attempt
from gmn.errors import GmnError, first_line, one_line
from gmn.permission import allow_code, allowed_code

AHEAD = 2  # jobs drawn per free place: waiting ones tell a growing cluster to grow, and the rest is left for others


class RayEngine:
    """A Ray cluster that is connected to; made by `ray_engine`.

    Args:
        ray: The module.
        cpus, gpus: What a job takes up; a share of a GPU is fine.
        retries: How often a job is begun anew whose worker died.
        sees_disk: Whether all of it is on this machine.
    """

    remote = True

    def __init__(self, ray: Any, cpus: float, gpus: float, retries: int, *, sees_disk: bool = False) -> None:
        self.sees_disk = sees_disk
        self._ray, self._cpus, self._gpus, self._retries = ray, cpus, gpus, retries

    def map(self, function: Callable[[Job], Found], jobs: Iterable[Job]) -> Iterator[tuple[Job, Found | GmnError]]:
        """See `Engine.map`."""
        resources = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_retries": self._retries}
        remote = self._ray.remote(**resources)(attempt)
        shared = self._ray.put(partial(_permitted, allowed_code(), function))
        waiting, running = iter(jobs), dict[Any, Job]()
        try:
            while True:
                for job in itertools.islice(waiting, max(0, AHEAD * self.places() - len(running))):
                    running[remote.remote(shared, job)] = job
                if not running:
                    return
                (finished, *_), _ = self._ray.wait(list(running), num_returns=1)
                yield running.pop(finished), self._found(finished)
        finally:  # Ctrl-C too; Ray 2.60 aborts if a task ends within microseconds of this: jobs take minutes
            for unfinished in running:
                self._ray.cancel(unfinished, force=True)

    def places(self) -> int:
        """How many jobs the cluster has room for at a time, now; at least 1."""
        have = self._ray.cluster_resources()
        wanted = {"CPU": self._cpus, "GPU": self._gpus}
        return max(1, math.floor(min(have.get(name, 0.0) / want for name, want in wanted.items() if want)))

    def _found(self, finished: Any) -> Any:
        lost = self._ray.exceptions
        try:
            return self._ray.get(finished)
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.OutOfMemoryError, lost.ObjectLostError) as error:
            tries, hint = f"{self._retries + 1} times", "out of memory? give --cpus-per-task or --gpus-per-task more"
            return GmnError("the worker died", got=f"{type(error).__name__}, {tries}", hint=hint)
        except lost.RayTaskError as error:  # what it was there: the disk, memory, a bug
            raise (error.cause if isinstance(error.cause, Exception) else error) from error


def _permitted(allowed: frozenset[str] | None, function: Callable[[Job], Found], job: Job) -> Found:
    """Files may name in a worker the functions that they may name where the job comes from."""
    with allow_code(only=allowed):
        return function(job)


@contextmanager
def ray_engine(
    address: str | None = None, *, cpus: float = 1.0, gpus: float = 0.0, retries: int = 3
) -> Iterator[RayEngine]:
    """A connection to a Ray cluster, or a cluster of this machine alone, ended with the block.

    Args:
        address: Of a cluster that runs: `auto`, `host:port`, `ray://host:port`; None starts one here.
        cpus, gpus, retries: See `RayEngine`.

    Raises:
        GmnError: if ray is missing, the cluster cannot be reached, or it has no room for a single job.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise GmnError("the engine needs ray", hint="pip install ray") from error
    if cpus < 0 or gpus < 0 or cpus + gpus == 0:
        raise GmnError("a task needs a place", expected="cpus or gpus above 0", got=f"{cpus:g} and {gpus:g}")
    _refuse_unreachable(address)
    own: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, first_line(error)) from error
    try:
        _refuse_too_large(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus})
        yield RayEngine(ray, cpus, gpus, retries, sees_disk=address is None)
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str | None) -> None:
    """GmnError if nobody listens at `host:port`; Ray would try for a quarter of an hour."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d{1,5})", address or "")
    try:
        if found:
            socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, one_line(error)) from error


def _no_cluster(address: str | None, got: str) -> GmnError:
    hint = "start one with `ray start --head`"
    return GmnError("no Ray cluster to connect to", expected=address, got=got, hint=hint)


def _refuse_too_large(have: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    for name, want in wanted.items():
        if want > have.get(name, 0.0):
            expected = f"at most {have.get(name, 0.0):g}"
            raise GmnError(f"the cluster has too few {name}s for a task", expected=expected, got=f"{want:g}")
