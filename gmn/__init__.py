"""gmn: make trained neural networks smaller.

graph = gmn.to_graph(model, example_inputs)      # any nn.Module
model2 = gmn.to_model(graph)                     # the exact inverse
meta = gmn.load("runs/quickstart")               # a saved metanetwork, or a zoo of tasks that vote
pruned = gmn.prune(model, example_inputs, meta=meta, speed_up=2.0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmn.api import Meta, Result, Voters, load, prune
    from gmn.builder import Layout
    from gmn.checkpoint import load_model, save_model
    from gmn.convert import to_graph, to_model
    from gmn.costs import cost, latency
    from gmn.criteria import Importance
    from gmn.data import Augment, Data, load_data
    from gmn.errors import GmnError
    from gmn.export import export_model
    from gmn.flow import Flow
    from gmn.gradients import loss_gradients
    from gmn.graph import GraphSpec, NetworkGraph
    from gmn.graph_file import load_graph, save_graph
    from gmn.groups import KeepMask, couplings
    from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
    from gmn.networks import build_network, load_weights
    from gmn.permission import allow_code
    from gmn.rules import Call, Converter, register_converter, register_function
    from gmn.scores import Score, register_criterion
    from gmn.settings import Criterion, Fit, Prune, Ranking
    from gmn.sparse_format import semi_structured
    from gmn.training import evaluate, fit, recalibrate
    from gmn.weight_masks import WeightMask
    from gmn.zoo import Zoo

__version__ = "0.1.0"

__all__ = [
    "Augment",
    "Call",
    "Converter",
    "Criterion",
    "Data",
    "Fit",
    "Flow",
    "GmnError",
    "GraphSpec",
    "Importance",
    "KeepMask",
    "Layout",
    "Meta",
    "MetaNetwork",
    "MetaNetworkConfig",
    "NetworkGraph",
    "Prune",
    "Ranking",
    "Result",
    "Score",
    "Voters",
    "WeightMask",
    "Zoo",
    "allow_code",
    "build_network",
    "cost",
    "couplings",
    "evaluate",
    "export_model",
    "fit",
    "latency",
    "load",
    "load_data",
    "load_graph",
    "load_model",
    "load_weights",
    "loss_gradients",
    "prune",
    "recalibrate",
    "register_converter",
    "register_criterion",
    "register_function",
    "save_graph",
    "save_model",
    "semi_structured",
    "to_graph",
    "to_model",
]

# where each name lives: loaded on first use, so that `gmn --help` need not wait for torch
_HOMES = {
    name: f"gmn.{home}"
    for home, names in {
        "api": "Meta Result Voters load prune",
        "builder": "Layout",
        "checkpoint": "load_model save_model",
        "convert": "to_graph to_model",
        "costs": "cost latency",
        "criteria": "Importance",
        "data": "Augment Data load_data",
        "errors": "GmnError",
        "export": "export_model",
        "flow": "Flow",
        "gradients": "loss_gradients",
        "graph": "GraphSpec NetworkGraph",
        "graph_file": "load_graph save_graph",
        "groups": "KeepMask couplings",
        "metanetwork": "MetaNetwork MetaNetworkConfig",
        "networks": "build_network load_weights",
        "permission": "allow_code",
        "rules": "Call Converter register_converter register_function",
        "scores": "Score register_criterion",
        "settings": "Criterion Fit Prune Ranking",
        "sparse_format": "semi_structured",
        "training": "evaluate fit recalibrate",
        "weight_masks": "WeightMask",
        "zoo": "Zoo",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gmn' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
