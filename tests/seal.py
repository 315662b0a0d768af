"""Checksums as a stranger would set them: they tell damage, not malice, so what is behind them must hold alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from gmn.state_dict import checksum


def seal(path: Path) -> None:
    """Give a safetensors file of gmn the checksum of its content; the model.json beside it is told."""
    with_meta(path, lambda _: None)


def with_meta(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the JSON that a file of gmn has in its header, and seal it."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    meta = json.loads(header["__metadata__"]["gmn"])
    change(meta)
    if sealed := "sha256" in meta and "content" in meta:
        meta["sha256"] = checksum(safetensors.torch.load(whole), meta["content"])
    header["__metadata__"]["gmn"] = json.dumps(meta)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    if sealed and (about := path.with_name("model.json")).exists():
        about.write_text(json.dumps(json.loads(about.read_text()) | {"weights_sha256": meta["sha256"]}))
    return path
