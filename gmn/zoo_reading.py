"""Looking at a zoo: listing its tasks, loading them, and finding what is damaged."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from gmn import zoo_rows
from gmn.errors import CheckpointError, GmnError
from gmn.groups import KeepMask
from gmn.names import nearest
from gmn.progress import say
from gmn.zoo_check import Problem, verify
from gmn.zoo_files import check_file, locate
from gmn.zoo_format import Stored, read, unpack
from gmn.zoo_index import Index
from gmn.zoo_task import IDENTITY, Split, Status, Task, check_about, check_same

if TYPE_CHECKING:
    from typing_extensions import Self

TASKS = "tasks"
ORDERS = ("name", "created", "flops", "parameters", "bytes", "seed")
Loaded = tuple[Task, KeepMask, dict[str, Tensor]]


class ZooReading:
    """What one can do with a zoo without changing it; see `gmn.zoo.Zoo`."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self._index = folder, index
        self._files = folder / TASKS
        if self._files.is_symlink() or (self._files.exists() and not self._files.is_dir()):  # adding would follow it
            raise CheckpointError("unsafe folder in a zoo", expected="a folder, no link", got=str(self._files))
        self.about: dict[str, Any] = check_about(index.about())

    @classmethod
    def open(cls, folder: str | Path, about: Mapping[str, Any] | None = None) -> Self:
        """The zoo in a folder.

        Args:
            folder: Where it is.
            about: What is expected of it, as for `create`; keys that are not given may be anything.

        Raises:
            CheckpointError: if there is none, or its index is damaged, unsafe or of a newer gmn.
            GmnError: if it is about something else.
        """
        zoo = cls(Path(folder), Index(Path(folder)))
        check_same("the zoo is about something else", about or {}, zoo.about, folder)
        return zoo

    @property
    def nodes(self) -> int:
        """N."""
        return int(self.about["nodes"])

    def tasks(
        self,
        split: Split | None = None,
        classes: Collection[int | str] | None = None,
        status: Status | None = "done",
        order_by: str = "name",
        limit: int | None = None,
    ) -> list[Task]:
        """Tasks by what is known of them; no file is opened. Malformed rows are named and left out.

        Args:
            split: `zoo`, `target`, or None for both.
            classes: Only tasks with at least one of these, by index or by name.
            status: `planned`, `done`, `failed`, or None for all.
            order_by: `name`, `created`, `flops`, `parameters`, `bytes`, `seed`, from the smallest; or a metric, from
                the largest. A `-` in front turns it round.
            limit: At most so many.

        Raises:
            GmnError: if no task has such a metric.
        """
        with self._index.read() as db:
            found = list(self._sound(zoo_rows.select(db, status=status, split=split)))
        if classes is not None:
            wanted = {classes} if isinstance(classes, str) else set(classes)
            found = [task for task in found if wanted & {*task.classes, *task.class_names}]
        return _ordered(found, order_by)[:limit]

    def counts(self) -> dict[str, int]:
        """How many tasks are planned, done and failed."""
        with self._index.read() as db:
            found = dict(db.execute("SELECT status, count(*) FROM tasks GROUP BY status"))
        return {status: found.get(status, 0) for status in get_args(Status)}

    def task(self, name: str) -> Task:
        """A task by name; GmnError if there is none, CheckpointError if its row is malformed."""
        with self._index.read() as db:
            row = zoo_rows.find(db, name)
        return self._parse(self._known(row, name))

    def load(self, name: str) -> Loaded:
        """A task with its mask and weights.

        Args:
            name: Its name.

        Raises:
            GmnError: if there is no such task, or it is not done.
            CheckpointError: if its file is missing, damaged, unsafe or another task's.
        """
        task, stored = self._read(name, ("weight",))
        return task, KeepMask(stored.keep), stored.weights

    def load_extra(self, name: str) -> dict[str, Tensor]:
        """The other tensors of a task, such as its prototypes, without its weights; errors as for `load`."""
        return self._read(name, ("extra",))[1].extra

    def load_all(self, names: Iterable[str] | None = None) -> Iterator[Loaded]:
        """Tasks one after the other, all that are done unless names are given; damaged ones are named and left out."""
        for name in [task.name for task in self.tasks()] if names is None else names:
            try:
                loaded = self.load(name)
            except GmnError as error:
                say(f"skipped {name}: {error}")
                continue
            yield loaded

    def masks(self, names: Sequence[str]) -> Tensor:
        """[tasks, N] bool: the nodes that each task keeps, from the index alone.

        Raises:
            GmnError: if there is no such task, or it is not done.
            CheckpointError: if a mask is damaged.
        """
        where = str(self._index.path)
        with self._index.read() as db:
            found = zoo_rows.masks(db, names, self.nodes, where)
        for name in names:
            if name not in found:
                self._done(name)
        return unpack([found[name] for name in names], self.nodes)

    def verify(self) -> list[Problem]:
        """Everything that is wrong with the zoo, each with the file or the task concerned; reads every file."""
        return verify(self._index, self._files, self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """What a task's file must say of its network to belong here."""
        return {key: self.about[key] for key in IDENTITY if key in self.about}

    def _parse(self, row: zoo_rows.Row) -> Task:
        return zoo_rows.parse(row, self.nodes, str(self._index.path))

    def _sound(self, rows: Iterable[zoo_rows.Row]) -> Iterator[Task]:
        for row in rows:
            try:
                yield self._parse(row)
            except GmnError as error:
                say(f"skipped: {error}")

    def _known(self, row: zoo_rows.Row | None, name: str) -> zoo_rows.Row:
        if row is None:
            hint = nearest(name, [task.name for task in self.tasks(status=None)])
            raise GmnError("no such task in the zoo", got=repr(name), where=str(self.folder), hint=hint)
        return row

    def _done(self, name: str) -> Task:
        task = self.task(name)
        if task.status != "done":
            raise GmnError("the task is not done", got=f"{task.status} {task.error}".strip(), where=f"task {name}")
        return task

    def _read(self, name: str, parts: tuple[str, ...]) -> tuple[Task, Stored]:
        task = self._done(name)
        path = locate(self._files, task.file)
        check_file(path, task)
        stored = read(path, parts)
        found = {"name": stored.task.name, **stored.identity}
        message = "the file is another task's or network's"
        check_same(message, {"name": name, **self.identity}, found, path, CheckpointError)
        return task, stored


def _ordered(tasks: list[Task], order_by: str) -> list[Task]:
    key, reverse = order_by.removeprefix("-"), order_by.startswith("-")
    if key in ORDERS:
        return sorted(tasks, key=operator.attrgetter(key), reverse=reverse)
    known = {metric for task in tasks for metric in task.metrics}
    if tasks and key not in known:
        expected = f"one of {', '.join([*ORDERS, *sorted(known)])}"
        raise GmnError("nothing to order by", expected=expected, got=repr(key), hint=nearest(key, [*ORDERS, *known]))
    having = [task for task in tasks if key in task.metrics]
    others = [task for task in tasks if key not in task.metrics]
    return sorted(having, key=lambda task: task.metrics[key], reverse=not reverse) + others
