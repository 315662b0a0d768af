"""What pruning buys in time: networks side by side on one device, their speed-up in FLOPs against that in time."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch.utils._pytree import tree_map

from gmn.batches import batch_size, with_batch
from gmn.checkpoint import save_json
from gmn.consoles import wide_console
from gmn.costs import Cost, cost, latencies
from gmn.errors import GmnError, one_line
from gmn.job import choose_device
from gmn.progress import track
from gmn.report import human
from gmn.run import environment
from gmn.run_networks import to_compare
from gmn.subject import Choices, Named

WORTH_NAMING = 1.05  # a speed-up below is none
STEADY = 1.5  # times the lower quartile: an upper quartile above is not the networks' doing


@dataclass(frozen=True)
class Range:
    """Median of the rounds, and the quartiles between which half of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        """The range of two or more values.

        >>> Range.of([4.0, 1.0, 2.0, 3.0, 9.0])
        Range(median=3.0, low=2.0, high=4.0)
        """
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Timed:
    """One network at one batch size and number of threads.

    `seconds` are those of a batch. The speed-ups are against the first network; in time it is the ratio of the seconds
    within a round, so that a drift of the machine leaves it alone.
    """

    network: str
    flops: float
    parameters: int
    speed_up_flops: float
    batch: int
    threads: int
    seconds: Range
    speed_up_time: Range

    @property
    def in_vain(self) -> bool:
        """Whether FLOPs fell but time did not."""
        return self.speed_up_flops >= WORTH_NAMING > self.speed_up_time.median


def bench(
    networks: dict[str, Named], batches: Sequence[int], threads: Sequence[int], *, device: torch.device, rounds: int
) -> list[Timed]:
    """Time all networks on every batch size with every number of threads; they take turns, the first is the base.

    Args:
        networks: By name.
        batches: Numbers of samples.
        threads: Of the CPU.
        device: Where they run.
        rounds: Passes that count, 2 or more.

    Raises:
        GmnError: if a network does not run on a batch.
    """
    models = [own.model.to(device).eval() for own in networks.values()]
    example = next(iter(networks.values())).example
    inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, example)
    with _runs_on(batch_size(inputs)):
        costs = {name: cost(model, inputs) for name, model in zip(networks, models, strict=True)}
    found: list[Timed] = []
    with track("latency", len(batches) * len(threads)) as advance:
        for batch in batches:
            for number in threads:
                with _runs_on(batch), _threads(number):
                    seconds = latencies(models, with_batch(inputs, batch), rounds=rounds)
                found += compared(costs, seconds, batch, number)
                advance(f"batch {batch}")
    return found


@contextmanager
def _runs_on(batch: int) -> Iterator[None]:
    """What torch says of a batch that does not fit a network, or the memory, as a GmnError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise GmnError(f"a network does not run on a batch of {batch}", got=one_line(error)) from error


def compared(costs: dict[str, Cost], seconds: Sequence[Sequence[float]], batch: int, threads: int) -> list[Timed]:
    """Every network against the first one.

    Args:
        costs: Of each network, by name.
        seconds: [networks][rounds].
        batch, threads: What they were measured with.
    """
    base = next(iter(costs.values()))
    return [
        Timed(
            network=name,
            flops=own.flops,
            parameters=own.parameters,
            speed_up_flops=base.flops / own.flops,
            batch=batch,
            threads=threads,
            seconds=Range.of(series),
            speed_up_time=Range.of([first / second for first, second in zip(seconds[0], series, strict=True)]),
        )
        for (name, own), series in zip(costs.items(), seconds, strict=True)
    ]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- what is shown -----------------------------------------------------------------------------------------------------


def run(
    names: Sequence[str],
    choices: Choices,
    batches: Sequence[int],
    threads: Sequence[int],
    *,
    device: str,
    rounds: int,
    output: Path | None,
) -> None:
    """Measure, print the table, and write JSON if a path is given."""
    place = choose_device(device)
    found = bench(
        to_compare(names, choices), batches, threads or [torch.get_num_threads()], device=place, rounds=rounds
    )
    wide_console().print(table(found, str(place), rounds))
    if output is not None:
        timings = [dataclasses.asdict(row) for row in found]
        save_json(output, {"device": str(place), "rounds": rounds, "environment": environment(), "timings": timings})


SPEED_UPS = ("speed-up\nin FLOPs", "speed-up\nin time")


def table(found: Sequence[Timed], device: str, rounds: int) -> Table:
    """A line for each network, batch size and number of threads."""
    result = Table(title=f"Latency on {device}", caption=caption(found, rounds))
    titles = ("network", "parameters", "FLOPs", "batch", "threads", "ms per batch", *SPEED_UPS)
    for name in titles:
        result.add_column(name, justify="left" if name == "network" else "right", vertical="bottom")
    group = found[0].batch, found[0].threads
    for row in found:
        if group != (row.batch, row.threads):
            result.add_section()
            group = row.batch, row.threads
        result.add_row(row.network, human(row.parameters), human(row.flops), *map(str, group), *_cells(row, found[0]))
    return result


def _cells(row: Timed, base: Timed) -> tuple[str, str, str]:
    own, faster = row.seconds, row.speed_up_time
    milliseconds = f"{1e3 * own.median:.2f} ({1e3 * own.low:.2f}-{1e3 * own.high:.2f})"
    if row.network == base.network:
        return milliseconds, "", ""
    return milliseconds, f"{row.speed_up_flops:.2f}x", f"{faster.median:.2f}x ({faster.low:.2f}-{faster.high:.2f})"


def caption(found: Sequence[Timed], rounds: int) -> str:
    """What one must know to read the table, and where fewer FLOPs did not mean less time."""
    lines = [
        f"medians of {rounds} rounds in turns, half of the rounds in brackets; speed-ups against {found[0].network}"
    ]
    if vain := [f"{row.network} (batch {row.batch}, threads {row.threads})" for row in found if row.in_vain]:
        reasons = "channels that are no multiples of the hardware's width, small batches, layers bound by memory"
        lines.append(f"fewer FLOPs but no less time: {', '.join(vain)}; usual reasons: {reasons}")
    if any(row.seconds.high > STEADY * row.seconds.low for row in found):
        lines.append("the rounds differ widely: other programs were at work; measure again, or with more --rounds")
    return "\n".join(lines)
