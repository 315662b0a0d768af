"""Who works on which task of a zoo, so that processes share the work and a killed one loses only its own task.

A claim names the process by its id and the moment it started, and the machine, as a digest, by its name and the
space that process ids are counted in: inside it one can tell whether the process still lives.
"""

from __future__ import annotations

import heapq
import os
import sqlite3
import time
from collections.abc import Iterator
from typing import get_args

from gmn.processes import is_alive, machine, started
from gmn.zoo_task import Split


def claim(db: sqlite3.Connection, name: str, worker: str) -> None:
    """Note that this process works on a task that nobody else works on."""
    pid = os.getpid()
    query = "INSERT INTO claims SELECT id, ?, ?, ?, ?, ? FROM tasks WHERE name = ?"
    db.execute(query, [worker, pid, started(pid), machine(), time.time(), name])


def unclaimed(db: sqlite3.Connection) -> Iterator[str]:
    """The planned tasks that nobody works on, in the order in which they were planned.

    The index `tasks_by_status` has the tasks of one split in that order: nothing is sorted, and whoever takes the first
    reads the first alone.
    """
    query = """SELECT id, name FROM tasks INDEXED BY tasks_by_status
    WHERE status = 'planned' AND split = ? AND id NOT IN (SELECT task FROM claims) ORDER BY id"""
    return (name for _, name in heapq.merge(*(db.execute(query, [split]) for split in get_args(Split))))


def release(db: sqlite3.Connection, name: str) -> None:
    """Nobody works on a task any more."""
    db.execute("DELETE FROM claims WHERE task IN (SELECT id FROM tasks WHERE name = ?)", [name])


def release_dead(db: sqlite3.Connection) -> int:
    """Free the tasks of processes that have died on this machine; how many."""
    query = "SELECT task, pid, started FROM claims WHERE machine = ?"
    dead = [[task] for task, pid, since in db.execute(query, [machine()]).fetchall() if not is_alive(pid, since)]
    db.executemany("DELETE FROM claims WHERE task = ?", dead)
    return len(dead)


def release_old(db: sqlite3.Connection, seconds: float) -> int:
    """Free the tasks that other machines claimed so long ago, where one cannot see whether they live; how many."""
    query = "DELETE FROM claims WHERE since <= ? AND machine != ?"
    return db.execute(query, [time.time() - seconds, machine()]).rowcount
