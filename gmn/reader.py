"""Reads a trace in order and lets the rules build the graph."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from gmn.assemble import assemble
from gmn.builder import Builder, InputAxis, Layout
from gmn.errors import ConversionError
from gmn.flow import Flow, nothing, spread
from gmn.graph import NetworkGraph
from gmn.records import Op, Ref, Trace
from gmn.rules import Call, Converter, Parameters, function_rule, known, rule_for, rule_for_type

OnUnknown = Literal["error", "keep"]
RESHAPES = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "to", "type_as", "float"}
RESHAPES |= {"contiguous", "clone", "detach", "__getitem__", "expand_as", "view_as", "type"}


def read(model: nn.Module, record: Trace, layout: Layout, on_unknown: OnUnknown) -> NetworkGraph:
    """The graph of a traced network.

    Which axis of an input carries the channels shows when the first layer reads it: until one fits, all are tried,
    the one after the batch first.
    """
    axes: dict[int, list[int]] = {
        # if no axis fits, the first guess stays
        number: [*dict.fromkeys([min(1, len(shape) - 1), len(shape) - 1, *range(len(shape))]), min(1, len(shape) - 1)]
        for number, shape in ((n, record.shapes[n]) for n in record.inputs)
        if shape
    }
    while True:
        try:
            return _Reader(model, record, Builder(model, layout), on_unknown).read(axes)
        except InputAxis as problem:
            for number in problem.numbers:
                axes[number].pop(0)


class _Reader:
    """One pass over a trace; `values` holds what each of its values carries."""

    def __init__(self, model: nn.Module, record: Trace, builder: Builder, on_unknown: OnUnknown) -> None:
        self.model, self.record, self.builder, self.on_unknown = model, record, builder, on_unknown
        self.modules = dict(model.named_modules())
        self.uses = Counter(value for op in record.ops for value in set(op.inputs()))
        self.uses.update(record.outputs)
        readers = Counter(id(p) for op in record.ops for p in self._own(op))
        builder.shared |= {op.module for op in record.ops if any(readers[id(p)] > 1 for p in self._own(op))}
        self.values: dict[int, Flow | Parameters] = {
            number: Parameters((name,), record.shapes[number], name) for number, name in record.params.items()
        }

    def read(self, axes: dict[int, list[int]]) -> NetworkGraph:
        for number in self.record.inputs:
            self.values[number] = self._input(number, axes.get(number, []))
        for op in self.record.ops:
            self._step(op)
        for number in self.record.outputs:
            value = self.values[number]
            if isinstance(value, Flow):
                self.builder.freeze(value.nodes, "network output")
        if self.record.blind:
            nodes = torch.arange(self.builder.num_nodes)
            self.builder.freeze(nodes, "part of the network runs where it cannot be followed")
        if not any(edges.param for edges in self.builder.edges):
            raise ConversionError("the network has no layer that the graph can hold", got=type(self.model).__name__)
        return assemble(self.builder, self.model)

    def _input(self, number: int, axes: list[int]) -> Flow:
        shape = self.record.shapes[number]
        if number in self.record.integers or not axes:
            return Flow(nothing(shape))  # indices: the embedding that reads them makes nodes of its rows
        group = self.builder.add_nodes("input", shape[axes[0]], "input")
        nodes = self.builder.ids(group)
        self.builder.freeze(nodes, "network input")
        if len(axes) > 1:
            self.builder.open_inputs[group.start] = number
        return Flow(spread(nodes, shape, axes[0]))

    def _own(self, op: Op) -> list[nn.Parameter]:
        return list(self.modules[op.module].parameters()) if op.func is None else []

    def _step(self, op: Op) -> None:
        call = self._call(op)
        rule = rule_for(call.module) if op.func is None else function_rule(op.name)
        if not call.flows and op.func is not None:
            result: Any = tree_map(
                lambda ref: self._computed(op, call, ref) if isinstance(ref, Ref) else ref, op.outputs
            )
        elif rule is None:
            result = None
        else:
            result = rule(call) if callable(rule) else self._encode(rule, call)
        self._bind(op, call, self._unknown(op, call) if result is None else result)

    def _encode(self, rule: Converter, call: Call) -> Any:
        """A module by its rule; a subclass may have parameters of its own that the rule does not know."""
        result = rule.encode(call)
        own = {name for name, _ in call.module.named_parameters()}
        if result is None or own <= {"weight", "bias"} or rule_for_type(type(call.module)):
            return result
        placed = {e.param for e in self.builder.edges} | self.builder.vectors.keys()
        unseen = [name for name in (f"{call.name}.{key}".lstrip(".") for key in own) if name not in placed]
        if not unseen:
            return result
        if self.on_unknown == "error":
            return None
        for flow in [*call.flows, *(leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Flow))]:
            self.builder.freeze(flow.nodes, f"{call.name} has parameters of its own")
        return result

    def _computed(self, op: Op, call: Call, ref: Ref) -> Parameters:
        """A value made from parameters alone; still the parameter itself if its numbers are all there."""
        names = tuple(dict.fromkeys(name for p in call.parameters for name in p.names))
        shape = self.record.shapes[ref.value]
        source = call.parameters[0] if len(call.parameters) == 1 else None
        if source is None or source.origin is None:
            return Parameters(names, shape)
        full = math.prod(self.builder.tensor(source.origin).shape) == math.prod(shape)
        if not full and op.name not in ("expand", "expand_as", "repeat"):
            return Parameters(names, shape)
        if len(source.shape) == 2 and _flips(op):
            return Parameters(names, shape, source.origin, not source.flipped)
        plain = op.name in RESHAPES and (not source.flipped or source.shape == shape) and not _picks(op)
        return Parameters(names, shape, source.origin if plain else None, source.flipped)

    def _call(self, op: Op) -> Call:
        refs = [leaf.value for leaf in tree_flatten(op.outputs)[0] if isinstance(leaf, Ref)]
        args, kwargs = tree_map(self._look_up, op.args), tree_map(self._look_up, op.kwargs)
        if op.func is None and not any(isinstance(leaf, Flow) for leaf in tree_flatten((args, kwargs))[0]):
            args, kwargs = tree_map(_plain, args), tree_map(_plain, kwargs)  # a layer that reads constants alone
        if op.func is not None and not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        return Call(
            name=op.module,
            module=self.modules[op.module],
            args=args,
            kwargs=kwargs,
            shape=self.record.shapes[refs[0]],
            uses=self.uses[refs[0]],
            builder=self.builder,
            op=op.name,
            func=op.func,
        )

    def _look_up(self, leaf: Any) -> Any:
        return self.values[leaf.value] if isinstance(leaf, Ref) else leaf

    def _bind(self, op: Op, call: Call, result: Any) -> None:
        refs = [leaf.value for leaf in tree_flatten(op.outputs)[0] if isinstance(leaf, Ref)]
        values = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, (Flow, Parameters))]
        if len(refs) > len(values):  # such as attention weights beside the output
            values += [Flow(nothing(self.record.shapes[number])) for number in refs[len(values) :]]
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
        """No rule: forbid to prune on either side, and carry the parameters through, or refuse them."""
        names = {name for p in call.parameters for name in p.names}
        if op.func is None:
            names |= {f"{call.name}.{key}".lstrip(".") for key, _ in call.module.named_parameters()}
        own = sorted(names & self.builder.params.keys())
        if self.on_unknown == "error" and own:
            raise ConversionError(
                f"no rule for {type(call.module).__name__} '{call.name}', which calls {op.name}"
                f" with the parameters {', '.join(own[:3])}",
                expected=f"one of {known()}",
                hint="register a rule with @gmn.register_converter, or pass on_unknown='keep' to carry it through",
            )
        call.freeze(f"read by {call.name or op.name} ({op.name}), which has no rule")
        return tree_map(lambda ref: self._opaque(op, call, ref) if isinstance(ref, Ref) else ref, op.outputs)

    def _opaque(self, op: Op, call: Call, ref: Ref) -> Flow:
        """Channels of a result that no rule explains: those read, if they still fit, else nodes that must stay."""
        shape = self.record.shapes[ref.value]
        if not any(len(flow.nodes) for flow in call.flows):
            return Flow(nothing(shape))
        for flow in call.flows:
            axis = flow.channel_axis(1, -1)
            if axis is not None and axis < len(shape) and shape[axis] == flow.ids.shape[axis] > 1:
                return Flow(spread(flow.channels(axis), shape, axis))
        axis = 1 if len(shape) in (2, 4, 5) else len(shape) - 1
        if not shape:
            return Flow(nothing(shape))
        nodes = self.builder.ids(self.builder.add_nodes(f"{op.module}.{op.name}", shape[axis], "opaque"))
        self.builder.freeze(nodes, f"made by {op.module or op.name} ({op.name}), which has no rule")
        return Flow(spread(nodes, shape, axis))


def _picks(op: Op) -> bool:
    """Whether an index may change the order of what it takes."""
    leaves = tree_flatten(op.args[1:])[0] if op.name == "__getitem__" else []
    return any(isinstance(leaf, (Ref, Tensor)) for leaf in leaves) or any(isinstance(arg, list) for arg in op.args[1:])


def _flips(op: Op) -> bool:
    """Whether a reshape of a matrix is its transpose."""
    if op.name == "__get__":
        return op.func in (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
    axes = [arg for arg in (*op.args[1:], *op.kwargs.values()) if not isinstance(arg, (Ref, Tensor))]
    swaps = op.name in ("transpose", "swapaxes", "swapdims") and axes[0] % 2 != axes[1] % 2
    return swaps or op.name == "t" or (op.name == "permute" and axes in ([1, 0], [[1, 0]], [(1, 0)]))


def _plain(leaf: Any) -> Any:
    """A constant as an activation without channels."""
    if isinstance(leaf, Parameters):
        return Flow(nothing(leaf.shape))
    return Flow(nothing(tuple(leaf.shape))) if isinstance(leaf, Tensor) else leaf
