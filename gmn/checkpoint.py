"""Saving and loading: safetensors and JSON, never a pickle; written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from gmn.builder import Layout
from gmn.distributed import leader_writes
from gmn.errors import MALFORMED, CheckpointError, GmnError, naming, of_machine, one_line
from gmn.heads import head_counts, restore_heads
from gmn.jsonl import checked, refuse_large
from gmn.memory import refuse_too_large
from gmn.metanetwork import RUNTIME, MetaNetwork, MetaNetworkConfig
from gmn.networks import build_network, without_fetching
from gmn.permission import refuse_code
from gmn.processes import temporary_name
from gmn.progress import say
from gmn.room import Room
from gmn.state_dict import UNREADABLE, checksum
from gmn.surgery import resize

Stated = TypeVar("Stated")

WEIGHTS = "weights.safetensors"
# of model.json, beside what was measured
ABOUT_MODELS = ("network", "format", "heads", "input_shape", "weights_sha256")
FORMAT = 1  # raised when a reader of older files would misread newer ones


@leader_writes
def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name beside `path`, flush to disk, then rename: never a half-written file.

    The folder is flushed too: after a power cut either the old file is there or the new one.

    Raises:
        OSError: with the file's name, if the disk is full, read-only or broken; the old file is whole then.
    """
    temporary = temporary_name(path)
    try:
        with naming(path):
            make_folder(path.parent)
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors leaves files that nobody else may read
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut does not take them away."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def digest_of(path: Path) -> str:
    """The SHA-256 of a file of tensors as it lies there, a piece at a time; CheckpointError if it is far too large."""
    refuse_too_large(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_json(path: Path) -> Any:
    """Read JSON; CheckpointError if the file is missing, too large or torn."""
    try:
        refuse_large(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError("no such file", got=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not a JSON file", got=str(error), where=str(path)) from error


def load_checked(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """A mapping in JSON that has all these fields, each of its type; CheckpointError as `load_json`, or by field."""
    return checked(load_json(path), fields, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: Any) -> str:
    """One safetensors file with a JSON header `meta` and a checksum over all of it, which is returned."""
    ready = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    digest = checksum(ready, meta)
    header = {"gmn": json.dumps({"format": FORMAT, "content": meta, "sha256": digest})}
    save_bytes(path, safetensors.torch.save(ready, metadata=header))
    return digest


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save_tensors` wrote; CheckpointError if the file is missing, torn, changed, or of another kind."""
    tensors, meta, _ = _load(path)
    return tensors, meta


def load_sound(path: Path, else_: str = "it is made again") -> tuple[dict[str, Tensor], Any] | None:
    """As `load_tensors`, None if there is no such file; of a damaged one a line is said, with what is done instead."""
    if not path.is_file():
        return None
    try:
        return load_tensors(path)
    except CheckpointError as error:
        say(f"warning: {error}; {else_}")
        return None


def _load(path: Path) -> tuple[dict[str, Tensor], Any, str | None]:
    """Tensors, header and checksum of a file; files of an older gmn have no checksum."""
    if not path.is_file():
        raise CheckpointError("no such file", got=str(path))
    refuse_too_large(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("gmn", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except UNREADABLE as error:
        if of_machine(error):
            raise
        raise CheckpointError("cannot read the file", got=one_line(error), where=str(path)) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or "content" not in header:
        raise CheckpointError("not a gmn file of this version", expected=f"format {FORMAT}", where=str(path))
    stated, meta = header.get("sha256"), header.get("content")
    if stated is not None and stated != (found := checksum(tensors, meta)):
        expected, got = f"{str(stated)[:16]}...", f"{found[:16]}..."
        raise CheckpointError("the file has another checksum", expected=expected, got=got, where=str(path))
    return tensors, meta, stated


# -- optimizer ---------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors."""
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


HELD = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}
"""What an optimizer keeps of a parameter; `step` is one number, all else has the parameter's shape."""


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the state of `optimizer_tensors` back; hyperparameters stay those of the optimizer.

    Raises:
        ValueError: if the state is not one of this optimizer's parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            shape = torch.Size() if key == "step" else parameters[int(index)].shape
            sound = value.is_floating_point() and (key != "step" or float(value) >= 0)
            if int(index) < 0 or value.shape != shape or not sound:
                raise ValueError(f"{name}: {value.dtype} {list(value.shape)} instead of {list(shape)}")
            state.setdefault(int(index), {})[key] = value
    held = HELD[type(optimizer).__name__]
    if wrong := next((sorted(held ^ own.keys()) for own in state.values() if own.keys() != held), None):
        raise ValueError(f"the optimizer's {', '.join(wrong)}")
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
    prefix = "metanetwork."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        config, layout = stated(MetaNetworkConfig, meta["metanetwork"]), stated(Layout, meta["layout"])
        if not len(layout.columns) == len(layout.defaults) == config.node_features:
            raise ValueError(f"{len(layout.columns)} columns, {len(layout.defaults)} defaults")
        with Room(_bytes(own), str(path)):
            metanetwork = MetaNetwork(config)
        metanetwork.load_state_dict(own)
    except MALFORMED as error:
        raise CheckpointError("not a saved metanetwork", got=one_line(error), where=str(path)) from error
    return metanetwork.eval(), layout, tensors


def stated(kind: type[Stated], content: dict[str, Any]) -> Stated:
    """A dataclass from what a file says, every field of its type and finite; ValueError otherwise."""
    if unknown := content.keys() - {known.name for known in dataclasses.fields(cast(Any, kind))}:
        raise ValueError(f"unknown fields {reprlib.repr(sorted(unknown))}")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# -- networks ----------------------------------------------------------------------------------------------------------


def save_model(folder: Path, model: nn.Module, network: dict[str, Any], **facts: Any) -> None:
    """A network, pruned or not, as `weights.safetensors` and `model.json`, which says how to rebuild it.

    Args:
        folder: Where to; created.
        model: The network.
        network: `name`, `num_classes`, `in_channels` and `options` for `gmn.networks.build_network`.
        facts: Anything else worth keeping, such as accuracy and input shape; JSON.
    """
    digest = save_tensors(folder / WEIGHTS, dict(model.state_dict()), {"kind": "model"})
    content = {"format": FORMAT, "network": network, "heads": head_counts(model), "weights_sha256": digest, **facts}
    save_json(folder / "model.json", content)  # last: a folder with this file is whole


def saved_facts(folder: Path) -> dict[str, Any] | None:
    """What `model.json` says of a network that is whole to its last byte, or None; of a damaged one a line is said."""
    if not (folder / "model.json").is_file():
        return None
    try:
        return _saved(folder)[0]
    except CheckpointError as error:
        say(f"warning: {error}; it is made again")
        return None


def _saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `model.json` says and the weights; CheckpointError if one is missing or torn, or of another network."""
    content = load_json(folder / "model.json")
    tensors, _, digest = _load(folder / WEIGHTS)
    if not isinstance(content, dict) or content.get("weights_sha256", digest) != digest:
        raise CheckpointError("model.json is not of these weights", where=str(folder))
    return content, tensors


def load_model(folder: str | Path) -> nn.Module:
    """A saved network in eval mode: built by name, cut to the sizes of its weights, filled with them.

    A function that the file names, `package.module:function`, is refused outside of `gmn.allow_code()`.

    Raises:
        CheckpointError: if a file is missing, torn, or does not fit the network; if code is not allowed.
    """
    folder = Path(folder)
    content, tensors = _saved(folder)
    try:
        network = dict(content["network"])
        refuse_code(network.get("name"), "network.name", str(folder / "model.json"), CheckpointError)
        options = without_fetching(network.pop("options", {}))
        with torch.random.fork_rng(devices=[]), Room(_bytes(tensors), str(folder)):
            model = build_network(**network, options=options)
        resize(model, {name: tensor.shape for name, tensor in tensors.items()}).load_state_dict(tensors)
        restore_heads(model, dict(content.get("heads", {})))
    except MALFORMED as error:
        if of_machine(error):
            raise
        message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1].strip()}"
        raise CheckpointError("the saved network cannot be rebuilt", got=message, where=str(folder)) from error
    except CheckpointError:
        raise
    except GmnError as error:
        raise CheckpointError("the saved network cannot be rebuilt", got=str(error), where=str(folder)) from error
    return model.eval()
