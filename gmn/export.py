"""Hand a network over: files that other programs run, none of which appears before it gave the network's outputs."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gmn.batches import batch_size, with_batch
from gmn.checkpoint import write_atomic
from gmn.errors import CheckpointError, ConversionError, GmnError, first_line, no_memory
from gmn.export_formats import FORMATS, Ready, runner
from gmn.names import refuse_unknown
from gmn.progress import track
from gmn.trace import clone

TOLERANCE = 1e-4
"""Largest difference from the network's outputs, relative to the largest of them."""
Batch = int | Literal["dynamic"]
Case = tuple[Any, list[Tensor]]  # inputs, and what the network makes of them


@dataclass(frozen=True)
class Exported:
    """The files of one format, their size in bytes, and their largest difference from the network, see `TOLERANCE`."""

    format: str
    files: tuple[Path, ...]
    bytes: int
    difference: float


def export_model(
    model: nn.Module,
    example_inputs: Any,
    folder: str | Path,
    *,
    formats: Sequence[str] | None = None,
    batch: Batch = "dynamic",
    network: dict[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> list[Exported]:
    """Write a network as safetensors, `torch.export` program and ONNX; the model itself is not changed.

    Every format is opened again and run on the example inputs and on a second batch, of another size if the size is
    open. Only if all of them agree with the network do the files appear.

    Args:
        model: Any network that `torch.export` takes.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments; the first dimension of the
            first tensor is the batch.
        folder: Where to: `model.json` and `weights.safetensors`, `model.pt2`, `model.onnx`.
        formats: Of `safetensors`, `pt2` and `onnx`; None: all, safetensors only if `network` is given.
        batch: Number of samples that the files take: "dynamic" any, or a fixed one.
        network: How to build the network again, see `gmn.save_model`; safetensors need it.
        facts: What else `model.json` keeps, such as accuracies.
        overwrite: Replace files that are there.

    Raises:
        ConversionError: if the network cannot be exported, or a file gives other outputs.
        GmnError: if a format is unknown or lacks its packages, a file exists, or the batch makes no sense.
    """
    folder = Path(folder)
    names = _checked(formats, network, batch)
    taken = next((folder / file for name in names for file in FORMATS[name].files if (folder / file).exists()), None)
    if taken and not overwrite:
        raise CheckpointError("the output exists", got=str(taken), hint="replace it: --overwrite, overwrite=True")
    ready, cases = _prepared(model, example_inputs, batch, network, facts or {})
    with _staging(folder) as stage, track("exporting", len(names)) as advance:
        differences = {}
        for name in names:
            differences[name] = _tried(name, ready, stage / name, cases)
            advance(name)
        return [_published(name, stage / name, folder, differences[name]) for name in names]


def _checked(formats: Sequence[str] | None, network: dict[str, Any] | None, batch: Batch) -> list[str]:
    names = [name for name in FORMATS if name != "safetensors" or network] if formats is None else list(formats)
    for name in names:
        refuse_unknown("format", name, FORMATS)
        needed = FORMATS[name].packages
        if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
            raise GmnError(
                f"{name} needs more packages", got=f"no {', '.join(missing)}", hint=f"pip install {' '.join(missing)}"
            )
    if not names:
        raise GmnError("no format to export to", expected=f"some of {', '.join(FORMATS)}")
    if "safetensors" in names and not network:
        hint = "pass network={'name': ..., 'num_classes': ...} as to gmn.save_model, or other formats"
        raise GmnError("safetensors need to know how the network is built", hint=hint)
    if batch != "dynamic" and (type(batch) is not int or batch < 1):
        raise GmnError("bad batch", expected="dynamic or a number of samples", got=repr(batch))
    return list(dict.fromkeys(names))


def _prepared(
    model: nn.Module, example_inputs: Any, batch: Batch, network: dict[str, Any] | None, facts: Mapping[str, Any]
) -> tuple[Ready, list[Case]]:
    """The network to write, and what its files must make of two batches."""
    frozen = clone(model).cpu().eval()
    inputs = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, example_inputs)
    size = batch_size(inputs)
    shape = {"input_shape": list(inputs.shape[1:])} if isinstance(inputs, Tensor) else {}
    if batch == "dynamic":
        traced, other = with_batch(inputs, max(size, 2)), 3 if size == 1 else 1  # traced on one, it takes one
    else:
        inputs = traced = with_batch(inputs, batch)
        other = batch
    ready = Ready(frozen, traced, batch == "dynamic", network, {**shape, **facts})
    return ready, [(own, _outputs(ready, own)) for own in (inputs, with_batch(inputs, other, shuffled=True))]


def _outputs(ready: Ready, inputs: Any) -> list[Tensor]:
    with _attempt(f"{ready.kind} does not run on a batch of {batch_size(inputs)}", ready.hint):
        outputs = runner(ready.model)(inputs)
    if not sum(tensor.numel() for tensor in outputs) or not all(bool(tensor.isfinite().all()) for tensor in outputs):
        got = "NaN or infinity" if outputs else "none"
        raise ConversionError("nothing to compare with in the network's outputs", expected="finite numbers", got=got)
    return outputs


def _tried(name: str, ready: Ready, folder: Path, cases: list[Case]) -> float:
    """Write one format, open it and run it; its largest difference from the network."""
    folder.mkdir()
    how = "any number of samples" if ready.dynamic else f"{batch_size(ready.inputs)} samples"
    with _attempt(f"{ready.kind} cannot be exported to {name} for {how}", ready.hint):
        FORMATS[name].write(ready, folder)
        run = FORMATS[name].open(folder)
    differences = []
    for inputs, expected in cases:
        with _attempt(f"the {name} file does not run on a batch of {batch_size(inputs)}", ready.hint):
            got = run(inputs)
        differences.append(difference(expected, got))
        if not differences[-1] <= TOLERANCE:  # NaN neither
            where = f"a batch of {batch_size(inputs)}"
            raise ConversionError(
                f"the {name} file gives other outputs than the network",
                expected=f"a relative difference of at most {TOLERANCE:g}", got=f"{differences[-1]:.2g}", where=where,
            )  # fmt: skip
    return max(differences)


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """max |expected - got| / max |expected| over all tensors; infinite if their shapes differ.

    >>> difference([torch.tensor([1.0, -4.0])], [torch.tensor([1.5, -4.0])])
    0.125
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        return float("inf")
    flat = [torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (expected, got)]
    largest = float(flat[0].abs().max()) or 1.0
    return float((flat[0] - flat[1]).abs().max()) / largest


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder for files that are not finished, on the same disk; it goes whatever happens."""
    home = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=home) as stage:
        yield Path(stage)


def _published(name: str, stage: Path, folder: Path, largest: float) -> Exported:
    files = [file for file in FORMATS[name].files if (stage / file).is_file()]
    for file in files:
        write_atomic(folder / file, partial(os.replace, stage / file))
    targets = tuple(folder / file for file in files)
    return Exported(name, targets, sum(path.stat().st_size for path in targets), largest)


@contextmanager
def _attempt(message: str, hint: str | None = None) -> Iterator[None]:
    """What goes wrong inside is a ConversionError; what is only said is not heard, since the outputs are compared."""
    heard = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (GmnError, OSError):
        raise
    except Exception as error:  # exporters and runtimes raise whatever they met on their way
        if no_memory(error):
            raise
        raise ConversionError(message, got=_reason(error), hint=hint) from error
    finally:
        logging.disable(heard)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error) or type(error).__name__
