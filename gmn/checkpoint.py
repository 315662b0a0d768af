"""Saving and loading: safetensors and JSON, never a pickle; written under a temporary name, then renamed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gmn.builder import Layout
from gmn.distributed import leader_writes
from gmn.errors import CheckpointError, GmnError
from gmn.heads import head_counts, restore_heads
from gmn.metanetwork import RUNTIME, MetaNetwork, MetaNetworkConfig
from gmn.networks import build_network
from gmn.surgery import resize

FORMAT = 1  # raised when a reader of older files would misread newer ones


@leader_writes
def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name beside `path`, flush to disk, then rename: never a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors leaves files that nobody else may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    save_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    save_bytes(path, text.encode())


def save_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, write)


def load_json(path: Path) -> Any:
    """Read JSON; CheckpointError if the file is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError("no such file", got=str(path)) from error
    except ValueError as error:
        raise CheckpointError("not a JSON file", got=str(error), where=str(path)) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: Any) -> None:
    """One safetensors file with a JSON header `meta`."""
    ready = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header = {"gmn": json.dumps({"format": FORMAT, "content": meta})}
    write_atomic(path, lambda temporary: safetensors.torch.save_file(ready, temporary, metadata=header))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save_tensors` wrote; CheckpointError if the file is missing, torn, or of another kind."""
    if not path.is_file():
        raise CheckpointError("no such file", got=str(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("gmn", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError("cannot read the file", got=str(error).split("\n")[0], where=str(path)) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError("not a gmn file of this version", expected=f"format {FORMAT}", where=str(path))
    return tensors, header["content"]


# -- optimizer ---------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors."""
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the state of `optimizer_tensors` back; hyperparameters stay those of the optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# -- metanetworks ------------------------------------------------------------------------------------------------------


def save_metanetwork(path: Path, metanetwork: MetaNetwork, layout: Layout, **more: Tensor) -> None:
    """A metanetwork with the layout its graphs must have; `more` tensors (an optimizer's) ride along."""
    config = {key: value for key, value in dataclasses.asdict(metanetwork.config).items() if key not in RUNTIME}
    meta = {"metanetwork": config, "layout": dataclasses.asdict(layout)}
    weights = {f"metanetwork.{name}": value for name, value in metanetwork.state_dict().items()}
    save_tensors(path, weights | more, meta)


def load_metanetwork(path: Path) -> tuple[MetaNetwork, Layout, dict[str, Tensor]]:
    """A metanetwork in eval mode, its layout, and all tensors of the file."""
    tensors, meta = load_tensors(path)
    try:
        metanetwork = MetaNetwork(MetaNetworkConfig(**meta["metanetwork"]))
        layout = meta["layout"]
        layout = Layout(**{**layout, "columns": tuple(layout["columns"]), "defaults": tuple(layout["defaults"])})
        prefix = "metanetwork."
        metanetwork.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError("not a saved metanetwork", got=str(error).split("\n")[0], where=str(path)) from error
    return metanetwork.eval(), layout, tensors


# -- networks ----------------------------------------------------------------------------------------------------------


def save_model(folder: Path, model: nn.Module, network: dict[str, Any], **facts: Any) -> None:
    """A network, pruned or not, as `weights.safetensors` and `model.json`, which says how to rebuild it.

    Args:
        folder: Where to; created.
        model: The network.
        network: `name`, `num_classes`, `in_channels` and `options` for `gmn.networks.build_network`.
        facts: Anything else worth keeping, such as accuracy and input shape; JSON.
    """
    save_tensors(folder / "weights.safetensors", dict(model.state_dict()), {"kind": "model"})
    content = {"format": FORMAT, "network": network, "heads": head_counts(model), **facts}
    save_json(folder / "model.json", content)  # last: a folder with this file is whole


def load_model(folder: str | Path) -> nn.Module:
    """A saved network in eval mode: built by name, cut to the sizes of its weights, filled with them.

    Raises:
        CheckpointError: if a file is missing, torn, or does not fit the network.
    """
    folder = Path(folder)
    content = load_json(folder / "model.json")
    tensors, _ = load_tensors(folder / "weights.safetensors")
    try:
        network = dict(content["network"])
        options = {k: v for k, v in network.pop("options", {}).items() if k not in ("weights", "pretrained")}
        with torch.random.fork_rng(devices=[]):
            model = build_network(**network, options=options)
        resize(model, {name: tensor.shape for name, tensor in tensors.items()}).load_state_dict(tensors)
        restore_heads(model, dict(content.get("heads", {})))
    except (KeyError, TypeError, RuntimeError) as error:
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[-1].strip()}"
        raise CheckpointError("the saved network cannot be rebuilt", got=message, where=str(folder)) from error
    except GmnError as error:
        raise CheckpointError("the saved network cannot be rebuilt", got=str(error), where=str(folder)) from error
    return model.eval()
