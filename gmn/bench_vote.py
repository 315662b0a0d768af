"""What the vote itself costs: the search for neighbours by prototypes, the draw, and the averages, on synthetic masks.

The target's prototypes are at hand, and the zoo is in memory. The search by LEEP, which the built-in recipes use, runs
the network of every task on the target's images and costs far more: `gmn bench scaling` measures that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from gmn.backbone import Backbone
from gmn.consoles import plain_console
from gmn.example import example_inputs
from gmn.groups import KeepMask
from gmn.networks import build_network
from gmn.similarity import TaskView, scored, similarity_by_name
from gmn.surgery import remove
from gmn.vote import average, draw, vote


@dataclass(frozen=True)
class VoteCost:
    """Median seconds of each part, for one target task; the search is that by prototypes."""

    tasks: int
    nodes: int
    neighbours: int
    search: float
    vote: float
    average: float

    @property
    def total(self) -> float:
        """Seconds from the target's prototypes to the parameters that the sub-network starts from."""
        return self.search + self.vote + self.average


def vote_cost(network: str, tasks: int, neighbours: int, *, ratio: float = 0.9, rounds: int = 5) -> VoteCost:
    """Measure one vote among random sub-networks of a network, their masks and weights in memory.

    Args:
        network: Name for `gmn.build_network`.
        tasks: Size of the zoo.
        neighbours: How many vote.
        ratio: Share of each layer's units that goes.
        rounds: Repetitions, of which the median counts.
    """
    backbone = _backbone(network)
    generator = torch.Generator().manual_seed(0)
    random = lambda: draw(torch.zeros(backbone.coupled.num_channels), backbone.coupled, ratio, generator, 1.0)  # noqa: E731
    keeps = torch.stack([backbone.coupled.nodes(random()) for _ in range(tasks)])
    views = [_view(number, generator) for number in range(tasks + 1)]
    target, measure = views.pop(), similarity_by_name("prototypes")
    search = lambda: torch.tensor([scored(measure, target, view) for view in views]).topk(neighbours).indices  # noqa: E731
    chosen = keeps[search()]
    states = [_cut(backbone, keep) for keep in chosen]
    origin = dict(backbone.model.state_dict())
    return VoteCost(
        tasks,
        backbone.spec.num_nodes,
        neighbours,
        _seconds(search, rounds),
        _seconds(lambda: vote(chosen, backbone.coupled, ratio=ratio, generator=generator), rounds),
        _seconds(lambda: average(backbone.spec, origin, states, chosen), rounds),
    )


def _backbone(network: str) -> Backbone:
    torch.manual_seed(0)
    model = build_network(network, num_classes=10).eval()
    return Backbone.of(model, example_inputs(model))


def _view(number: int, generator: torch.Generator) -> TaskView:
    names = tuple(f"class {number} {k}" for k in range(5))
    return TaskView(names, prototypes=torch.randn(5, 64, generator=generator))


def _cut(backbone: Backbone, keep: Tensor) -> dict[str, Tensor]:
    smaller = remove(backbone.model, backbone.spec, KeepMask(keep), backbone.example, coupled=backbone.coupled)
    return dict(smaller.state_dict())


def show(found: VoteCost) -> None:
    """Print the parts as a table."""
    title = f"a vote of {found.neighbours} among {found.tasks:,} tasks in memory, {found.nodes:,} nodes"
    caption = "search: by prototypes, those of the target at hand; LEEP runs every task's network: gmn bench scaling"
    table = Table(title=title, caption=caption)
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for part in ("search", "vote", "average", "total"):
        table.add_row("search by prototypes" if part == "search" else part, f"{getattr(found, part):.3f}")
    plain_console().print(table)


def _seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
