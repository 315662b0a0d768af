"""A training that is under way, kept every so often, so that a killed run goes on in the middle of it.

    NAME.N.safetensors      the N-th: weights, optimizer, averages, random numbers; the header says where it stands

The last two are kept: should the newest be damaged, the one before it is taken. What a resumed training does is bit for
bit what it would have done, on a CPU with the same number of threads: batches follow from (seed, epoch), and those that
lie behind are passed over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gmn.checkpoint import load_sound, optimizer_tensors, restore_optimizer, save_tensors, stated
from gmn.errors import MALFORMED, CheckpointError, of_machine, one_line

Tensors = dict[str, Tensor]
KEPT = 2
CPU_RANDOM, CUDA_RANDOM = "random.cpu", "random.cuda"


@dataclass
class Place:
    """Where a training stands.

    Attributes:
        epoch, step: The epoch, counted from 0, and how many of its steps are done.
        sums: Of the epoch's metrics so far, each divided by the number of steps.
        skipped: Steps of the epoch that were not taken, because something was not finite.
        in_a_row: Steps that were not taken since the last one that was.
        seconds: Of every epoch since the training began.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    in_a_row: int = 0
    seconds: list[float] = field(default_factory=list)

    def since(self, epoch: int) -> float:
        """Seconds from the beginning of an epoch on.

        >>> Place(epoch=3, seconds=[1.0, 1.0, 2.0, 0.5]).since(2)
        2.5
        """
        return sum(self.seconds[-(self.epoch - epoch + 1) :])


class Bookmark:
    """Keeps a training in files.

    Args:
        path: Folder and name of the files, without an ending.
        every: Seconds between two of them; shorter trainings leave none.
    """

    def __init__(self, path: Path, every: float) -> None:
        self.path, self.every = path, every
        self._last = self._first = time.perf_counter()

    def is_due(self, *, done: bool = False) -> bool:
        """Whether it is time to save; at the end of a training, whether that took long enough."""
        return time.perf_counter() - (self._first if done else self._last) >= self.every

    def save(self, place: Place, modules: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
        """Write the next file and delete all but the last two."""
        tensors = {f"{key}.{name}": t for key, module in modules.items() for name, t in module.state_dict().items()}
        tensors |= optimizer_tensors(optimizer) | _random_numbers(modules)
        files = self._files()
        number = _number(files[-1]) + 1 if files else 0
        save_tensors(self.path.with_name(f"{self.path.name}.{number}.safetensors"), tensors, asdict(place))
        for old in files[: -(KEPT - 1)]:
            old.unlink(missing_ok=True)
        self._last = time.perf_counter()

    def restore(
        self, modules: Mapping[str, nn.Module], optimizer: Optimizer, start: int, epochs: int, steps: int
    ) -> tuple[Place, Tensors]:
        """Fill modules and optimizer from the newest sound file that is not from before epoch `start`.

        Args:
            modules, optimizer: Of the training.
            start: The epoch that a resumed training would begin with.
            epochs, steps: How many epochs it has, and steps in each.

        Returns:
            Where the training stands, and the random numbers' states for `set_random_numbers`; the very beginning of
            `start`, and no states, if there is no such file.

        Raises:
            CheckpointError: if a sound file is of another training.
        """
        for file in reversed(self._files()):
            if (found := load_sound(file, "the one before it is taken")) is not None:
                tensors, meta = found
                try:
                    if (place := _checked(stated(Place, meta), epochs, steps)).epoch < start:
                        break
                    _fill(modules, tensors)
                    restore_optimizer(optimizer, tensors)
                    return place, _states(tensors)
                except MALFORMED as error:
                    if of_machine(error):
                        raise
                    hint = f"delete {self.path.parent}, and it begins anew"
                    got = one_line(error)
                    raise CheckpointError("not of this training", got=got, where=str(file), hint=hint) from error
        return Place(start), {}

    def _files(self) -> list[Path]:
        found = self.path.parent.glob(f"{self.path.name}.*.safetensors")
        return sorted((path for path in found if path.suffixes[-2][1:].isdecimal()), key=_number)


def _checked(place: Place, epochs: int, steps: int) -> Place:
    """The place, if the training can stand there; ValueError otherwise."""
    names = all(key.isidentifier() and key not in ("time", "event", "title", "epoch") for key in place.sums)
    counts = min(place.skipped, place.in_a_row) >= 0 and len(place.seconds) > 0
    if not (0 <= place.epoch < epochs and 0 <= place.step <= steps and names and counts):
        raise ValueError(f"epoch {place.epoch} of {epochs}, step {place.step} of {steps}")
    return place


def _fill(modules: Mapping[str, nn.Module], tensors: Tensors) -> None:
    for key, module in modules.items():
        own = {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")}
        module.load_state_dict(own)


def _states(tensors: Tensors) -> Tensors:
    """The random numbers' states; RuntimeError or TypeError if torch cannot take them."""
    if CPU_RANDOM in tensors:
        torch.Generator().set_state(tensors[CPU_RANDOM])
    return {key: tensors[key] for key in (CPU_RANDOM, CUDA_RANDOM) if key in tensors}


def _number(path: Path) -> int:
    return int(path.suffixes[-2][1:])


def _random_numbers(modules: Mapping[str, nn.Module]) -> Tensors:
    """The states of torch's own random numbers, such as those of dropout."""
    found = {CPU_RANDOM: torch.get_rng_state()}
    if any(parameter.is_cuda for module in modules.values() for parameter in module.parameters()):
        found[CUDA_RANDOM] = torch.cuda.get_rng_state()
    return found


def set_random_numbers(states: Tensors) -> None:
    """Put back what `Bookmark.restore` found; then it is empty."""
    if CPU_RANDOM in states:
        torch.set_rng_state(states.pop(CPU_RANDOM))
    if CUDA_RANDOM in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states.pop(CUDA_RANDOM))
    states.clear()
