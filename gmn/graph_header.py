"""The header of a graph file: the structure of the graph as JSON in the metadata of a safetensors file."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from gmn.errors import CheckpointError, one_line
from gmn.graph import GraphSpec
from gmn.names import printable
from gmn.state_dict import UNREADABLE

FORMAT, VERSION = "gmn.graph", "1"
LARGEST = 50_000_000  # bytes of JSON; safetensors reads no header above 100 MB, in which each quote takes two


@dataclass(frozen=True)
class Header:
    """Everything in a graph file but its tensors.

    Attributes:
        spec: The structure.
        buffers: Shapes of the buffers in the file.
        copies: Blocks that are not in the file: they repeat a weight that has its home in another block.
        dtypes: Types of the parameters whose type is not that of their features.
        source: How to build the network: `network`, `num_classes`, `options`, ...; None if nobody said.
    """

    spec: GraphSpec
    buffers: dict[str, tuple[int, ...]]
    copies: tuple[int, ...]
    dtypes: dict[str, str]
    source: dict[str, Any] | None


_ADAPTER = TypeAdapter(Header)


def to_metadata(header: Header) -> dict[str, str]:
    """The header as safetensors metadata; CheckpointError if it is too large."""
    text = _ADAPTER.dump_json(header).decode()
    if len(text.encode()) > LARGEST:
        raise CheckpointError("the graph's structure is too large", expected=f"{LARGEST} bytes", got=str(len(text)))
    return {"format": FORMAT, "version": VERSION, "header": text}


def as_json(source: dict[str, Any] | None) -> dict[str, Any] | None:
    """The source as it will be read back; CheckpointError if it is no JSON."""
    try:
        return json.loads(json.dumps(source, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError("the source of a network must be JSON", got=str(error)) from error


def is_graph_file(path: str | Path) -> bool:
    """Whether a file says that it is a graph file, of whatever version."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except UNREADABLE:
        return False


def read_source(path: str | Path) -> dict[str, Any] | None:
    """How the network of a graph file is built, if the file says so; CheckpointError if it is no graph file."""
    return read(Path(path), tensors=False)[0].source


def read(path: Path, *, tensors: bool = True) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors; CheckpointError if the file is missing, torn, or of another kind or version."""
    if not path.is_file():
        raise CheckpointError("no such file", got=str(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _header(file.metadata() or {}, path)
            names = file.keys() if tensors else ()
            return header, {name: file.get_tensor(name) for name in names}
    except UNREADABLE as error:
        raise CheckpointError("cannot read the file", got=one_line(error), where=str(path)) from error


def _header(meta: dict[str, str], path: Path) -> Header:
    if meta.get("format") != FORMAT:
        got = reprlib.repr(meta["format"]) if "format" in meta else "no format"
        raise CheckpointError("not a graph file", expected=f"format {FORMAT}", got=got, where=str(path))
    if meta.get("version") != VERSION:
        got = reprlib.repr(meta.get("version"))
        raise CheckpointError("a graph file of another version", expected=VERSION, got=got, where=str(path))
    if len(text := meta.get("header", "")) > LARGEST:
        expected, got = f"{LARGEST:,} characters at most", f"{len(text):,}"
        raise CheckpointError("the graph's structure is too large", expected=expected, got=got, where=str(path))
    try:
        header = _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "header"
        expected, got = first["msg"].removeprefix("Input should be "), reprlib.repr(first["input"])
        raise CheckpointError(f"malformed graph file: {field}", expected=expected, got=got, where=str(path)) from None
    content = json.loads(text)
    if content != _ADAPTER.dump_python(header, mode="json") or not printable(content):  # pydantic takes unknown fields
        expected = "the fields of this version, no more and no less, printable texts"
        raise CheckpointError("malformed graph file: header", expected=expected, where=str(path))
    return header
