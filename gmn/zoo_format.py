"""What the file of a task holds: tensors, and everything about the task in the header of a safetensors file.

Tensors: `keep` (the mask, a bit per node), `weight.NAME`, `extra.NAME`. Nothing that is read is trusted: what a header
claims is compared with the size of the file before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gmn.checkpoint import FORMAT
from gmn.errors import CheckpointError, GmnError, size_within
from gmn.zoo_task import IDENTITY, Task, is_text, to_task, to_text

KIND = "gmn zoo task"
LARGEST = 4 * 2**30  # bytes of a file
LARGEST_HEADER = 10_000_000  # bytes of JSON
MOST_AXES, LONGEST_AXIS = 16, 2**40
DTYPES = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool},
}
UNREADABLE = (safetensors.SafetensorError, RuntimeError, OSError, LookupError, ValueError, TypeError)


@dataclass(frozen=True, eq=False)
class Stored:
    """What the file of a task holds.

    Attributes:
        task: The task, without what belongs to the zoo that it lies in.
        identity: The network that it was cut from: `fingerprint`, `nodes`, and what else of IDENTITY the zoo says.
        keep: [N] bool, the nodes that stay.
        weights: The pruned weights by name.
        extra: Other tensors, such as class prototypes.
    """

    task: Task
    identity: dict[str, Any]
    keep: Tensor
    weights: dict[str, Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)


# -- masks ------------------------------------------------------------------------------------------------------------


def pack(keep: Tensor) -> bytes:
    """[N] bool to N / 8 bytes, rounded up; the first node is the lowest bit.

    >>> pack(torch.tensor([True, False, True])).hex()
    '05'
    """
    return np.packbits(keep.detach().cpu().numpy(), bitorder="little").tobytes()


def unpack(masks: Iterable[bytes], nodes: int) -> Tensor:
    """Packed masks to bool [masks, N]; CheckpointError if one has another length or bits behind the last node."""
    masks = list(masks)
    width = (nodes + 7) // 8
    for mask in masks:
        if len(mask) != width:
            raise CheckpointError("a mask of another length", expected=f"{width} bytes", got=str(len(mask)))
        if nodes % 8 and mask[-1] >> nodes % 8:
            raise CheckpointError("a mask with bits behind the last node", expected=f"{nodes} nodes")
    bits = np.frombuffer(b"".join(masks), dtype=np.uint8).reshape(len(masks), width)
    return torch.from_numpy(np.unpackbits(bits, axis=1, count=nodes, bitorder="little").astype(bool))


# -- writing -----------------------------------------------------------------------------------------------------------


def encode(stored: Stored) -> bytes:
    """The bytes of a task's file; CheckpointError if a tensor is not finite or of an odd type."""
    tensors = {f"weight.{name}": value for name, value in stored.weights.items()}
    tensors |= {f"extra.{name}": value for name, value in stored.extra.items()}
    for name, value in tensors.items():
        if not is_text(name) or value.dtype not in DTYPES.values():
            raise CheckpointError("cannot keep this tensor", got=str(value.dtype), where=reprlib.repr(name))
    check_finite(tensors, stored.task.name)
    tensors["keep"] = torch.frombuffer(bytearray(pack(stored.keep)), dtype=torch.uint8)
    ready = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}  # tied ones too
    content = {"kind": KIND, "task": stored.task.description, "identity": stored.identity}
    meta = {"gmn": json.dumps({"format": FORMAT, "content": content}, allow_nan=False)}
    return safetensors.torch.save(ready, metadata=meta)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: Path, parts: tuple[str, ...] = ("weight", "extra")) -> Stored:
    """What a task's file holds; of the tensors only the parts asked for.

    Raises:
        CheckpointError: if the file is missing, torn, too large, of another kind, or claims what it does not hold.
    """
    content = _content(_header(path), path)
    identity = {key: content["identity"][key] for key in IDENTITY if key in content["identity"]}
    task = to_task(content["task"], str(path))
    task = dataclasses.replace(task, status="planned", file="", sha256="", bytes=0, error="")
    tensors = _tensors(path, parts)
    keep = _mask(tensors.pop("keep", torch.empty(0)), identity.get("nodes"), path)
    groups = {part: {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{part}.")} for part in parts}
    return Stored(task, identity, keep, groups.get("weight", {}), groups.get("extra", {}))


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError that names the first tensor with a NaN or an Inf."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError("not finite (NaN or Inf)", got=reprlib.repr(name), where=where)


def size_of(path: Path) -> int:
    """Bytes of a file; CheckpointError if it is too large to be read."""
    return size_within(path, LARGEST)


def _mask(packed: Tensor, nodes: object, path: Path) -> Tensor:
    """[N] bool from the tensor of a file."""
    if type(nodes) is not int or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise CheckpointError("no sound mask", expected="uint8 [N / 8]", got=str(packed.dtype), where=str(path))
    try:
        return unpack([packed.numpy().tobytes()], nodes)[0]
    except GmnError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, once all it claims has room in the file."""
    if not path.is_file():
        raise CheckpointError("no such file", got=str(path))
    size = size_of(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
        _check_claims({name: entry for name, entry in header.items() if name != "__metadata__"}, size - 8 - length)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        got = to_text(error)
        raise CheckpointError("not a sound safetensors file", got=got, where=str(path)) from error
    return header


def _check_claims(entries: dict[str, dict[str, Any]], room: int) -> None:
    """ValueError if a tensor claims bytes that are not there, or if bytes are left over."""
    total = 0
    for name, entry in entries.items():
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        if not is_text(name) or entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor {reprlib.repr(name)} of type {reprlib.repr(entry['dtype'])}")
        if len(shape) > MOST_AXES or any(type(n) is not int or not 0 <= n <= LONGEST_AXIS for n in shape):
            raise ValueError(f"tensor {name!r} of shape {reprlib.repr(shape)}")
        claimed = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
        if type(start) is not int or type(end) is not int or not 0 <= start <= end <= room or claimed != end - start:
            raise ValueError(f"tensor {name!r} claims {claimed} bytes at {start!r} to {end!r} of {room}")
        total += claimed
    if total != room:
        raise ValueError(f"tensors of {total:,} bytes in {room:,}")


def _content(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the header says about the task, of the right form; its values are checked by `to_task`."""
    try:
        meta = json.loads(header["__metadata__"]["gmn"])
        content = meta["content"]
        sound = meta["format"] == FORMAT and content["kind"] == KIND
        sound = sound and isinstance(content["task"], dict) and isinstance(content["identity"], dict)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError("not a task of a zoo", expected=KIND, got=to_text(error), where=str(path)) from error
    if not sound:
        raise CheckpointError(
            "not a task of a zoo of this version", expected=f"{KIND}, format {FORMAT}", where=str(path)
        )
    return content


def _tensors(path: Path, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The mask and the tensors of some parts."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.partition(".")[0] in ("keep", *parts)]  # noqa: SIM118
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except UNREADABLE as error:
        got = to_text(error)
        raise CheckpointError("cannot read the file", got=got, where=str(path)) from error
    for name, value in tensors.items():
        if value.dtype == torch.bool and value.numel() and int(value.view(torch.uint8).max()) > 1:
            raise CheckpointError("neither true nor false", got=reprlib.repr(name), where=str(path))
    return tensors
