"""A state dict from a file that may be a stranger's: nothing in it runs, and nothing is made that it only claims.

safetensors   the library compares its header with the size of the file
torch.save    `weights_only`; every record stored, none compressed; first read without numbers, to see what it claims
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gmn.errors import CheckpointError, one_line
from gmn.memory import refuse_too_large

# what safetensors and the unpickler raise on torn or foreign bytes
UNREADABLE = (
    safetensors.SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    *(RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(ImportError, ArithmeticError, MemoryError),
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, whole and in memory.

    Args:
        path: `.safetensors`, or anything `torch.load(weights_only=True)` reads: a state dict, plain or
            under the key `state_dict` or `model`, with or without the `module.` of data parallelism.

    Raises:
        CheckpointError: if the file is missing, torn, of another kind, or claims more than it holds.
    """
    if not path.is_file():
        raise CheckpointError("no such file of weights", got=str(path), hint="if a run makes it, make that run first")
    refuse_too_large(path)
    try:
        content = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except UNREADABLE as problem:
        raise CheckpointError(
            "cannot read the weights", got=one_line(problem), where=str(path),
            hint="expected a safetensors file or a saved state dict, not a pickled model",
        ) from problem  # fmt: skip
    return _state_dict(content, path)


def checksum(tensors: Mapping[str, Tensor], meta: Any = None) -> str:
    """SHA-256 of a header's text, and of the name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unpickled(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as begin:
        zipped = begin.read(4) == b"PK\x03\x04"  # as torch tells them apart
    if zipped:
        _check_records(path, size)
        file, fake = path, contextlib.nullcontext()
    else:  # the format before torch 1.6 makes room for texts and numbers of any length that it claims
        from torch._subclasses.fake_tensor import FakeTensorMode  # a second to import

        file, fake = io.BytesIO(path.read_bytes()), FakeTensorMode()
    with fake:
        shapes = tree_leaves(torch.load(file, map_location="meta", weights_only=True))
    storages = {s._cdata: s for s in (t.untyped_storage() for t in shapes if isinstance(t, Tensor))}
    if (claimed := sum(storage.nbytes() for storage in storages.values())) > size:
        raise ValueError(f"tensors of {claimed:,} bytes in a file of {size:,}")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_records(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(r.compress_type != zipfile.ZIP_STORED for r in records) or sum(r.file_size for r in records) > size:
        raise ValueError("records that are compressed, or larger than the file")


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            "not a state dict", expected="names and tensors", got=type(content).__name__, where=str(path)
        )
    for name, value in content.items():
        if not isinstance(name, str) or not _is_plain(value):
            kind = type(value).__name__
            raise CheckpointError(
                "not a state dict", expected="dense tensors", got=f"{kind} at {name!r}", where=str(path)
            )
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): value for name, value in content.items()}


def _is_plain(value: object) -> bool:
    """Whether it is a tensor of ordinary numbers."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_quantized or value.is_complex() or value.is_nested)
