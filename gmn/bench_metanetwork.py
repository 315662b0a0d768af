"""What a pass through a metanetwork costs: time and peak memory of each backend, on the graphs of the paper's networks.

Every backend has a process of its own, so that its memory is its own; the processes take turns (A B A B), so that a
drift of the machine falls on all alike. A pass is forward alone, or forward and backward to the metanetwork's
parameters.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gmn.checkpoint import save_json
from gmn.errors import GmnError
from gmn.names import nearest
from gmn.progress import track


@dataclass(frozen=True)
class Subject:
    """A network of the paper and the size of its metanetwork (table 22)."""

    network: str
    options: dict[str, Any]
    classes: int
    pixels: int
    layout: str
    layers: int
    hidden: int


SUBJECTS = {
    "resnet20": Subject("cifar.resnet20", {"shortcut": "A"}, 10, 32, "cnn", 4, 32),
    "resnet56": Subject("cifar.resnet56", {"shortcut": "A"}, 10, 32, "resnet56", 8, 64),
    "vgg19": Subject("torchvision.vgg19_bn", {}, 100, 32, "vgg19", 8, 32),
    "resnet50": Subject("torchvision.resnet50", {}, 1000, 224, "resnet50", 6, 16),
    "vit_b_16": Subject("torchvision.vit_b_16", {}, 1000, 224, "vit", 3, 4),
}


@dataclass(frozen=True)
class Measured:
    """Seconds per pass (median over rounds), and the memory in MB that the passes added to the graph's."""

    graph: str
    backend: str
    threads: int
    backward: bool
    nodes: int
    edges: int
    rounds: int
    seconds: float
    peak_mb: float
    failed: str = ""


def bench(
    graphs: Sequence[str], backends: Sequence[str], *, threads: int, backward: bool, rounds: int, chunk_mb: float | None
) -> list[Measured]:
    """Measure every backend on every graph; one that fails, out of memory say, is reported as such.

    Raises:
        GmnError: if a graph is unknown.
    """
    for name in graphs:
        if name not in SUBJECTS:
            hint = nearest(name, SUBJECTS)
            raise GmnError("no such graph", expected=f"one of {', '.join(SUBJECTS)}", got=name, hint=hint)
    found: list[Measured] = []
    with track("metanetwork passes", len(graphs) * rounds) as advance:
        for name in graphs:
            workers = {backend: Worker(name, backend, threads, backward, chunk_mb) for backend in backends}
            for _ in range(rounds + 1):  # the first pass of each is not counted
                for worker in workers.values():
                    worker.turn()
                advance(name)
            found += [worker.result(rounds) for worker in workers.values()]
    return found


class Worker:
    """A process that passes a graph through a metanetwork whenever it is told to."""

    def __init__(self, graph: str, backend: str, threads: int, backward: bool, chunk_mb: float | None) -> None:
        self.facts: dict[str, Any] = {"graph": graph, "backend": backend, "threads": threads, "backward": backward}
        code = "import sys; from gmn.bench_metanetwork import serve; serve(*sys.argv[1:])"
        settings = json.dumps({**self.facts, "chunk_mb": chunk_mb})
        command = [sys.executable, "-P", "-c", code, settings] if sys.version_info >= (3, 11) else [
            sys.executable, "-c", code, settings]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: list[dict[str, float]] = []
        self.about = self._read()

    def turn(self) -> None:
        """One pass; nothing if the process has ended."""
        if self.about is None or self.process.stdin is None:
            return
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return
        said = self._read()
        if said is None:
            self.about = None
        else:
            self.said.append(said)

    def result(self, rounds: int) -> Measured:
        """What it measured; the process is ended."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        code = self.process.wait()
        if self.about is None or len(self.said) < 2:
            failed = f"ended with code {code}" + (" (out of memory?)" if code == -9 else "")
            return Measured(**self.facts, nodes=0, edges=0, rounds=0, seconds=0.0, peak_mb=0.0, failed=failed)
        seconds = statistics.median(turn["seconds"] for turn in self.said[1:])
        sizes: dict[str, Any] = {"nodes": int(self.about["nodes"]), "edges": int(self.about["edges"])}
        peak = self.said[-1]["peak_mb"] - self.about["base_mb"]
        return Measured(**self.facts, **sizes, rounds=rounds, seconds=seconds, peak_mb=peak)

    def _read(self) -> dict[str, float] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None


def serve(settings: str) -> None:
    """The worker's side: build, say what was built, then one pass per line of input."""
    import torch

    from gmn.convert import layouts, to_graph
    from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
    from gmn.networks import build_network

    facts = json.loads(settings)
    own = SUBJECTS[facts["graph"]]
    torch.set_num_threads(facts["threads"])
    torch.manual_seed(0)
    model = build_network(own.network, num_classes=own.classes, in_channels=3, options=own.options).eval()
    graph = to_graph(model, torch.zeros(1, 3, own.pixels, own.pixels), layout=layouts()[own.layout])
    del model
    size = {"layers": own.layers, "hidden": own.hidden, "node_ratio": 0.01, "edge_ratio": 0.01, "zero_init": False}
    config = MetaNetworkConfig(
        len(graph.spec.columns), graph.spec.edge_kinds, **size, backend=facts["backend"], max_chunk_mb=facts["chunk_mb"]
    )
    network = MetaNetwork(config)
    edges = sum(e[..., 0].numel() for e in graph.edge_features)
    _say(nodes=graph.spec.num_nodes, edges=edges, base_mb=_peak_mb())
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.set_grad_enabled(facts["backward"]):
            new = network(graph)
            if facts["backward"]:
                features = [new.node_features, *new.edge_features]
                torch.autograd.backward([f for f in features if f.requires_grad], [
                    f.detach() for f in features if f.requires_grad])  # fmt: skip
        del new
        _say(seconds=time.perf_counter() - start, peak_mb=_peak_mb())


def _say(**numbers: float) -> None:
    print(json.dumps(numbers), flush=True)


def _peak_mb() -> float:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def show(found: Sequence[Measured], path: Path | None, console: Console | None = None) -> None:
    """Print a table, each backend against the first one of its graph; write JSON if a path is given."""
    table = Table(title="A pass through the metanetwork", caption="median of rounds in which the backends take turns")
    for name in ("graph", "backend", "threads", "pass", "seconds", "faster", "peak MB", "memory"):
        table.add_column(name, justify="left" if name in ("graph", "backend", "pass") else "right")
    slowest = {row.graph: row for row in found if row.backend == "pyg" and not row.failed}
    for row in found:
        base = slowest.get(row.graph)
        compared = ("", "") if base is None or row is base else (
            f"{base.seconds / row.seconds:.1f}x", f"1/{base.peak_mb / max(row.peak_mb, 1):.1f}")  # fmt: skip
        own = (row.failed, "") if row.failed else (f"{row.seconds:.3f}", f"{row.peak_mb:.0f}")
        way = "forward, backward" if row.backward else "forward"
        table.add_row(row.graph, row.backend, str(row.threads), way, own[0], compared[0], own[1], compared[1])
    (console or Console()).print(table)
    if path is not None:
        save_json(path, [asdict(row) for row in found])
