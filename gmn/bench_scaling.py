"""What grows with what: a step of meta-training over processes, and a zoo over tasks.

step    the big batch stays the same, each process reads its share of it (strong scaling)
zoo     synthetic tasks: random sub-networks with the sizes of pruned ones; what they take on the disk, how long one is
        to plan, to claim and to add, and the search for a target's neighbours, from the files
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gmn.bench_metanetwork import SUBJECTS
from gmn.checkpoint import save_json
from gmn.consoles import plain_console
from gmn.errors import GmnError
from gmn.names import refuse_unknown
from gmn.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from gmn.data import Data
    from gmn.zoo import Zoo

    Tensors = dict[str, Tensor]
    Pruned = tuple[Tensor, Tensors]

SIMILARITIES = ("shared_classes", "prototypes", "leep")
STEPS = ("plan", "claim", "add")
RATIO, TARGET_IMAGES = 0.9, 500


@dataclass(frozen=True)
class Step:
    """Seconds of a step (median), the rest of the process's peak over what it held before in MB, by processes."""

    processes: int
    network: str
    images: int
    seconds: float
    accuracy: float
    metanetwork: float
    peak_mb: float


@dataclass(frozen=True)
class ZooSize:
    """A zoo of so many tasks: bytes of all files, of them the index; seconds to plan, claim and add one, all of them
    planned at first; and of a search over all.
    """

    tasks: int
    network: str
    bytes: int
    index_bytes: int
    plan: float
    claim: float
    add: float
    shared_classes: float
    prototypes: float
    leep: float


def bench_step(network: str, processes: Sequence[int], *, images: int | None, rounds: int) -> list[Step]:
    """Measure a step in 1, 2, ... processes of this machine, one thread each; one after the other.

    Args:
        network: One of the graphs of `gmn bench metanetwork`.
        images: The big batch; None: as many as suit the network.

    Raises:
        GmnError: if the network is unknown, or a process fails.
    """
    refuse_unknown("network", network, SUBJECTS)
    images, found = images or SUBJECTS[network].images, list[Step]()
    with track(f"steps of {network}", len(processes)) as advance:
        for count in processes:
            facts = {"network": network, "images": images, "rounds": rounds}
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command = [*start, "-m", __name__, json.dumps(facts)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise GmnError("a process failed", got=done.stderr.strip().split("\n")[-1], where=f"{count} processes")
            numbers = json.loads(done.stdout.strip().split("\n")[-1])
            found.append(Step(count, network, images, **numbers))
            advance(f"{count} processes: {found[-1].seconds:.2f} s")
    return found


def _work(network: str, images: int, rounds: int) -> None:
    """In one of the processes: take steps, and let the first say what they cost."""
    from gmn.bench_metastep import subject_of
    from gmn.data import Augment
    from gmn.distributed import launched
    from gmn.memory import memory_now, peak_memory
    from gmn.meta_train import meta_step
    from gmn.phases import Stopwatch
    from gmn.replicas import averaged_over_processes

    with launched("cpu", "metanetwork") as crew:
        subject, metanetwork, split = subject_of(network, images)
        size = min(250, images)
        base, taken = memory_now(), list[dict[str, float]]()
        for _ in range(rounds + 1):
            crew.wait()
            watch, start = Stopwatch(), time.perf_counter()
            sizes = [size] * (images // size)
            parts = crew.parts(sizes)
            batches = list(split.batches(size, augment=Augment(crop=4, flip=True), drop_last=True, parts=parts))
            own = [batch for batch in batches if len(batch[1])]
            averaged_over_processes(
                meta_step(metanetwork, subject, own, pruner_reg=1.0, phase=watch, crew=crew), metanetwork
            )
            metanetwork.zero_grad()
            crew.wait()
            passes = watch.seconds["metanetwork forward"] + watch.seconds["metanetwork backward"]
            whole = {"seconds": time.perf_counter() - start}
            taken.append({**whole, "accuracy": watch.seconds["accuracy"], "metanetwork": passes})
        median = {key: statistics.median(turn[key] for turn in taken[1:]) for key in taken[0]}
        if crew.leads:
            print(json.dumps({**median, "peak_mb": (peak_memory() or 0.0) - base}), flush=True)


def bench_zoo(network: str, tasks: Sequence[int]) -> list[ZooSize]:
    """Build zoos of random sub-networks as a run builds them, and search them, on random images of the network's size.

    Raises:
        GmnError: if the network is unknown.
    """
    refuse_unknown("network", network, SUBJECTS)
    return [_zoo(network, count) for count in tasks]


def _zoo(network: str, count: int) -> ZooSize:
    import torch

    from gmn.backbone import Backbone, prototypes
    from gmn.groups import KeepMask
    from gmn.neighbours import ranking
    from gmn.networks import build_network
    from gmn.similarity import similarity_by_name
    from gmn.surgery import remove
    from gmn.tasks import task_data, with_head
    from gmn.vote import draw
    from gmn.zoo import Zoo

    torch.manual_seed(0)
    own, generator = SUBJECTS[network], torch.Generator().manual_seed(0)
    model = build_network(own.network, num_classes=own.classes, options=own.options).eval()
    data = _random_images(own.pixels)
    backbone = Backbone.of(model, data.example_inputs())

    def pruned() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen = draw(torch.zeros(backbone.coupled.num_channels), backbone.coupled, RATIO, generator, 1.0)
        keep = backbone.coupled.nodes(chosen)
        smaller = remove(model, backbone.spec, KeepMask(keep), backbone.example, coupled=backbone.coupled)
        return keep, dict(with_head(smaller, backbone.head, 5, seed=0).state_dict())

    means = prototypes(backbone, task_data(data, tuple(range(5))), per_class=1)
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.create(folder, backbone.about(ratio=RATIO))
        taken = _fill(zoo, count, data.class_names, [pruned() for _ in range(4)], {"prototypes": means})
        target, searched = task_data(data, tuple(range(5))), dict[str, float]()
        for name in SIMILARITIES:
            start = time.perf_counter()
            ranking(backbone, zoo, target, similarity_by_name(name), images=TARGET_IMAGES)
            searched[name] = time.perf_counter() - start
        sizes = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
        index = sum(size for path, size in sizes.items() if path.name.startswith("index"))
    return ZooSize(count, network, sum(sizes.values()), index, **taken, **searched)


def _fill(zoo: Zoo, count: int, names: Sequence[str], networks: Sequence[Pruned], extra: Tensors) -> dict[str, float]:
    """Plan so many tasks, then claim and add one after the other; seconds a task of each, of one process."""
    from gmn.zoo import Task

    combinations = zip(range(count), itertools.cycle(itertools.combinations(range(10), 5)), strict=False)
    plans = [Task(f"task-{number}", own, tuple(names[index] for index in own)) for number, own in combinations]
    start = time.perf_counter()
    zoo.plan(plans)
    taken = {"plan": time.perf_counter() - start, "claim": 0.0, "add": 0.0}
    with track(f"a zoo of {count:,} tasks", count) as advance:
        for keep, weights in itertools.islice(itertools.cycle(networks), count):
            start = time.perf_counter()
            task = zoo.claim("bench")
            claimed = time.perf_counter()
            assert task is not None  # so many were planned, and nobody else is here
            zoo.add(replace(task, metrics={"accuracy": 0.5}), keep, weights, extra)
            taken["claim"] += claimed - start
            taken["add"] += time.perf_counter() - claimed
            advance("")
    return {name: seconds / count for name, seconds in taken.items()}


def _random_images(pixels: int) -> Data:
    """Ten classes; 500 training images of the five that the target has."""
    import torch

    from gmn.data import Data, Split

    generator, half = torch.Generator().manual_seed(0), torch.full((3,), 0.5)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(count) % 10, half, half)

    return Data(split(2 * TARGET_IMAGES), split(100), split(100), tuple(f"class {number}" for number in range(10)))


def show(steps: Sequence[Step], zoos: Sequence[ZooSize], path: Path | None, console: Console | None = None) -> None:
    """Print both tables; write JSON if a path is given."""
    console = console or plain_console()
    if steps:
        table = Table(title=f"A step of meta-training: {steps[0].network}, {steps[0].images:,} images, one thread each")
        for name in ("processes", "seconds", "speed-up", "accuracy pass", "metanetwork", "MB of a process"):
            table.add_column(name, justify="right")
        for row in steps:
            gain = steps[0].seconds / row.seconds
            numbers = f"{row.seconds:.2f}", f"{gain:.2f}x", f"{row.accuracy:.2f}", f"{row.metanetwork:.2f}"
            table.add_row(str(row.processes), *numbers, f"{row.peak_mb:.0f}")
        console.print(table)
    if zoos:
        table = Table(
            title=f"A zoo of {zoos[0].network}, {RATIO:.0%} pruned", caption="ms of the search: for each task"
        )
        steps_of_one = [f"ms to {name}" for name in STEPS]
        for name in ("tasks", "MB", "kB a task", "index kB", *steps_of_one, *(f"ms {name}" for name in SIMILARITIES)):
            table.add_column(name, justify="right")
        for row in zoos:
            own = [f"{1000 * asdict(row)[name]:.2f}" for name in STEPS]
            each = [f"{1000 * asdict(row)[name] / row.tasks:.2f}" for name in SIMILARITIES]
            sizes = f"{row.bytes / 1e6:.1f}", f"{row.bytes / row.tasks / 1e3:.0f}", f"{row.index_bytes / 1e3:.0f}"
            table.add_row(f"{row.tasks:,}", *sizes, *own, *each)
        console.print(table)
    if path is not None:
        save_json(path, {"steps": [asdict(row) for row in steps], "zoos": [asdict(row) for row in zoos]})


if __name__ == "__main__":
    _work(**json.loads(sys.argv[1]))
