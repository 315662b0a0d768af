"""What a pass through a metanetwork costs: time and peak memory of each backend, on the graphs of the paper's networks.

    blocks     edges as dense blocks (`gmn.edge_tape`)
    compiled   the same, fused by torch.compile
    pyg        an explicit edge list with PyTorch Geometric, as the published implementation works

A pass is forward alone, or forward and backward to the metanetwork's parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gmn.bench_workers import Turn, Worker, device_name, in_turns, seconds_of
from gmn.checkpoint import save_json
from gmn.consoles import plain_console
from gmn.job import choose_device
from gmn.names import refuse_unknown
from gmn.progress import track

BACKENDS = ("blocks", "compiled", "bf16", "pyg")
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Subject:
    """A network of the paper and the size of its metanetwork (table 22).

    `images` is the big batch that a step of meta-training is measured with; `listed`: its edges fit into the memory of
    a usual machine as a list, with the states of every layer.
    """

    network: str
    options: dict[str, Any]
    classes: int
    pixels: int
    layout: str
    layers: int
    hidden: int
    images: int
    listed: bool


SUBJECTS = {
    "resnet20": Subject("cifar.resnet20", {"shortcut": "A"}, 10, 32, "cnn", 4, 32, 5000, True),
    "resnet56": Subject("cifar.resnet56", {"shortcut": "A"}, 10, 32, "resnet56", 8, 64, 5000, True),
    "vgg19": Subject("cifar.vgg19_bn", {}, 100, 32, "vgg19", 8, 32, 5000, False),
    "resnet50": Subject("torchvision.resnet50", {}, 1000, 224, "resnet50", 6, 16, 32, False),
    "vit_b_16": Subject("torchvision.vit_b_16", {}, 1000, 224, "vit", 3, 4, 8, False),
}


@dataclass(frozen=True)
class Measured:
    """Seconds per pass (median over rounds), and the memory in MB that the passes added to the graph's.

    `moved_gb` is what all operations read and write, from memory or a cache; `least_gb` what a backend with one buffer
    of edge states has to, see `least_bytes`.
    """

    graph: str
    backend: str
    threads: int
    backward: bool
    nodes: int = 0
    edges: int = 0
    rounds: int = 0
    seconds: float = 0.0
    moved_gb: float = 0.0
    least_gb: float = 0.0
    peak_mb: float = 0.0
    failed: str = ""
    device: str = "cpu"


@dataclass(frozen=True)
class Cases:
    """What is measured: every graph with every number of threads, forward or backward, on every backend.

    Raises:
        GmnError: if a name is unknown, or the device is not there.
    """

    graphs: Sequence[str] = ("resnet20", "resnet56")
    backends: Sequence[str] = ("blocks", "pyg")
    threads: Sequence[int] = (1,)
    passes: Sequence[str] = ("backward",)
    device: str = "cpu"

    def __post_init__(self) -> None:
        for what, names, known in (
            ("graph", self.graphs, SUBJECTS),
            ("backend", self.backends, BACKENDS),
            ("pass", self.passes, PASSES),
        ):
            for name in names:
                refuse_unknown(what, name, known)
        choose_device(self.device)


def bench(cases: Cases, *, rounds: int, chunk_mb: float | None) -> list[Measured]:
    """Measure; a backend that fails, out of memory say, is reported as such."""
    found: list[Measured] = []
    groups, device = list(itertools.product(cases.graphs, cases.threads, cases.passes)), choose_device(cases.device)
    with track("metanetwork passes", len(groups) * (rounds + 2)) as advance:
        for graph, threads, way in groups:
            facts = {"graph": graph, "threads": threads, "backward": way == "backward"}
            each: list[dict[str, Any]] = [{**facts, "backend": backend} for backend in cases.backends]
            workers = [Worker(__name__, {**own, "chunk_mb": chunk_mb, "device": str(device)}) for own in each]
            outcomes = in_turns(workers, rounds, lambda name=graph: advance(name))
            for own, outcome in zip(each, outcomes, strict=True):
                sizes = {key: outcome.about[key] for key in ("nodes", "edges", "least_gb") if key in outcome.about}
                seconds, moved = outcome.median.get("seconds", 0.0), outcome.last.get("moved_gb", 0.0)
                numbers = {**sizes, **outcome.row, "seconds": seconds, "moved_gb": moved}
                found.append(Measured(**own, **numbers, device=device_name(device)))
    return found


def prepare(facts: dict[str, Any]) -> tuple[dict[str, float], Turn]:
    """In a worker: the graph and the metanetwork, and a pass."""
    import torch

    from gmn.traffic import Traffic

    device = torch.device(facts["device"])
    graph = graph_of(facts["graph"]).to(device)
    network = metanetwork_of(facts["graph"], graph, facts["backend"], chunk_mb=facts["chunk_mb"]).to(device)
    if facts["backend"] == "compiled":
        load_compiler(device)

    def step() -> None:
        with torch.set_grad_enabled(facts["backward"]):
            new = network(graph)
            if facts["backward"]:
                features = [f for f in (new.node_features, *new.edge_features) if f.requires_grad]
                torch.autograd.backward(features, [f.detach() for f in features])

    def turn(last: bool) -> dict[str, float]:
        if last and facts["backend"] != "compiled":  # whose operations nobody sees
            with Traffic() as traffic:
                step()
            return {"moved_gb": traffic.bytes / 1e9}
        return {"seconds": seconds_of(step, device)}

    least = least_bytes(graph, network.config.layers, network.config.hidden, backward=facts["backward"]) / 1e9
    return {"nodes": graph.spec.num_nodes, "edges": graph.spec.num_edges, "least_gb": least}, turn


def load_compiler(device: Any) -> None:
    """Compile something small: the compiler's own 220 MB are a library's, as torch's are, and no pass adds them."""
    import torch

    torch.compile(lambda x: (2 * x).sum())(torch.ones(8, device=device, requires_grad=True)).backward()


def least_bytes(graph: Any, layers: int, hidden: int, *, backward: bool) -> float:
    """What has to move with one buffer of all edge states, each layer seeing all edges before the next.

    forward     features read and written; states written, read and written by every layer, read by the decoder
    backward    features read with their gradients; the same of the gradients of states, and every layer's states
    """
    features = sum(4.0 * e.numel() for e in graph.edge_features)
    states = 4.0 * hidden * graph.spec.num_edges
    forward = 2 * features + (2 + 2 * layers) * states
    return forward + (2 * features + (2 + 3 * layers) * states if backward else 0.0)


def graph_of(name: str) -> Any:
    """The graph of a subject with random weights."""
    import torch

    from gmn.convert import layouts, to_graph
    from gmn.networks import build_network

    own = SUBJECTS[name]
    torch.manual_seed(0)
    model = build_network(own.network, num_classes=own.classes, in_channels=3, options=own.options).eval()
    return to_graph(model, torch.zeros(1, 3, own.pixels, own.pixels), layout=layouts()[own.layout])


def metanetwork_of(name: str, graph: Any, backend: str, *, chunk_mb: float | None = None) -> Any:
    """A metanetwork of the paper's size for a subject, whose last layers are not zero."""
    from gmn.metanetwork import MetaNetwork, MetaNetworkConfig

    own = SUBJECTS[name]
    size: dict[str, Any] = {"layers": own.layers, "hidden": own.hidden, "node_ratio": 0.01, "edge_ratio": 0.01}
    how: dict[str, Any] = {"backend": "pyg" if backend == "pyg" else "blocks"}
    how |= {option: backend == name for option, name in (("compile", "compiled"), ("bf16", "bf16"))}
    config = MetaNetworkConfig(
        len(graph.spec.columns), graph.spec.edge_kinds, **size, zero_init=False, **how, max_chunk_mb=chunk_mb
    )
    return MetaNetwork(config)


def show(found: Sequence[Measured], path: Path | None, console: Console | None = None) -> None:
    """Print a table, each backend against pyg on the same graph; write JSON if a path is given."""
    caption = "medians of rounds in turns; fwd: forward alone; in brackets: against pyg, and the least that must move"
    table = Table(title=f"A pass through the metanetwork on {found[0].device}", caption=caption)
    for name in ("graph", "threads", "backend", "seconds", "peak MB", "moved GB"):
        table.add_column(name, justify="left" if name in ("graph", "backend") else "right")
    bases = {(r.graph, r.threads, r.backward): r for r in found if r.backend == "pyg" and not r.failed}
    for row in found:
        name = row.graph if row.backward else f"{row.graph} fwd"
        base = bases.get((row.graph, row.threads, row.backward))
        table.add_row(name, str(row.threads), row.backend, *_cells(row, None if base is row else base))
    (console or plain_console()).print(table)
    if path is not None:
        save_json(path, [asdict(row) for row in found])


def _cells(row: Measured, base: Measured | None) -> tuple[str, str, str]:
    if row.failed:
        return row.failed, "", ""
    moved = f"{row.moved_gb:.1f} ({row.moved_gb / row.least_gb:.0f}x)" if row.moved_gb else ""
    faster = f" ({base.seconds / row.seconds:.1f}x)" if base else ""
    smaller = f" (1/{base.peak_mb / max(row.peak_mb, 1):.1f})" if base else ""
    return f"{row.seconds:.3f}{faster}", f"{row.peak_mb:.0f}{smaller}", moved
