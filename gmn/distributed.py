"""Several processes on one recipe, started by `accelerate launch`: data-parallel training, otherwise one program.

Every process goes the whole way of the recipe. They share the images of a step and of an evaluation, and add up what
they found; what is left (ranking channels, cutting, measuring) each does by itself, so that nobody waits for long.
Files change only while all processes stand in the same `leader_writes`, and only the first of them writes: what one
finds on the disk, all find. Without a launcher there is one process, and nothing here does anything.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch import distributed as dist

from gmn import progress
from gmn.errors import GmnError, RecipeError, TrainingError
from gmn.launch import processes
from gmn.state_dict import checksum

P = ParamSpec("P")
CPU = torch.device("cpu")
PATIENCE = timedelta(days=7)  # a process that has died is noticed at once: its connections close
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


class LostError(TrainingError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Team:
    """The processes that work on a recipe together; one process alone by default, for which nothing happens.

    Attributes:
        rank, size: The number of this process, from 0, and how many there are.
        device: What messages travel from: the process's accelerator, or the CPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def parts(self, sizes: Sequence[int]) -> Iterator[slice] | None:
        """Which part of each batch is this process's own, for batches of these sizes again and again; None: all.

        The batches of one round lie side by side; every process has a stretch of that row, all about equally long.

        >>> next(Team(rank=1, size=2).parts([4]))
        slice(2, 4, None)
        """
        if self.size == 1:
            return None
        low, high = (number * sum(sizes) // self.size for number in (self.rank, self.rank + 1))
        starts = [0, *itertools.accumulate(sizes)]
        own = [(max(low - start, 0), high - start) for start in starts[:-1]]
        cut = [slice(min(a, size), max(min(b, size), min(a, size))) for (a, b), size in zip(own, sizes, strict=True)]
        return itertools.cycle(cut)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into each tensor; they travel in one message."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        with torch.no_grad():
            flat = torch.cat([tensor.flatten() for tensor in tensors]).to(self.device)
            with _talking():
                dist.all_reduce(flat)
            for tensor, whole in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(whole.view_as(tensor))

    def total(self, *values: float) -> list[float]:
        """The sums of numbers over all processes."""
        sums = torch.tensor(values, dtype=torch.float64)
        self.add_up([sums])
        return sums.tolist()

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Put what the first process has into each tensor."""
        for tensor in tensors if self.size > 1 else ():
            with torch.no_grad():
                message = tensor.detach().to(self.device).contiguous()
                with _talking():
                    dist.broadcast(message.flatten().view(torch.uint8), 0)  # gloo does not know all types
                tensor.copy_(message)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            with _talking():
                dist.barrier(device_ids=None if self.device.type == "cpu" else [self.device.index or 0])

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """A block in which the first process may fetch what the others then find."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def refuse_different(self, module: nn.Module, what: str) -> None:
        """Raise TrainingError, in all processes, unless every one holds the same bits.

        Args:
            module: Its state is compared by a hash.
            what: What it is, for the message.
        """
        if self.size == 1:
            return
        own = torch.tensor([int(checksum(module.state_dict())[:14], 16)])
        first = own.clone()
        self.agree([first])
        (different,) = self.total(float(bool(own != first)))
        if different:
            got = f"{different:g} of {self.size} differ from the first"
            raise TrainingError(f"the processes hold different {what}", expected="the same bits in all", got=got)


ALONE = Team()
_team = ALONE


def team() -> Team:
    """The processes that work together now."""
    return _team


def leader_writes(write: Callable[P, None]) -> Callable[P, None]:
    """A function that changes files, called by all processes and done by the first; the others wait until it is.

    They also wait before: nobody may still be looking at how things were. Such functions may call one another: while
    the first is at it the others wait already.
    """

    @wraps(write)
    def together(*args: P.args, **kwargs: P.kwargs) -> None:
        global _team
        crew = team()
        crew.wait()
        if crew.leads:
            _team = ALONE
            try:
                write(*args, **kwargs)
            finally:
                _team = crew
        crew.wait()

    return together


@contextmanager
def launched(device: str, method: str, engine: str = "here") -> Iterator[Team]:
    """Join the processes that a launcher has started, for a recipe's device and method; after the block all part.

    Raises:
        GmnError: if accelerate is missing, the recipe is no work for several processes, or the launcher was told
            what the recipe decides.
    """
    global _team
    if processes() == 1:
        yield ALONE
        return
    _refuse(device, method, engine)
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise GmnError("several processes need accelerate", hint="pip install accelerate") from error
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    _team = Team(state.process_index, state.num_processes, state.device or CPU)
    progress.console.quiet = not _team.leads
    yield _team
    _team.wait()
    own, _team = _team, ALONE
    state.destroy_process_group()
    progress.console.quiet = not own.leads


def _refuse(device: str, method: str, engine: str) -> None:
    if method != "metanetwork":
        hint = f"share its work with --engine ray{' or with gmn join' if method == 'vote' else ''}"
        raise RecipeError("several processes are for `method: metanetwork`", got=method, hint=hint)
    if engine != "here":  # each process would start a cluster, and get other rows than the others
        hint = f"leave out the launcher, or --engine {engine}"
        raise GmnError("several processes with a cluster", expected="one or the other", got=f"{processes()}", hint=hint)
    if ":" in device:
        raise RecipeError("one device for all processes", expected="device: auto, cpu or cuda", got=device)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        hint = "leave it to the recipe: meta_train.bf16, finetune.after_prune.bf16, ..."
        raise GmnError("the launcher sets a precision", expected="--mixed_precision no", got=precision, hint=hint)
    for name in SHARDED:
        if os.environ.get(name, "false").lower() == "true":
            hint = "launch with --multi_gpu: networks and metanetworks fit into one accelerator (docs/scaling.md)"
            raise GmnError("the launcher asks for sharded models", got=name, hint=hint)


@contextmanager
def _talking() -> Iterator[None]:
    """Errors of a connection say that somebody else has ended."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(
            "another process of the run has ended", hint="its own message, or the launcher's, says why"
        ) from error
