"""What is tried: for every kind of file whole ones that gmn writes, how they are changed, and what reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mutate
import resumed
import torch
from changes import BYTES, HEADER, JSON, LATER, Kind, inside, json_lines, sealed, several, tree_of_yaml, written
from torch import Tensor, nn

import gmn
from gmn import cli, cost_cli
from gmn.checkpoint import save_json, save_metanetwork
from gmn.graph_file import save_graph
from gmn.jsonl import append_line
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.recipe import dump_recipe, load_recipe
from gmn.run_networks import best
from gmn.stages import EVENT
from gmn.subject import Choices, find
from gmn.zoo import Task, Zoo
from gmn.zoo_format import Stored, encode, read

__all__ = ["KINDS", "LATER", "broken"]

NETWORK: dict[str, Any] = {"num_classes": 4, "in_channels": 1, "options": {"width": 2, "shortcut": "B"}}
NAME = "cifar.resnet8"


def _network() -> nn.Module:
    torch.manual_seed(0)
    return gmn.build_network(NAME, **NETWORK).eval()


# -- recipes -----------------------------------------------------------------------------------------------------------


def _make_recipes(folder: Path) -> None:
    for name in ("quickstart", "graph-mask-voting"):
        (folder / f"{name}-own.yaml").write_text(dump_recipe(load_recipe(name)))
    (folder / "short-own.yaml").write_text("base: quickstart\nname: short\nseed: 3\nnetwork: {name: cifar.resnet20}\n")
    also = "{wide: {data: {size: 16}, network: {options: {width: 8}}, pruner_reg: 0.5}}"
    (folder / "also-own.yaml").write_text(f"base: quickstart\ndata_models: {{also: {also}}}\n")


def _use_recipes(folder: Path) -> None:
    for path in folder.iterdir():
        again = folder / "again.yaml"
        with several():
            recipe = load_recipe(path)
            again.write_text(dump_recipe(recipe))
            assert load_recipe(again) == recipe
        again.unlink(missing_ok=True)


# -- graphs, metanetworks, weights, saved networks ---------------------------------------------------------------------


def _make_graph(folder: Path) -> None:
    graph = gmn.to_graph(_network(), torch.zeros(1, 1, 8, 8))
    save_graph(folder / "graph.safetensors", graph, source={"network": NAME, **NETWORK})


def _use_graph(folder: Path) -> None:
    find(str(folder / "graph.safetensors"), Choices()).graph.summary()


def _make_metanetwork(folder: Path) -> None:
    graph = gmn.to_graph(_network(), torch.zeros(1, 1, 8, 8))
    kinds = graph.spec.edge_kinds
    config = MetaNetworkConfig(node_features=len(graph.spec.columns), edge_kinds=kinds, layers=1, hidden=4)
    layout = gmn.Layout(graph.spec.columns, tuple(graph.spec.defaults))
    save_metanetwork(folder / "meta.safetensors", MetaNetwork(config), layout)


def _use_metanetwork(folder: Path) -> None:
    learnt = gmn.load(folder / "meta.safetensors")
    assert isinstance(learnt, gmn.Meta)
    learnt.rewrite(_network(), torch.zeros(1, 1, 8, 8))


def _make_weights(folder: Path) -> None:
    state = _network().state_dict()
    torch.save({"state_dict": state, "epoch": 3}, folder / "new.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)


def _use_weights(folder: Path) -> None:
    for path in folder.iterdir():
        with several():
            gmn.load_weights(_network(), path)


def _make_model(folder: Path) -> None:
    gmn.save_model(folder, _network(), {"name": NAME, **NETWORK}, input_shape=[1, 8, 8])


def _use_model(folder: Path) -> None:
    find(str(folder), Choices())
    gmn.load_weights(_network(), folder / "weights.safetensors")


# -- zoos --------------------------------------------------------------------------------------------------------------

ABOUT: dict[str, Any] = {"nodes": 21, "fingerprint": "abc", "network": {"name": NAME}, "ratio": 0.9}


def _found(number: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    weights = {"conv.weight": torch.full((4, 3, 3, 3), float(number)), "steps": torch.tensor(number)}
    return torch.arange(21) % 2 > 0, weights, {"prototypes": torch.ones(2, 5)}


def _task(number: int) -> Task:
    return Task(f"task-{number}", (number, 9), (f"class {number}", "nine"), metrics={"accuracy": 0.5}, flops=1e6)


def _make_task(folder: Path) -> None:
    keep, weights, extra = _found(1)
    identity = {key: ABOUT[key] for key in ("fingerprint", "nodes", "network")}
    (folder / "t.safetensors").write_bytes(encode(Stored(_task(1), identity, keep, weights, extra)))


def _use_task(folder: Path) -> None:
    read(folder / "t.safetensors")
    Zoo.create(folder / "zoo", ABOUT).add_file(folder / "t.safetensors")


def _make_index(folder: Path) -> None:
    zoo = Zoo.create(folder / "zoo", ABOUT)
    for number in range(3):
        zoo.add(_task(number), *_found(number))
    zoo.plan([_task(4)])


def _use_index(folder: Path) -> None:
    zoo = Zoo.open(folder / "zoo")
    names = [task.name for task in zoo.tasks()]
    for use in (zoo.verify, zoo.counts, lambda: zoo.masks(names), lambda: list(zoo.load_all()), lambda: zoo.claim("a")):
        with several():
            use()
    zoo.add(_task(7), *_found(7))


# -- run folders -------------------------------------------------------------------------------------------------------


def _make_run(folder: Path) -> None:
    measured = {"validation_accuracy": 0.9, "test_accuracy": 0.8, "flops": 5e5, "parameters": 900, "speed_up": 2.0}
    rows = ("metanetwork", "direct")
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart")))
    save_json(folder / "environment.json", {"python": "3", "packages": {"gmn": "1"}})
    report = {
        **{"recipe": "quickstart", "seen": True, "speed_up": 2.0, "validation_images": 10, "test_images": 10},
        **{"initial_speed_up": 1.2, "finetune_images": 100, "base": measured, "select": [], "meta_train": []},
        "results": [{"row": row, "seed": 0, **measured} for row in rows],
        "latency": dict.fromkeys(("base", *rows), 1.5),
        "curve": {"without": [[1.0, 0.9], [2.0, 0.5]], "with metanetwork": [[1.0, 0.9], [2.0, 0.7]]},
    }
    save_json(folder / "report.json", report)
    gmn.save_model(folder / "models" / "direct-seed0", _network(), {"name": NAME, **NETWORK}, input_shape=[1, 8, 8])
    for row in rows:
        labels = {
            "event": EVENT,
            "row": row,
            "seed": 0,
            "speed_up": 2.0,
            "seconds": 2.0,
            "peak_mb": 9.0,
            "cuda_mb": 0.0,
        }
        for stage in ("rewriting", "pruning", "last fine-tuning"):
            append_line(folder / "metrics.jsonl", {**labels, "stage": stage})


def _use_run(folder: Path) -> None:
    for use in (
        lambda: cli.report(folder),
        lambda: cost_cli.cost(folder, networks="1,5", output=None),
        lambda: find(str(best(folder)), Choices()),
    ):
        with several():
            use()


KINDS = {
    "recipes": Kind(
        _make_recipes,
        (("-own.yaml", BYTES), ("-own.yaml", written(mutate.yaml_of)), ("-own.yaml", written(tree_of_yaml))),
        _use_recipes,
    ),
    "graphs": Kind(
        _make_graph,
        ((".safetensors", BYTES), ("", HEADER), ("", inside("header")), ("", inside("header"))),
        _use_graph,
    ),
    "metanetworks": Kind(
        _make_metanetwork,
        (("", BYTES), ("", HEADER), ("", sealed(HEADER)), ("", inside("gmn")), ("", sealed(inside("gmn")))),
        _use_metanetwork,
    ),
    "weights": Kind(
        _make_weights, ((".pt", BYTES), ("new.pt", written(mutate.zip_of)), ("old.pt", BYTES)), _use_weights
    ),
    "networks": Kind(
        _make_model,
        (("model.json", BYTES), ("model.json", JSON), ("model.json", JSON), (".safetensors", sealed(HEADER))),
        _use_model,
    ),
    "zoo files": Kind(_make_task, (("", BYTES), ("", HEADER), ("", inside("gmn"))), _use_task),
    "indexes": Kind(_make_index, (("index.sqlite", BYTES), ("index.sqlite", mutate.index_of)), _use_index),
    "runs": Kind(
        _make_run,
        (("report.json", JSON), ("report.json", BYTES), ("metrics.jsonl", written(json_lines)), ("model.json", JSON)),
        _use_run,
    ),
}


KINDS |= resumed.KINDS


def broken(folder: Path, kind: Kind, rng: random.Random) -> None:
    """Change one file of a folder."""
    end, change = rng.choice(kind.changes)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(end))
    change(rng.choice(files), rng)
