"""The rules: what one family of modules, or of torch functions, adds to the graph (GMN, section 3.1).

The way back needs no rule: every weight is stored with its address (`gmn.address`), read in both directions.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten

from gmn.builder import Builder, Group
from gmn.flow import Flow, spread


@dataclass(frozen=True)
class Call:
    """One operation of the network, as a rule sees it.

    Attributes:
        name: Qualified name of the module.
        module: The module; for a torch function, the module that called it.
        args, kwargs: The arguments, with a `Flow` for each activation and a `Parameters` for each parameter.
        shape: Shape of the (first) output.
        uses: How many operations read the output.
        builder: Takes nodes, edges and addresses.
        op: Name of the torch function, `module` for a module.
        func: The torch function, None for a module.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    uses: int
    builder: Builder
    op: str = "module"
    func: Callable[..., Any] | None = None

    @property
    def flows(self) -> list[Flow]:
        """The activations among the arguments."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Flow)]

    @property
    def parameters(self) -> list[Parameters]:
        """The arguments that are parameters or were made from parameters alone."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Parameters)]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def freeze(self, reason: str) -> None:
        """Forbid to prune the activations among the arguments."""
        for flow in self.flows:
            self.builder.freeze(flow.nodes, reason)

    def freeze_beside_constants(self) -> None:
        """Forbid to prune activations that meet a tensor of fixed size, unless it can be cut with them.

        A parameter with one entry per channel follows the channels; a constant that is broadcast does not care.
        """
        leaves = tree_flatten((self.args, self.kwargs))[0]
        for flow in self.flows:
            axis = flow.channel_axis(1, -1)
            for leaf in leaves:
                if isinstance(leaf, (Parameters, Tensor)) and not self._beside(flow, axis, leaf):
                    self.builder.freeze(flow.nodes, f"meets a constant in {self.name or 'the network'}")

    def _beside(self, flow: Flow, axis: int | None, constant: Parameters | Tensor) -> bool:
        """Whether channels can be removed beside this constant."""
        shape = tuple(constant.shape)
        if axis is None:
            return math.prod(shape) <= 1
        position = axis - len(self.shape) + len(shape)
        if position < 0 or shape[position] == 1:
            return True
        name, channels = getattr(constant, "origin", None), flow.channels(axis)
        if name is None or len(channels) != shape[position] or bool((channels < 0).any()):
            return False
        own = self.builder.tensor(name).shape
        same = len(own) == len(shape) and all(a in (1, b) for a, b in zip(own, shape, strict=True))
        if not same or own[position] == 1:
            return False
        self.builder.follow(name, position, channels)
        return True

    def output(self, channels: Tensor, axis: int, stage: str = "closed") -> Flow:
        """The result: `channels` along one axis. Nothing is merged into a layer that is called more than once."""
        return Flow(spread(channels, self.shape, axis), "closed" if self.shared else stage, self.uses)

    def nodes(self, param: str, size: int, kind: str, sources: Tensor) -> Group:
        """The nodes of a weight layer: new ones, or those that its weight has made in an earlier call."""
        owner = param.rpartition(".")[0]
        return self.builder.layer_nodes(param, self.name if self.func is None else owner, size, kind, sources)

    def attach_bias(self, nodes: Group, bias: Tensor | None) -> None:
        """Put a layer's bias on its nodes, if it is a parameter of the model."""
        name = self.builder.name_of(bias)
        if name is not None:
            self.builder.attach_or_fail(nodes, {"bias": name})

    def mixed(self, flow: Flow, nodes: Group, axis: int) -> Flow:
        """The result of a layer that mixes positions: the channels stay, the positions are nodes that must stay."""
        self.builder.freeze(self.builder.ids(nodes), f"{nodes.name} mixes positions, not channels")
        ids = flow.ids.narrow(axis, 0, 1)
        return flow.closed(self.uses, ids.expand(self.shape))

    @property
    def shared(self) -> bool:
        """Whether the module is called more than once, or another one has the same parameters."""
        return self.name in self.builder.shared


@dataclass(frozen=True)
class Parameters:
    """A value made from parameters or buffers alone, such as a position embedding.

    Attributes:
        names: Of the parameters and buffers that went into it.
        shape: Of the value.
        origin: The parameter that this is, perhaps reshaped; None if something was computed.
        flipped: Whether it is the transpose of the parameter, a matrix.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    origin: str | None = None
    flipped: bool = False


class Converter(ABC):
    """A rule for one family of modules; register it with `@register_converter(ModuleType, ...)`."""

    @abstractmethod
    def encode(self, call: Call) -> Flow | None:
        """Add the module's nodes and edges to `call.builder` and return what its output carries.

        None, before anything is added: this module has no place in the graph and is carried through.
        """


_MODULES: dict[type[nn.Module], Converter] = {}
_FUNCTIONS: dict[str, Callable[[Call], Any]] = {}


def register_converter(*types: type[nn.Module]) -> Callable[[type[Converter]], type[Converter]]:
    """Class decorator: use this `Converter` for modules of these types and their subclasses."""

    def register(rule: type[Converter]) -> type[Converter]:
        _MODULES.update(dict.fromkeys(types, rule()))
        return rule

    return register


def register_function(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Decorator: use this rule for torch functions of these names (`add`, `cat`, ...)."""

    def register(rule: Callable[[Call], Any]) -> Callable[[Call], Any]:
        _FUNCTIONS.update(dict.fromkeys(names, rule))
        return rule

    return register


def words(text: str) -> tuple[str, ...]:
    """Names written one after the other.

    >>> words("relu gelu")
    ('relu', 'gelu')
    """
    return tuple(text.split())


def rule_for(module: nn.Module) -> Converter | None:
    """The rule of the module's nearest registered base class; none if its weight is computed from other parameters."""
    load_rules()
    computed = parametrize.is_parametrized(module) or ("weight" in vars(module) and "weight" not in module._parameters)
    return None if computed else next((_MODULES[base] for base in type(module).__mro__ if base in _MODULES), None)


def rule_for_type(kind: type[nn.Module]) -> bool:
    """Whether exactly this type, not only a base class of it, has a rule."""
    return kind in _MODULES


def function_rule(name: str) -> Callable[[Call], Any] | None:
    """The rule of a torch function."""
    return _FUNCTIONS.get(name)


def known() -> str:
    """The module types that have a rule."""
    return ", ".join(sorted(t.__name__ for t in _MODULES))


def load_rules() -> None:
    """Register the built-in rules."""
    importlib.import_module("gmn.converters")  # registers the built-in rules; not at import: they import this file
