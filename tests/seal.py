"""Checksums as a stranger would set them: they tell damage, not malice, so what is behind them must hold alone."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from gmn.checkpoint import checksum


def seal(path: Path) -> None:
    """Give a safetensors file of gmn the checksum of its content; the model.json beside it is told."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    meta = json.loads(header["__metadata__"]["gmn"])
    meta["sha256"] = checksum(safetensors.torch.load(whole), meta["content"])
    header["__metadata__"]["gmn"] = json.dumps(meta)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    if (about := path.with_name("model.json")).exists():
        about.write_text(json.dumps(json.loads(about.read_text()) | {"weights_sha256": meta["sha256"]}))
