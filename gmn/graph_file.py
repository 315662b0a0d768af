"""A graph in one `.safetensors` file: its numbers, its structure, and what its network carries beside them.

Tensors: `nodes`, `edges.INDEX.BLOCK`, `carried.PARAMETER`, `buffer.BUFFER`; the structure is JSON in the header. The
file and a freshly built network give the first network back, bit for bit. Nothing that is read is trusted.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from gmn.checkpoint import write_atomic
from gmn.errors import CheckpointError, ConversionError
from gmn.graph import GraphSpec, NetworkGraph
from gmn.graph_copies import check_copies, is_copy, repeats, same_bits, with_copies
from gmn.graph_header import Header, as_json, is_graph_file, read, read_source, to_metadata
from gmn.spec_check import Shape, check_spec
from gmn.trace import clone

__all__ = ["is_graph_file", "load_graph", "read_source", "same_bits", "save_graph"]

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def save_graph(path: str | Path, graph: NetworkGraph, *, source: dict[str, Any] | None = None) -> None:
    """Write a graph and what its network carries, whole or not at all.

    Args:
        path: The file; replaced if it is there.
        graph: A graph with its network.
        source: How to build the network, as JSON: `{"network": "timm.resnet18", "num_classes": 10, "options": {}}`.

    Raises:
        CheckpointError: if the graph has no network or does not fit it, or the source is not JSON.
    """
    path, network = Path(path), graph.template
    if network is None:
        raise CheckpointError("the graph has no network", hint="load it with load_graph(path, model)", where=str(path))
    buffers, parameters = _buffers(network, graph.spec), dict(network.named_parameters())
    _check(graph, shapes_of(buffers), (), path)
    _check_network(network, graph.spec, shapes_of(buffers), path)
    state = graph.to_state_dict()
    copies = tuple(i for i, slot in repeats(graph.spec).items() if is_copy(graph, slot, state))
    dtypes = {name: _name(parameters[name]) for name in state if parameters[name].dtype != state[name].dtype}
    header = Header(graph.spec, shapes_of(buffers), copies, dtypes, as_json(source))
    edges = {name: graph.edge_features[index] for index, name in _edges(header).items()}
    carried = {f"carried.{name}": parameters[name] for name in graph.spec.carried}
    _write(path, {"nodes": graph.node_features, **edges, **carried, **_prefixed("buffer.", buffers)}, header)


def load_graph(path: str | Path, model: nn.Module | None = None) -> NetworkGraph:
    """Read a graph.

    Args:
        path: The file.
        model: A network built like the one that the graph was made from. It is left as it is: a copy of it, filled
            with the numbers of the file, becomes the graph's template. Without it the graph has none.

    Raises:
        CheckpointError: if the file is missing, torn or of another kind, or the network does not fit.
    """
    path = Path(path)
    header, tensors = read(path)
    _check_tensors(header, tensors, path)
    graph = _graph(header, tensors, path)
    if model is None:
        return graph
    _check_network(model, graph.spec, header.buffers, path)
    state = {n: t.to(DTYPES[header.dtypes[n]]) if n in header.dtypes else t for n, t in graph.to_state_dict().items()}
    others = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(("carried.", "buffer."))}
    return NetworkGraph(graph.spec, graph.node_features, graph.edge_features, _filled(model, state | others, path))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


# -- the network -------------------------------------------------------------------------------------------------------


def _buffers(model: nn.Module, spec: GraphSpec) -> dict[str, Tensor]:
    """What a state dict holds of the buffers, and what the graph does; the network's code makes the others."""
    saved = model.state_dict().keys() | {slot.param for slot in spec.node_slots if not slot.trainable}
    return {name: value for name, value in model.named_buffers() if name in saved}


def _check_network(model: nn.Module, spec: GraphSpec, buffers: Mapping[str, Shape], path: Path) -> None:
    parameters = shapes_of(dict(model.named_parameters()))
    _expect("parameters", parameters, spec.shapes | spec.carried, path)
    _expect("buffers", shapes_of(_buffers(model, spec)), buffers, path)


def _expect(field: str, own: Mapping[str, object], graph: Mapping[str, object], path: Path) -> None:
    for name in [*graph, *own]:
        if own.get(name) != graph.get(name):
            raise CheckpointError(
                f"the graph is of another network: {field}",
                expected=f"{name} of shape {graph[name]}" if name in graph else f"no {name}",
                got=f"shape {own[name]}" if name in own else "none",
                where=str(path),
            )


def _filled(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A copy of the network with the numbers and types of the file; parameters that are tied stay tied."""
    filled = clone(model)
    for name, tensor in [*filled.named_parameters(), *filled.named_buffers()]:
        if name not in state:
            continue
        own, got = tensor.dtype, state[name].dtype
        if own != got and not (own.is_floating_point and got.is_floating_point):  # half for single is fine
            message = f"the graph is of another network: type of {name}"
            raise CheckpointError(message, expected=str(own), got=str(got), where=str(path))
        tensor.grad = None
        tensor.data = state[name].detach().clone(memory_format=torch.contiguous_format)
    return filled


def _name(parameter: Tensor) -> str:
    name = str(parameter.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError("cannot save a parameter of this type", expected=", ".join(DTYPES), got=name)
    return name


# -- the file ----------------------------------------------------------------------------------------------------------


def _edges(header: Header) -> dict[int, str]:
    """Names of the tensors of the blocks that are in the file."""
    blocks = enumerate(header.spec.blocks)
    return {index: f"edges.{index}.{block.name}" for index, block in blocks if index not in header.copies}


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in tensors.items()}


def _write(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    ready = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    meta = to_metadata(header)
    write_atomic(path, lambda temporary: safetensors.torch.save_file(ready, temporary, metadata=meta))


def _check_tensors(header: Header, tensors: Mapping[str, Tensor], path: Path) -> None:
    """The tensors that the header speaks of and no others; the graph's shapes are compared later."""
    stated = _prefixed("carried.", header.spec.carried) | _prefixed("buffer.", header.buffers)
    features = {"nodes", *_edges(header).values()}
    for name in sorted({*features, *stated, *tensors}):
        expected = stated.get(name, "a tensor of floats" if name in features else "no such tensor")
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        fits = name in tensors and (tensors[name].is_floating_point() if name in features else found == expected)
        if not fits:
            message = f"malformed graph file: tensor {name}"
            raise CheckpointError(message, expected=str(expected), got=str(found), where=str(path))
    for name, kind in header.dtypes.items():
        if name not in header.spec.shapes or kind not in DTYPES:
            message, expected = f"malformed graph file: dtypes.{name}", f"one of {', '.join(DTYPES)}"
            raise CheckpointError(message, expected=expected, got=reprlib.repr(kind), where=str(path))


def _graph(header: Header, tensors: Mapping[str, Tensor], path: Path) -> NetworkGraph:
    """The graph of a file, checked."""
    check_copies(header, path)
    names = _edges(header)
    nothing = tensors["nodes"].new_empty(0)
    edges = tuple(tensors[names[i]] if i in names else nothing for i in range(len(header.spec.blocks)))
    graph = NetworkGraph(header.spec, tensors["nodes"], edges)
    _check(graph, header.buffers, header.copies, path)
    graph = with_copies(graph, header, path)
    _check(graph, header.buffers, (), path)
    return graph


def _check(graph: NetworkGraph, buffers: Mapping[str, Shape], copies: tuple[int, ...], path: Path) -> None:
    """Check the structure against the tensors; `copies` have none yet."""
    edges = [None if i in copies else tuple(e.shape) for i, e in enumerate(graph.edge_features)]
    try:
        check_spec(graph.spec, graph.node_features.shape, edges, buffers)
        if not copies:
            graph.validate()
    except ConversionError as error:
        raise CheckpointError(f"no sound graph in {path}: {error}") from error
