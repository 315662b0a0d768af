"""Network to graph and back: `to_graph`, `to_model`, and the registry of rules (GMN, section 3.1).

A rule says what one family of modules (or of torch functions) adds to the graph. The way back needs no rule: every
weight is stored with its address (`EdgeSlot`, `NodeSlot`), and an address is read in both directions.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from gmn.builder import Builder, Flow, Layout, spread
from gmn.errors import ConversionError
from gmn.graph import NetworkGraph
from gmn.trace import Op, Ref, Trace, trace

OnUnknown = Literal["error", "keep"]


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
        func: The torch function, None for a module.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    uses: int
    builder: Builder
    func: Callable[..., Any] | None = None

    @property
    def flows(self) -> list[Flow]:
        """The activations among the arguments."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Flow)]

    @property
    def parameters(self) -> list[Parameters]:
        """The arguments that are parameters or were made from parameters alone."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Parameters)]

    def freeze_beside_constants(self) -> None:
        """Forbid to prune activations that meet a tensor of fixed size: it would not follow the pruned network."""
        leaves = tree_flatten((self.args, self.kwargs))[0]
        if self.parameters or any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in leaves):
            for flow in self.flows:
                self.builder.freeze(flow.ids.flatten(), f"meets a constant in {self.name or 'the network'}")

    def output(self, channels: Tensor, axis: int, stage: str = "closed") -> Flow:
        """The result: `channels` along one axis."""
        return Flow(spread(channels, self.shape, axis), stage, self.uses)


@dataclass(frozen=True)
class Parameters:
    """A value made from parameters or buffers alone, such as a position embedding."""

    names: tuple[str, ...]


class Converter(ABC):
    """A rule for one family of modules; register it with `@register_converter(ModuleType, ...)`."""

    @abstractmethod
    def encode(self, call: Call) -> Flow:
        """Add the module's nodes and edges to `call.builder` and return what its output carries."""


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


def rule_for(module: nn.Module) -> Converter | None:
    """The rule of the module's nearest registered base class."""
    _load_rules()
    return next((_MODULES[base] for base in type(module).__mro__ if base in _MODULES), None)


def _load_rules() -> None:
    importlib.import_module("gmn.converters")  # registers the built-in rules; not at import: they import this file


def layouts() -> dict[str, Layout]:
    """The layouts by name: `generic` and those of the paper."""
    presets: dict[str, Layout] = importlib.import_module("gmn.converters.layouts").LAYOUTS
    return presets


def to_graph(
    model: nn.Module,
    example_inputs: Any,
    *,
    layout: str | Layout = "generic",
    on_unknown: OnUnknown = "error",
) -> NetworkGraph:
    """The graph of a network; `to_model` is the exact inverse.

    Args:
        model: Any module; it is run once on the example inputs and left as it was.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments.
        layout: Name of a layout (`generic`, `resnet56`, `resnet50`, `vgg19`) or a `Layout`.
        on_unknown: What to do with a module or function without a rule: `error`, or `keep` (its parameters are
            carried through untouched and the channels around it are never removed).

    Raises:
        ConversionError: if there is no rule for a module with parameters, the network does not run on the inputs,
            or a weight is NaN or infinite.
    """
    _load_rules()
    if isinstance(layout, str):
        if layout not in layouts():
            raise ConversionError("unknown layout", expected=", ".join(layouts()), got=repr(layout))
        layout = layouts()[layout]
    record = trace(model, example_inputs, lambda module: rule_for(module) is not None)
    return _Reader(model, record, Builder(model, layout), on_unknown).read()


def to_model(graph: NetworkGraph) -> nn.Module:
    """The network of a graph: a copy of the origin with the trainable parameters taken from the graph.

    Running statistics, and whatever has no place in the graph, stay the origin's.

    Raises:
        ConversionError: if the graph was loaded without its network.
    """
    if graph.template is None:
        raise ConversionError("the graph has no network to copy", hint="make it with gmn.to_graph")
    model = copy.deepcopy(graph.template)
    state = {name: value.detach().clone() for name, value in graph.to_state_dict().items()}
    model.load_state_dict(state, strict=False)
    return model


class _Reader:
    """Reads a trace in order and lets the rules build the graph."""

    def __init__(self, model: nn.Module, record: Trace, builder: Builder, on_unknown: OnUnknown) -> None:
        self.model, self.record, self.builder, self.on_unknown = model, record, builder, on_unknown
        self.modules = dict(model.named_modules())
        self.uses = Counter(value for op in record.ops for value in set(op.inputs()))
        self.uses.update(record.outputs)
        self.readers = Counter(id(p) for op in record.ops for p in self._own(op))
        self.values: dict[int, Flow | Parameters] = {n: Parameters((name,)) for n, name in record.params.items()}

    def read(self) -> NetworkGraph:
        for number in self.record.inputs:
            self.values[number] = self._input(self.record.shapes[number])
        for op in self.record.ops:
            self._step(op)
        for number in self.record.outputs:
            value = self.values[number]
            if isinstance(value, Flow):
                self.builder.freeze(value.ids.flatten(), "network output")
        if not self.builder.blocks:
            raise ConversionError("the network has no layer that the graph can hold", got=type(self.model).__name__)
        return self.builder.finish(self.model)

    def _input(self, shape: tuple[int, ...]) -> Flow:
        axis = min(1, len(shape) - 1)
        group = self.builder.add_nodes("input", shape[axis], "input")
        nodes = self.builder.ids(group)
        self.builder.freeze(nodes, "network input")
        return Flow(spread(nodes, shape, axis))

    def _step(self, op: Op) -> None:
        call = self._call(op)
        if not call.flows:
            names = tuple(name for p in call.parameters for name in p.names)
            result: Any = tree_map(lambda ref: Parameters(names) if isinstance(ref, Ref) else ref, op.outputs)
        elif self._shared(op):
            result = None  # a weight has one place in the graph
        elif op.func is None:
            rule = rule_for(call.module)
            assert rule is not None  # only modules with a rule are leaves
            result = rule.encode(call)
        elif op.name in _FUNCTIONS:
            result = _FUNCTIONS[op.name](call)
        else:
            result = None
        self._bind(op, call, self._unknown(op, call) if result is None else result)

    def _own(self, op: Op) -> list[nn.Parameter]:
        return list(self.modules[op.module].parameters()) if op.func is None else []

    def _shared(self, op: Op) -> bool:
        """Whether the module is called twice, or another one has the same parameters."""
        return any(self.readers[id(p)] > 1 for p in self._own(op))

    def _call(self, op: Op) -> Call:
        look_up = lambda leaf: self.values[leaf.value] if isinstance(leaf, Ref) else leaf  # noqa: E731
        refs = [leaf.value for leaf in tree_flatten(op.outputs)[0] if isinstance(leaf, Ref)]
        return Call(
            name=op.module,
            module=self.modules[op.module],
            args=tree_map(look_up, op.args),
            kwargs=tree_map(look_up, op.kwargs),
            shape=self.record.shapes[refs[0]],
            uses=self.uses[refs[0]],
            builder=self.builder,
            func=op.func,
        )

    def _bind(self, op: Op, call: Call, result: Any) -> None:
        refs = [leaf.value for leaf in tree_flatten(op.outputs)[0] if isinstance(leaf, Ref)]
        values = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, (Flow, Parameters))]
        if len(refs) != len(values):
            raise ConversionError(
                f"the rule for {op.name} returned the wrong number of outputs",
                expected=str(len(refs)),
                got=str(len(values)),
                where=call.name,
            )
        for number, value in zip(refs, values, strict=True):
            if isinstance(value, Flow) and tuple(value.ids.shape) != self.record.shapes[number]:
                raise ConversionError(
                    f"the rule for {op.name} returned an output of the wrong shape",
                    expected=str(self.record.shapes[number]),
                    got=str(tuple(value.ids.shape)),
                    where=call.name,
                )
            self.values[number] = value

    def _unknown(self, op: Op, call: Call) -> Any:
        """No rule: refuse, or cut the graph here and forbid to prune on either side of the cut."""
        if self.on_unknown == "error" and self._shared(op):
            raise ConversionError(
                f"the parameters of {type(call.module).__name__} '{call.name}' are used more than once",
                hint="pass on_unknown='keep' to carry them through",
            )
        if self.on_unknown == "error":
            own = sorted({name for p in call.parameters for name in p.names})
            raise ConversionError(
                f"no rule for {type(call.module).__name__} '{call.name}', which calls {op.name}"
                + (f" with the parameters {', '.join(own[:3])}" if own else ""),
                expected=f"one of {', '.join(sorted(t.__name__ for t in _MODULES))}",
                hint="register a rule with @gmn.register_converter, or pass on_unknown='keep' to carry it through",
            )
        for flow in call.flows:
            self.builder.freeze(flow.ids.flatten(), f"read by {call.name or op.name}, which has no rule")
        return tree_map(lambda ref: self._opaque(op, ref) if isinstance(ref, Ref) else ref, op.outputs)

    def _opaque(self, op: Op, ref: Ref) -> Flow:
        shape = self.record.shapes[ref.value]
        axis = 1 if len(shape) in (2, 4, 5) else len(shape) - 1
        nodes = self.builder.ids(self.builder.add_nodes(f"{op.module}.{op.name}", shape[axis], "opaque"))
        self.builder.freeze(nodes, f"made by {op.module or op.name}, which has no rule")
        return Flow(spread(nodes, shape, axis))
