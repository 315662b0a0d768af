"""Where independent jobs are worked on: in this process, or on a cluster.

What a job finds comes back as soon as it is there, beside the job; what belongs on the disk, the caller puts there. So
an engine keeps no books: who calls it knows what is done, and resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from gmn.errors import GmnError
from gmn.names import refuse_unknown

Job = TypeVar("Job")
Found = TypeVar("Found")


class Engine(Protocol):
    """Something that works on jobs that know nothing of each other: tasks of a zoo, seeds, cells of a matrix.

    Attributes:
        remote: Whether the work is done by other processes, perhaps on other machines: what they are to read must lie
            in the function and its job, on the CPU.
        sees_disk: Whether those processes see the folders of this one, under the same names.
    """

    remote: bool
    sees_disk: bool

    def map(self, function: Callable[[Job], Found], jobs: Iterable[Job]) -> Iterator[tuple[Job, Found | GmnError]]:
        """Each job with what the function found for it, in the order in which they are finished.

        Jobs are drawn when there is room for them, so `jobs` may claim them one by one. A GmnError of one job, or the
        death of those who worked on it, takes the place of what was found; the others go on. Any other error ends all.

        Args:
            function: Gets one job; all it needs beside the job is bound to it, as by `functools.partial`.
            jobs: For a remote engine, things that pickle.
        """
        ...


class Here:
    """One job after the other, in this process.

    >>> [found for _, found in Here().map(lambda job: 2 * job, [1, 2])]
    [2, 4]
    """

    remote = False
    sees_disk = True

    def map(self, function: Callable[[Job], Found], jobs: Iterable[Job]) -> Iterator[tuple[Job, Found | GmnError]]:
        """See `Engine.map`."""
        for job in jobs:
            yield job, attempt(function, job)


def attempt(function: Callable[[Job], Found], job: Job) -> Found | GmnError:
    """What the function finds for a job, or the GmnError that it raises."""
    try:
        return function(job)
    except GmnError as error:
        return error


HERE = Here()


@contextmanager
def engine_named(
    name: str, *, address: str | None = None, cpus: float | None = None, gpus: float | None = None
) -> Iterator[Engine]:
    """The engine that a user names, ready to work; `gmn.ray_engine` has the options.

    Raises:
        GmnError: if there is no such engine, or it cannot do this.
    """
    refuse_unknown("engine", name, ("here", "ray"))
    if name == "here":
        if (address, cpus, gpus) != (None, None, None):
            raise GmnError("options of a cluster without one", expected="--engine ray beside them")
        yield HERE
        return
    from gmn.ray_engine import ray_engine

    with ray_engine(address, cpus=1.0 if cpus is None else cpus, gpus=gpus or 0.0) as engine:
        yield engine
