"""What a step of meta-training costs, by its parts, and its peak memory: this package's ways, and the published one.

gmn            dense blocks, one pass through the metanetwork per step
channels_last  the same, images with their channels last
bf16           the same, and the new network reads them in bfloat16
published      PyTorch Geometric, and a backward pass through the metanetwork for every mini-batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gmn.bench_metanetwork import SUBJECTS, graph_of, metanetwork_of
from gmn.bench_workers import Turn, Worker, device_name, in_turns
from gmn.checkpoint import save_json
from gmn.consoles import plain_console
from gmn.job import choose_device
from gmn.names import refuse_unknown
from gmn.progress import track

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gmn.data import Split
    from gmn.meta_train import Batch, DataModel
    from gmn.metanetwork import MetaNetwork
    from gmn.phases import Stopwatch

WAYS: dict[str, dict[str, Any]] = {
    "gmn": {},
    "channels_last": {"channels_last": True},
    "bf16": {"channels_last": True, "bf16": True},
    "published": {},
}
PHASES = ("images", "metanetwork forward", "accuracy", "sparsity", "metanetwork backward", "optimizer")


@dataclass(frozen=True)
class Measured:
    """Seconds of a step by its parts (medians over rounds), and the memory in MB.

    `base_mb` is what the process holds before: libraries, network, graph, metanetwork, images; `peak_mb` is what the
    steps add to it at most.
    """

    network: str
    way: str
    threads: int
    images: int
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    base_mb: float = 0.0
    peak_mb: float = 0.0
    failed: str = ""
    device: str = "cpu"

    @property
    def share(self) -> float:
        """Of the metanetwork's two passes in the whole step."""
        passes = self.seconds["metanetwork forward"] + self.seconds["metanetwork backward"]
        return passes / sum(self.seconds.values())


def bench(
    network: str,
    ways: Sequence[str] | None,
    threads: Sequence[int],
    *,
    images: int | None,
    batch_size: int,
    rounds: int,
    device: str = "cpu",
) -> list[Measured]:
    """Measure a step on random images of the network's size.

    Args:
        ways: None: ours, and the published one where it fits into memory.
        images: None: as many as suit the network.

    Raises:
        GmnError: if a network or a way is unknown, or the device is not there.
    """
    refuse_unknown("network", network, SUBJECTS)
    own = SUBJECTS[network]
    images, ways = images or own.images, ways or (("gmn", "published") if own.listed else ("gmn",))
    for way in ways:
        refuse_unknown("way", way, WAYS)
    place = choose_device(device)
    found: list[Measured] = []
    with track(f"meta-steps of {network}", len(threads) * (rounds + 2)) as advance:
        for count in threads:
            facts = {"network": network, "threads": count, "images": images}
            each: list[dict[str, Any]] = [{**facts, "way": way} for way in ways]
            more = {"batch_size": min(batch_size, images), "device": str(place)}
            workers = [Worker(__name__, {**case, **more}) for case in each]
            for case, outcome in zip(each, in_turns(workers, rounds, lambda: advance("")), strict=True):
                numbers = {**outcome.row, "seconds": outcome.median, "base_mb": outcome.about.get("base_mb", 0.0)}
                found.append(Measured(**case, **numbers, device=device_name(place)))
    return found


def prepare(facts: dict[str, Any]) -> tuple[dict[str, float], Turn]:
    """In a worker: the network, its graph, the metanetwork and the images; and a step."""
    import torch

    from gmn.data import Augment
    from gmn.meta_train import meta_step
    from gmn.phases import Stopwatch

    way, device = facts["way"], torch.device(facts["device"])
    subject, metanetwork, split = subject_of(facts["network"], facts["images"], device, published=way == "published")
    optimizer = torch.optim.AdamW(metanetwork.parameters(), lr=1e-4)
    augment, generator = Augment(crop=4, flip=True), torch.Generator().manual_seed(0)

    def turn(_: bool) -> dict[str, float]:
        watch = Stopwatch()
        optimizer.zero_grad(set_to_none=True)
        with watch("images"):
            batches = list(split.batches(facts["batch_size"], generator=generator, augment=augment))
        if way == "published":
            _published_step(metanetwork, subject, batches, watch)
        else:
            meta_step(metanetwork, subject, batches, pruner_reg=1.0, **WAYS[way], phase=watch)
        with watch("optimizer"):
            optimizer.step()
        return dict(watch.seconds)

    return {}, turn


def subject_of(
    network: str, images: int, device: torch.device | str = "cpu", *, published: bool = False
) -> tuple[DataModel, MetaNetwork, Split]:
    """A network to learn on, its metanetwork, and random images of its size, on a device."""
    import torch

    from gmn.criteria import Importance
    from gmn.data import Split
    from gmn.groups import couplings
    from gmn.meta_train import DataModel

    own, graph = SUBJECTS[network], graph_of(network)
    assert graph.template is not None
    model, importance = graph.template.eval().to(device), Importance(graph.spec, couplings(graph.spec))
    metanetwork = metanetwork_of(network, graph, "pyg" if published else "blocks").to(device)
    pixels = torch.randint(0, 256, (images, 3, own.pixels, own.pixels), dtype=torch.uint8)
    half = torch.full((3,), 0.5)
    split = Split(pixels, torch.randint(0, own.classes, (images,)), half, half).to(device)
    return DataModel(model, graph.to(device), importance), metanetwork, split


def _published_step(metanetwork: MetaNetwork, subject: DataModel, batches: Sequence[Batch], watch: Stopwatch) -> None:
    """The same gradient as `meta_step`, mini-batch by mini-batch through the whole metanetwork."""
    import torch
    from torch.func import functional_call
    from torch.nn import functional as F

    images = sum(len(labels) for _, labels in batches)
    with watch("metanetwork forward"):
        new = metanetwork(subject.graph).to_state_dict()
    with watch("sparsity"):
        sparsity = subject.importance.sparsity_loss(new)
    leaves = list(new.values())

    def through(loss: Tensor, phase: str) -> None:
        with watch(phase):
            gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        used = [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None]
        with watch("metanetwork backward"):
            torch.autograd.backward([leaf for leaf, _ in used], [g for _, g in used], retain_graph=True)

    for inputs, labels in batches:
        with watch("accuracy"):
            logits = functional_call(subject.model, new, (inputs,))
            loss = F.cross_entropy(logits, labels, reduction="sum") / images
        through(loss, "accuracy")
    through(sparsity, "sparsity")


def show(found: Sequence[Measured], path: Path | None, console: Console | None = None) -> None:
    """Print a table, a column for each way; write JSON if a path is given."""
    network, images = found[0].network, found[0].images
    title = f"A step of meta-training: {network}, {images:,} images, on {found[0].device}"
    table = Table(title=title, caption="seconds; medians of rounds in which the ways take turns")
    table.add_column("part")
    for row in found:
        table.add_column(f"{row.way}\n{row.threads} thread" + "s" * (row.threads > 1), justify="right")
    for phase in PHASES:
        table.add_row(phase, *(f"{row.seconds[phase]:.3f}" if row.seconds else "" for row in found))
    table.add_section()
    table.add_row("whole step", *(f"{sum(row.seconds.values()):.2f}" if row.seconds else row.failed for row in found))
    table.add_row("share of the metanetwork", *(f"{row.share:.1%}" if row.seconds else "" for row in found))
    table.add_row("MB, the step's", *(f"{row.peak_mb:.0f}" if row.seconds else "" for row in found))
    table.add_row("MB altogether", *(f"{row.base_mb + row.peak_mb:.0f}" if row.seconds else "" for row in found))
    (console or plain_console()).print(table)
    if path is not None:
        save_json(path, [asdict(row) for row in found])
