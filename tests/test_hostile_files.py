"""Files that a stranger wrote: recipes, weights, metanetworks, saved networks, graph files. (Zoos: test_zoo_hostile.)

* names of networks reach the builders of their libraries and nothing else there; options read and write no files
* what a file claims to hold is compared with what it holds before anything is allocated: a GmnError, at once
* types, bounds and texts that are not those of the format are refused by name
* a recipe cannot leave runs/ by its name, nor fill the memory with aliases
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seal import with_meta
from torch import nn

import gmn
from gmn import memory
from gmn.checkpoint import digest_of, load_json, load_metanetwork, save_json, save_metanetwork
from gmn.errors import CheckpointError, NetworkError, RecipeError
from gmn.jsonl import LARGEST, read_lines
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.network_source import parse_source, rebuild
from gmn.recipe import load_recipe
from gmn.recipe_yaml import MOST_BYTES
from gmn.room import SLACK, Room
from gmn.state_dict import read_state_dict
from gmn.subject import Choices, named

NETWORK: dict[str, Any] = {"num_classes": 4, "in_channels": 1, "options": {"width": 2, "shortcut": "B"}}


@pytest.fixture
def little_memory() -> Any:
    """At most a gigabyte more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def network() -> nn.Module:
    torch.manual_seed(0)
    return gmn.build_network("cifar.resnet8", **NETWORK).eval()


# -- names and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("torchvision.os.system", "torchvision.get_model", "torchvision.models.resnet18", "torchvision.__init__"),
        *(
            "timm.create_model",
            "timm.models.create_model",
            "timm.os",
            "timm./etc/passwd",
            "cifar.__class__",
            "os.system",
        ),
    ],
)
def test_names_reach_networks_only(name: str) -> None:
    with pytest.raises(NetworkError, match="unknown network"):
        gmn.build_network(name, num_classes=2)


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained_cfg": {"file": "evil.pth"}, "pretrained": True},
        {"pretrained_cfg_overlay": {"file": "evil.pth"}, "pretrained": True},
        {"cache_dir": "/somewhere"},
    ],
)
def test_options_of_timm_name_no_files(options: dict[str, Any]) -> None:
    with pytest.raises(NetworkError, match=r"options that read files past gmn: got (checkpoint_path|pretrained|cache)"):
        gmn.build_network("timm.resnet18", num_classes=2, options=options)


def test_whatever_a_library_raises_for_an_option_is_one_line() -> None:
    with pytest.raises(NetworkError, match="cannot build the network: got AttributeError"):
        gmn.build_network("timm.resnet18", num_classes=2, options={"block": "x"})


# -- weights -----------------------------------------------------------------------------------------------------------

HUNDRED_SQUARED = b"M\x10'"  # the number 10,000 in a pickle: as many are in the tensor
TWO_BILLION = b"J" + (2**31 - 1).to_bytes(4, "little")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", kind) as made:
        for name, data in records.items():
            made.writestr(name, change(name, data))


def test_numbers_that_a_state_dict_only_claims(tmp_path: Path, little_memory: None) -> None:
    state = {"weight": torch.ones(100, 100)}
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    torch.save(state, new)
    old.write_bytes(old.read_bytes().replace(HUNDRED_SQUARED, TWO_BILLION))
    rewritten(new, lambda name, data: data.replace(HUNDRED_SQUARED, TWO_BILLION) if name.endswith("pkl") else data)
    for path in (old, new):
        with pytest.raises(CheckpointError, match=r"cannot read the weights: got ValueError: tensors of 8,589,934,588"):
            gmn.load_weights(nn.Linear(100, 100, bias=False), path)


def test_a_text_that_a_state_dict_only_claims(tmp_path: Path, little_memory: None) -> None:
    path, short, long = tmp_path / "old.pt", b"X\x06\0\0\0weight", b"X\xff\xff\xff\x7fweight"  # 6 bytes, 2 GB
    torch.save({"weight": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    assert short in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(short, long))
    with pytest.raises(CheckpointError, match="cannot read the weights") as error:
        gmn.load_weights(nn.Linear(2, 2), path)
    assert "Memory" not in str(error.value)


def test_a_compressed_state_dict_is_refused(tmp_path: Path, little_memory: None) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(2**23)}, path)  # 32 MB of zeros in 33 kB
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="records that are compressed"):
        gmn.load_weights(nn.Linear(2, 2), path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_only_dense_real_tensors_are_weights(tmp_path: Path) -> None:
    model = nn.Linear(3, 3, bias=False)
    for value in (torch.eye(3).to_sparse(), torch.eye(3, dtype=torch.complex64), torch.eye(3, device="meta")):
        torch.save({"weight": value}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"cannot read the weights|got Tensor at 'weight'"):
            gmn.load_weights(model, tmp_path / "w.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, "new.pt")
    torch.save({"weight": Evil()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("plain.pkl").write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
    for name in ("new.pt", "old.pt", "plain.pkl"):
        with pytest.raises(CheckpointError, match="cannot read the weights"):
            gmn.load_weights(nn.Linear(2, 2), name)
    assert not Path("ran").exists()


HOLE = 2**42
"""Bytes that a file without content may have: more than any machine has memory."""


def test_files_of_tensors_that_are_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost who made them nothing, and nothing of them is read."""
    folder = saved(tmp_path / "saved")
    for name in ("w.safetensors", "w.pt"):
        shutil.copy(folder / "weights.safetensors", tmp_path / name)
    uses: dict[Path, Callable[[Path], object]] = {
        tmp_path / "w.safetensors": read_state_dict,
        tmp_path / "w.pt": read_state_dict,
        folder / "weights.safetensors": lambda _: gmn.load_model(folder),
    }
    for path, use in uses.items():
        os.truncate(path, HOLE)
        with pytest.raises(
            CheckpointError, match=r"too large for this machine: expected [\d,]+ bytes at most.*; in .*w"
        ):
            use(path)
    with pytest.raises(CheckpointError, match="too large for this machine"):
        digest_of(folder / "weights.safetensors")
    monkeypatch.setattr(memory, "machine_memory", lambda: None)
    with pytest.raises(CheckpointError, match="expected 34,359,738,368 bytes at most"):
        read_state_dict(tmp_path / "w.pt")


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(3 * 2**20 + 1))
    assert digest_of(tmp_path / "x") == hashlib.sha256(bytes(3 * 2**20 + 1)).hexdigest()


# -- metanetworks, saved networks, graph files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("metanetwork", "hidden", 10**6, "claims a network far larger than its weights"),
        ("metanetwork", "layers", 10**9, "claims a network far larger than its weights"),
        ("metanetwork", "hidden", "4", "hidden: Input should be a valid integer"),
        ("metanetwork", "node_ratio", float("nan"), "Out of range float"),
        ("metanetwork", "more", 1, "unknown fields"),
        ("metanetwork", "edge_kinds", {"1": 10**9}, "claims a network far larger than its weights"),
        ("layout", "columns", ["weight"], "1 columns"),
        ("layout", "kernels", "round", "kernels: Input should be"),
        ("layout", "defaults", "00000000", "defaults: Input should be a valid"),
        ("layout", "more", 1, "unknown fields"),
    ],
)
def test_metanetworks_are_what_they_say(
    tmp_path: Path, little_memory: None, section: str, field: str, value: Any, message: str
) -> None:
    path, layout = tmp_path / "m.safetensors", gmn.Layout(("weight", "bias"), (1.0, 0.0))
    save_metanetwork(path, MetaNetwork(MetaNetworkConfig(2, {"1": 1}, layers=1, hidden=4)), layout)
    assert load_metanetwork(path)[1] == layout
    with_meta(path, lambda meta: meta["content"][section].update({field: value}))
    with pytest.raises(CheckpointError, match=message) as error:
        load_metanetwork(path)
    assert str(path) in str(error.value)


def test_a_header_without_its_parts(tmp_path: Path) -> None:
    path, layout = tmp_path / "m.safetensors", gmn.Layout(("weight",), (1.0,))
    for change in (lambda meta: meta.pop("content"), lambda meta: meta.update(content=[]), lambda meta: meta.clear()):
        save_metanetwork(path, MetaNetwork(MetaNetworkConfig(1, {"1": 1}, layers=1, hidden=2)), layout)
        with pytest.raises(CheckpointError):
            load_metanetwork(with_meta(path, change))


def saved(folder: Path, **changes: Any) -> Path:
    gmn.save_model(folder, network(), {"name": "cifar.resnet8", **NETWORK}, input_shape=(1, 8, 8))
    content = load_json(folder / "model.json")
    save_json(folder / "model.json", content | {"network": content["network"] | changes})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 10**9}, "far larger than its weights: got a tensor of shape"),
        ({"in_channels": 10**9}, "far larger than its weights"),
        ({"options": {"width": 10**6}}, "far larger than its weights"),
        ({"name": "cifar.resnet600002", "options": {"width": 1}}, "far larger than its weights"),
        ({"num_classes": 10**30}, "cannot be rebuilt"),
        ({"options": None}, "cannot be rebuilt"),
        ({"options": [1]}, "cannot be rebuilt"),
        ({"more": 1}, "cannot be rebuilt"),
        ({"name": 3}, "cannot be rebuilt"),
    ],
)
def test_networks_are_not_larger_than_their_weights(
    tmp_path: Path, little_memory: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        gmn.load_model(saved(tmp_path / "saved", **changes))
    assert "saved" in str(error.value)


def test_a_graph_file_neither(little_memory: None) -> None:
    source = {"network": "timm.vit_tiny_patch16_224", "num_classes": 10, "options": {"depth": 10**5}}
    with pytest.raises(CheckpointError, match="far larger than its weights"):
        rebuild(parse_source(source, "g.safetensors"), "g.safetensors", size=1000)


def test_room_counts_what_is_made() -> None:
    with Room(0, "f"):
        generator, made = torch.Generator().manual_seed(0), torch.empty(3)
        assert torch.rand(3, generator=generator).shape == torch.linspace(0, 1, 3, out=made).shape == (3,)
        torch.empty(SLACK // 8 - 100, dtype=torch.float32)
        with pytest.raises(CheckpointError, match=r"far larger than its weights: got a tensor of shape \[\d+\]; in f"):
            torch.empty(SLACK // 8 + 100, dtype=torch.float32)
    assert torch.empty(SLACK // 4, dtype=torch.float32).numel() == SLACK // 4


@pytest.mark.parametrize(
    "shape", [[1, 10**6, 10**6], [1, -8, 8], "1,8,8", [1, 8.0, 8], [True, 8, 8], {}, [[1]], [1] * 9]
)
def test_the_size_of_an_input_is_checked(tmp_path: Path, shape: Any) -> None:
    folder = saved(tmp_path / "saved")
    save_json(folder / "model.json", load_json(folder / "model.json") | {"input_shape": shape})
    with pytest.raises(CheckpointError, match="malformed input_shape"):
        named(str(folder), Choices())


def test_json_of_any_depth_and_size(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a JSON file"):
        load_json(path)
    assert list(read_lines(path)) == []
    os.truncate(path, LARGEST + 1)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match="too large"):
        load_json(path)


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]),
        "a: &a {b: *a}",
        "seed: " + "[" * 2_000,
        "# " + "x" * MOST_BYTES,
        "network: !!python/object/apply:os.system [touch ran]",
        "network: !!python/name:os.system ''",
        "seed: " + "9" * 10_000,
    ],
    ids=["aliases", "loop", "deep", "long", "apply", "name", "number"],
)
def test_recipes_of_any_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"my\.yaml"):
        load_recipe("my.yaml")
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".hidden", "a\\b", "x\x1b[2J", "[b]", "x" * 101])
def test_the_name_of_a_run_stays_in_its_folder(name: str) -> None:
    with pytest.raises(RecipeError, match=r"bad 'name'|not valid YAML"):
        load_recipe("quickstart", [f"name={json.dumps(name)}"])
    assert load_recipe("quickstart", ["name=größer (2), v1.5"]).name == "größer (2), v1.5"
