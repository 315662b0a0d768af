"""gmn: make trained neural networks smaller.

graph = gmn.to_graph(model, example_inputs)      # any nn.Module
model2 = gmn.to_model(graph)                     # the exact inverse
meta = gmn.load("runs/quickstart")               # a saved metanetwork
pruned = gmn.prune(model, example_inputs, meta=meta, speed_up=2.0)
"""

from __future__ import annotations

from gmn.api import Meta, Result, load, prune
from gmn.builder import Layout
from gmn.checkpoint import load_model, save_model
from gmn.convert import Call, Converter, Flow, register_converter, register_function, to_graph, to_model
from gmn.cost import cost, latency
from gmn.criteria import Importance
from gmn.data import Augment, Data, load_data
from gmn.errors import GmnError
from gmn.fit import evaluate, fit, recalibrate
from gmn.graph import GraphSpec, NetworkGraph
from gmn.groups import KeepMask, couplings
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.networks import build_network, load_weights
from gmn.settings import Criterion, Fit, Prune

__version__ = "0.1.0"

__all__ = [
    *("Augment", "Call", "Converter", "Criterion", "Data", "Fit", "Flow", "GmnError", "GraphSpec", "Importance"),
    *("KeepMask", "Layout", "Meta", "MetaNetwork", "MetaNetworkConfig", "NetworkGraph", "Prune", "Result"),
    *("build_network", "cost", "couplings", "evaluate", "fit", "latency", "load", "load_data", "load_model"),
    *("load_weights", "prune", "recalibrate", "register_converter", "register_function", "save_model"),
    *("to_graph", "to_model"),
]
