"""The formats that a network is handed over in: how each is written, and how it is opened again.

safetensors   weights.safetensors and model.json, which `gmn.load_model` opens
pt2           model.pt2 of `torch.export`, which PyTorch runs without gmn and without the network's code
onnx          model.onnx, for ONNX Runtime and whatever else reads ONNX
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from gmn.batches import batched, tensors_in
from gmn.checkpoint import load_model, save_model
from gmn.permission import allow_code
from gmn.trace import split_inputs

Run = Callable[[Any], list[Tensor]]  # from inputs to the tensors of the outputs
ONE_FILE = 2**31 - 2**24  # bytes: protobuf, which ONNX is made of, ends at 2 GB


@dataclass(frozen=True)
class Ready:
    """A network to write, on the CPU and in eval mode.

    Attributes:
        model: The network.
        inputs: What it is traced on.
        dynamic: Whether their number of samples is left open.
        network: How to build it, see `gmn.save_model`; None if that is not known.
        facts: What else `model.json` says.
    """

    model: nn.Module
    inputs: Any
    dynamic: bool
    network: dict[str, Any] | None
    facts: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What the network is called in errors."""
        return type(self.model).__name__

    @property
    def hint(self) -> str | None:
        """What can help if it fails."""
        return "it may need a fixed number of samples: --batch 1, batch=1" if self.dynamic else None

    @cached_property
    def shapes(self) -> Any:
        """Which dimensions are open, as `torch.export` wants it; None if none is."""
        if not self.dynamic:
            return None
        open_batch = ShapesCollection()
        for tensor in batched(self.inputs):
            open_batch[tensor] = {0: Dim("batch")}
        return open_batch.dynamic_shapes(self.model, *split_inputs(self.inputs))

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as one graph of operations."""
        return torch.export.export(self.model, *split_inputs(self.inputs), dynamic_shapes=self.shapes, strict=False)


@dataclass(frozen=True)
class Format:
    """A way to hand over.

    Attributes:
        files: Names that it can write.
        write: Writes them into a folder.
        open: Opens them there, to run them.
        packages: What it needs beside gmn's own dependencies.
    """

    files: tuple[str, ...]
    write: Callable[[Ready, Path], None]
    open: Callable[[Path], Run]
    packages: tuple[str, ...] = ()


def runner(model: nn.Module) -> Run:
    """How a network is run on inputs: a tensor, a tuple of arguments or a dict of keyword arguments."""

    def run(inputs: Any) -> list[Tensor]:
        args, kwargs = split_inputs(inputs)
        with torch.no_grad():
            return tensors_in(model(*args, **kwargs))

    return run


def _write_safetensors(ready: Ready, folder: Path) -> None:
    save_model(folder, ready.model, ready.network or {}, **ready.facts)


def _open_safetensors(folder: Path) -> Run:
    with allow_code():  # we have just written it, and the caller said how the network is built
        return runner(load_model(folder))


def _write_pt2(ready: Ready, folder: Path) -> None:
    torch.export.save(ready.program, folder / "model.pt2")


def _open_pt2(folder: Path) -> Run:
    return runner(torch.export.load(folder / "model.pt2").module())


def _write_onnx(ready: Ready, folder: Path) -> None:
    args, kwargs = split_inputs(ready.inputs)
    size = sum(tensor.nbytes for tensor in ready.model.state_dict().values() if isinstance(tensor, Tensor))
    torch.onnx.export(
        ready.program,
        args,
        folder / "model.onnx",
        kwargs=kwargs,
        dynamic_shapes=ready.shapes,  # for the name of the dimension
        dynamo=True,
        verbose=False,
        external_data=size > ONE_FILE,
    )


def _open_onnx(folder: Path) -> Run:
    import onnxruntime  # only for those who ask

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; of another shape than declared we say ourselves
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        arrays = [tensor.detach().numpy() for tensor in tensors_in(split_inputs(inputs))]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


FORMATS = {
    "safetensors": Format(("weights.safetensors", "model.json"), _write_safetensors, _open_safetensors),
    "pt2": Format(("model.pt2",), _write_pt2, _open_pt2),
    "onnx": Format(("model.onnx", "model.onnx.data"), _write_onnx, _open_onnx, ("onnx", "onnxscript", "onnxruntime")),
}
