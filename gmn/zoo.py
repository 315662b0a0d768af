"""A zoo: many tasks, each with the sub-network of one pre-trained network that was found for it.

index.sqlite                          what is known about each task, its mask, and who works on what
tasks/NAME.XXXXXXXX.safetensors       mask, weights and other tensors of a task, with its description

Several processes can build a zoo together, on one machine: `plan` the tasks, then each process takes the next one with
`claim` and hands it in with `add`. What a killed process had claimed is free again. A zoo is never half written: the
file of a task gets its name in the transaction that writes its row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gmn import zoo_claims, zoo_rows
from gmn.checkpoint import flush_folder
from gmn.errors import GmnError, PruningError
from gmn.groups import KeepMask
from gmn.processes import sweep
from gmn.zoo_check import Problem
from gmn.zoo_files import new_name, save_task, write_pending
from gmn.zoo_format import Stored, encode, pack, read
from gmn.zoo_index import Index
from gmn.zoo_reading import TASKS, ZooReading
from gmn.zoo_task import FILE, Split, Status, Task, check_about, check_same, fingerprint, to_text

__all__ = ["Problem", "Split", "Status", "Stored", "Task", "Zoo", "fingerprint", "save_task"]


class Zoo(ZooReading):
    """The tasks in a folder; made by `Zoo.create` or `Zoo.open`. It holds nothing open: use it in forks and threads.

    Attributes:
        folder: Where it is.
        about: What all its tasks have in common: `nodes` (N), `fingerprint`, and whatever it was created with.
    """

    @classmethod
    def create(cls, folder: str | Path, about: Mapping[str, Any]) -> Zoo:
        """Make a zoo, or open the one that is there if it is about the same.

        Args:
            folder: Where; made if it is not there.
            about: JSON: `nodes` (N), `fingerprint` (see `gmn.zoo.fingerprint`), and what else its tasks have in common,
                such as the description of the `network`, the ratio and the recipe.

        Raises:
            GmnError: if `about` is malformed, or there is a zoo that is about something else.
        """
        folder, stated = Path(folder), check_about(about)
        (folder / TASKS).mkdir(parents=True, exist_ok=True)
        zoo = cls(folder, Index.create(folder, stated))
        all_of_it = {key: stated.get(key) for key in [*stated, *zoo.about]}
        check_same("there is a zoo that is about something else", all_of_it, zoo.about, folder)
        return zoo

    def plan(self, tasks: Iterable[Task]) -> int:
        """Register tasks that are to be pruned, and return how many of them are new.

        Raises:
            GmnError: if the zoo has a task of that name with other classes, split or seed; nothing is registered then.
        """
        new = 0
        with self._index.write() as db:
            for task in tasks:
                row = zoo_rows.find(db, task.name)
                if row is not None:
                    check_same("planned otherwise before", self._parse(row).plan, task.plan, f"task {task.name}")
                else:
                    zoo_rows.put(db, Task(task.name, **task.plan))
                    new += 1
        return new

    def claim(self, worker: str) -> Task | None:
        """Take the next planned task that nobody works on; None if there is none.

        It is this process's until it calls `add`, `fail` or `release`, or ends in whatever way.

        Args:
            worker: A name for people to read.
        """
        with self._index.write() as db:
            zoo_claims.release_dead(db)
            rows = (self._known(zoo_rows.find(db, name), name) for name in zoo_claims.unclaimed(db))
            task = next(self._sound(rows), None)
            if task is not None:
                zoo_claims.claim(db, task.name, to_text(worker))
        return task

    def add(
        self, task: Task, keep: Tensor, weights: Mapping[str, Tensor], extra: Mapping[str, Tensor] | None = None
    ) -> Task:
        """Keep what was found for a task, planned before or not, and return the task as it is now.

        Args:
            task: The task with its metrics and cost.
            keep: [N] bool, the nodes that stay.
            weights: The pruned weights by name.
            extra: Other tensors by name, such as the classes' prototypes.

        Raises:
            PruningError: if the mask is malformed, or for another network.
            CheckpointError: if a tensor is not finite.
            GmnError: if the zoo has it already, or it was planned otherwise.
        """
        KeepMask(keep)
        if len(keep) != self.nodes:
            expected = f"{self.nodes} nodes"
            got, where = str(len(keep)), f"task {task.name}"
            raise PruningError("the mask is for another network", expected=expected, got=got, where=where)
        task = dataclasses.replace(task, created=task.created or time.time(), error="")
        content = encode(Stored(task, self.identity, keep, dict(weights), dict(extra or {})))
        facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        done = dataclasses.replace(task, status="done", file=new_name(task.name), **facts)
        path = self._files / done.file
        self._files.mkdir(exist_ok=True)
        temporary = write_pending(path, content)
        try:
            with self._index.write() as db:
                self._admit(zoo_rows.find(db, done.name), done)
                temporary.rename(path)
                flush_folder(self._files)
                zoo_rows.put(db, done, pack(keep))
                zoo_claims.release(db, done.name)
        finally:
            temporary.unlink(missing_ok=True)
        return done

    def add_file(self, path: str | Path) -> Task:
        """Add a task from a file of another zoo, or one that `save_task` wrote; see `add`.

        Raises:
            CheckpointError: if the file is missing, torn or of another kind.
            GmnError: if the task is for another network, or the zoo has one of its name.
        """
        stored = read(Path(path))
        check_same("the task is for another network", self.identity, stored.identity, path)
        return self.add(stored.task, stored.keep, stored.weights, stored.extra)

    def fail(self, task: Task, error: object) -> None:
        """Note that a task cannot be done, and why; a task that is done stays done."""
        with self._index.write() as db:
            now = self._parse(self._known(zoo_rows.find(db, task.name), task.name))
            zoo_claims.release(db, task.name)
            if now.status != "done":
                zoo_rows.put(db, dataclasses.replace(now, status="failed", error=to_text(error) or "unknown"))

    def release(self, task: Task) -> None:
        """Give a task back that was claimed and is not done."""
        with self._index.write() as db:
            zoo_claims.release(db, task.name)

    def release_stale(self, seconds: float) -> int:
        """Free tasks of dead processes of this machine, and those that others claimed so long ago; return how many."""
        with self._index.write() as db:
            return zoo_claims.release_dead(db) + zoo_claims.release_old(db, seconds)

    def redo(self, names: Iterable[str]) -> None:
        """Plan tasks anew that failed, or whose file is damaged; what was found for them is deleted.

        Raises:
            GmnError: if a name is unknown; nothing is changed then.
        """
        files = []
        with self._index.write() as db:
            for name in names:
                task = self._parse(self._known(zoo_rows.find(db, name), name))
                zoo_rows.put(db, Task(name, **task.plan))
                files += [task.file] if task.file else []
        for file in files:
            (self._files / file).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Delete what killed processes left: temporary files, and files of tasks that no row names; how many."""
        with self._index.write() as db:  # nobody is handing in a task
            rows = [self._parse(row) for row in zoo_rows.select(db)]
            names, known = {task.name for task in rows}, {task.file for task in rows}
            files = [path for path in self._files.glob("*.safetensors") if FILE.fullmatch(path.name)]
            orphans = [path for path in files if path.name not in known and path.name.rsplit(".", 2)[0] in names]
            for path in orphans:
                path.unlink()
            return len(orphans) + sweep(self.folder)

    def _admit(self, row: zoo_rows.Row | None, task: Task) -> None:
        """GmnError if the zoo has the task already, or planned it otherwise."""
        if row is None:
            return
        now = self._parse(row)
        if now.status == "done":
            raise GmnError("the zoo has a task of this name already", got=task.name, where=str(self.folder))
        check_same("planned otherwise before", now.plan, task.plan, f"task {task.name}")
