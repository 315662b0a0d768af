"""What of a network is in its graph: the share of its parameters, and its modules as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text
from rich.tree import Tree
from torch import nn

from gmn.errors import ConversionError
from gmn.graph import GraphSpec, NetworkGraph

WEIGHT_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.Linear, nn.MultiheadAttention),
)
IN_GRAPH, CARRIED = "in the graph", "carried"
STYLES = {IN_GRAPH: "green", CARRIED: "yellow"}


@dataclass(frozen=True)
class Coverage:
    """Numbers of parameters; one that several modules share counts once.

    Attributes:
        total: All of the network's.
        in_graph, carried: Those with a place in the graph, and those that only travel along.
        layers, layers_in_graph: Those of weight layers (convolutions, linear layers, norms, attention), and how many
            of them are in the graph.
        missing: Names of the parameters of weight layers that are not in the graph.
    """

    total: int
    in_graph: int
    carried: int
    layers: int
    layers_in_graph: int
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of all parameters that is in the graph."""
        return self.in_graph / max(self.total, 1)

    @property
    def layer_share(self) -> float:
        """The share of the weight layers' parameters that is in the graph."""
        return self.layers_in_graph / max(self.layers, 1)


def is_weight_layer(module: nn.Module) -> bool:
    """Whether the parameters of a module are those of a convolution, a linear layer, a norm or an attention.

    >>> is_weight_layer(nn.ConvTranspose2d(1, 1, 1)), is_weight_layer(nn.Embedding(2, 2))
    (True, False)
    """
    return isinstance(module, WEIGHT_LAYERS) or "Norm" in type(module).__name__  # and the norms of other libraries


def coverage(model: nn.Module, spec: GraphSpec) -> Coverage:
    """How many of the network's parameters are in its graph; ConversionError if the graph is of another network."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name in sizes.keys() ^ (spec.shapes | spec.carried).keys():
        raise ConversionError("the graph is of another network", where=name)
    layers = _of_weight_layers(model)
    missing = tuple(name for name in layers if name not in spec.shapes)
    in_graph, in_layers = sum(sizes[name] for name in spec.shapes), sum(sizes[name] for name in layers)
    return Coverage(
        total=sum(sizes.values()),
        in_graph=in_graph,
        carried=sum(sizes[name] for name in spec.carried),
        layers=in_layers,
        layers_in_graph=in_layers - sum(sizes[name] for name in missing),
        missing=missing,
    )


def _of_weight_layers(model: nn.Module) -> list[str]:
    """Names of the parameters of weight layers, also under a parametrization such as weight norm."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, None] = {}
    for module in filter(is_weight_layer, model.modules()):
        hooks = getattr(module, "parametrizations", None)
        own = [*module.parameters(recurse=False), *(hooks.parameters() if isinstance(hooks, nn.Module) else ())]
        found |= dict.fromkeys(names[id(parameter)] for parameter in own)
    return list(found)


# -- the tree ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameter:
    name: str
    shape: tuple[int, ...]
    mark: str
    tied_to: str  # the name it has in the graph, if that is another one

    @property
    def text(self) -> str:
        tied = f" = {self.tied_to}" if self.tied_to else ""
        return f"{self.name} {list(self.shape)}{tied}"


@dataclass(frozen=True)
class _Module:
    name: str
    kind: str
    parameters: tuple[_Parameter, ...]
    children: tuple[_Module, ...]

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for modules that look the same, whatever their names."""
        return self.kind, self.parameters, tuple((child.name, child.likeness) for child in self.children)


def tree(model: nn.Module, graph: NetworkGraph) -> Tree:
    """The modules that have parameters: class, shapes, and what is in the graph; repeated ones are shown once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    root = _module("", "", model, names, graph.spec)
    result = Tree(_label([root], ""), guide_style="dim", highlight=False)
    _grow(result, root, "")
    return result


def _module(name: str, path: str, module: nn.Module, names: dict[int, str], spec: GraphSpec) -> _Module:
    prefix = f"{path}." if path else ""
    parameters = tuple(
        _Parameter(
            name=key,
            shape=tuple(parameter.shape),
            mark=IN_GRAPH if names[id(parameter)] in spec.shapes else CARRIED,
            tied_to="" if names[id(parameter)] == prefix + key else names[id(parameter)],
        )
        for key, parameter in module.named_parameters(recurse=False)
    )
    children = (_module(key, prefix + key, child, names, spec) for key, child in module.named_children())
    return _Module(name, type(module).__name__, parameters, tuple(c for c in children if c.parameters or c.children))


def _grow(branch: Tree, module: _Module, path: str) -> None:
    prefix = f"{path}." if path else ""
    for alike in _runs(module.children):
        below = branch.add(_label(alike, prefix))
        _grow(below, alike[0], prefix + alike[0].name)


def _runs(modules: tuple[_Module, ...]) -> Iterator[list[_Module]]:
    """Neighbours that look the same."""
    for _, alike in groupby(modules, key=lambda module: module.likeness):
        yield list(alike)


def _label(alike: list[_Module], prefix: str) -> Text:
    first, count = alike[0], len(alike)
    if count > 1:
        names = f"{prefix}{first.name} .. {prefix}{alike[-1].name}"
        text = Text.assemble((names, "bold"), " (", f"{count} x ", (first.kind, "cyan"), ")")
    else:
        text = Text.assemble((f"{first.name}  " if first.name else "", "bold"), (first.kind, "cyan"))
    marks = list(dict.fromkeys(parameter.mark for parameter in first.parameters))
    for mark in marks:
        own = ", ".join(parameter.text for parameter in first.parameters if parameter.mark == mark)
        text.append(f"  {own}  ")
        text.append(f"partly {mark}" if len(marks) > 1 else mark, STYLES[mark])
    return text
