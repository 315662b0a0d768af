"""Network to graph and back: `to_graph`, `to_model` (GMN, section 3.1)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from gmn.builder import Layout
from gmn.errors import ConversionError
from gmn.graph import NetworkGraph
from gmn.reader import OnUnknown, read
from gmn.rules import load_rules, rule_for
from gmn.trace import clone, trace


def layouts() -> dict[str, Layout]:
    """The layouts by name: `generic` and those of the paper."""
    presets: dict[str, Layout] = importlib.import_module("gmn.converters.layouts").LAYOUTS
    return presets


def to_graph(
    model: nn.Module,
    example_inputs: Any,
    *,
    layout: str | Layout = "generic",
    on_unknown: OnUnknown = "keep",
) -> NetworkGraph:
    """The graph of a network; `to_model` is the exact inverse.

    Args:
        model: Any module; it is run once on the example inputs and left as it was.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments.
        layout: Name of a layout (`generic`, `cnn`, `resnet56`, `resnet50`, `vgg19`, `vit`) or a `Layout`.
        on_unknown: What to do with parameters that have no rule: `keep` (they are carried through untouched, listed
            in `graph.summary()`, and the channels around them are never removed) or `error`.

    Raises:
        ConversionError: if the network does not run on the inputs, a weight is NaN or infinite, or, with
            `on_unknown="error"`, a parameter has no rule.
    """
    load_rules()
    if isinstance(layout, str):
        if layout not in layouts():
            raise ConversionError("unknown layout", expected=", ".join(layouts()), got=repr(layout))
        layout = layouts()[layout]
    record = trace(model, example_inputs, lambda module: rule_for(module) is not None)
    return read(model, record, layout, on_unknown)


def to_model(graph: NetworkGraph) -> nn.Module:
    """The network of a graph: a copy of the origin with the trainable parameters taken from the graph.

    Running statistics, and whatever has no place in the graph, stay the origin's.

    Raises:
        ConversionError: if the graph was loaded without its network.
    """
    if graph.template is None:
        raise ConversionError("the graph has no network to copy", hint="make it with gmn.to_graph")
    model = clone(graph.template)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in graph.to_state_dict().items():
            parameters[name].copy_(value)
    return model
