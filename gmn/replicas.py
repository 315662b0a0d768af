"""Data-parallel training of one network: every process has a replica, and a share of each batch.

After the backward pass all gradients travel in one message, and every replica takes the same step. A wrapper that
sends them while the backward pass still runs (DDP) would hide that message behind it, but refuses networks with
parameters that an output does not depend on, and those networks are trained here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gmn.distributed import team
from gmn.errors import TrainingError

Metrics = dict[str, float]


@contextmanager
def replicated(model: nn.Module, batch_size: int) -> Iterator[None]:
    """Inside, all processes train one network, which they hold with the same bits before and after.

    A batch norm normalises a share of the batch by the share's own statistics; its running ones are averaged over the
    processes at the end. So a network with batch norms trains a little otherwise than in one process, and one without
    trains alike.

    Raises:
        TrainingError: if the processes cannot have equal shares of a batch.
    """
    refuse_uneven(batch_size)
    crew = team()
    crew.agree(model.state_dict().values())
    yield
    running = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    crew.add_up(running)
    for buffer in running if crew.size > 1 else ():
        buffer.div_(crew.size)
    crew.agree(model.state_dict().values())


def refuse_uneven(batch_size: int, where: str | None = None) -> None:
    """TrainingError if the processes cannot have equal shares of a batch.

    Args:
        batch_size: Images in a batch.
        where: The section of the recipe that says so.
    """
    if batch_size % team().size:
        expected, got = f"a batch_size that {team().size} processes share equally", str(batch_size)
        raise TrainingError("a batch cannot be shared", expected=expected, got=got, where=where)


def averaged_over_processes(metrics: Metrics, model: nn.Module, count: int = 1) -> Metrics:
    """Divide what `count` backward passes left in the gradients, in all processes, by their number; of metrics too.

    Args:
        metrics: Sums over the passes of this process.
        model: Its gradients are sums alike; a parameter without one has none in any process.
        count: Passes of this process; the others made as many.
    """
    crew = team()
    passes = count * crew.size
    if passes == 1:
        return metrics
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    crew.add_up(gradients)
    for gradient in gradients:
        gradient.div_(passes)
    return {key: value / passes for key, value in zip(metrics, crew.total(*metrics.values()), strict=True)}
