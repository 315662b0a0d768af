"""The same record as `gmn.trace`, made by `torch.export`: for networks whose run cannot be watched from Python.

A scripted or compiled function computes where no Python sees it. `torch.export` looks through it, at the price of
seconds and of the modules: everything is a torch function on parameters there.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_map

from gmn.errors import of_machine
from gmn.records import Op, Ref, Trace


def trace_export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace | None:
    """Export the network, which must be in eval mode, and read its operations; None if it cannot be exported."""
    try:
        program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises whatever it met on its way
        if of_machine(error):
            raise
        return None
    return _Reader(program).read()


class _Reader:
    """Numbers the values of an exported program in the order in which they appear."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.numbers: dict[fx.Node, Any] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.ops: list[Op] = []

    def read(self) -> Trace:
        params: dict[int, str] = {}
        inputs: list[int] = []
        integers: set[int] = set()
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and specs[node.name].kind == InputKind.CONSTANT_TENSOR:
                self.numbers[node] = self.program.constants[str(specs[node.name].target)]
            elif node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
                number = self._number(node.meta["val"])
                self.numbers[node] = Ref(number)
                kind, target = specs[node.name].kind, specs[node.name].target
                if kind in (InputKind.PARAMETER, InputKind.BUFFER):
                    params[number] = str(target)
                elif kind == InputKind.USER_INPUT:
                    inputs.append(number)
                    integers |= set() if node.meta["val"].is_floating_point() else {number}
            elif node.op == "call_function":
                self._call(node)
        return Trace(
            tuple(self.ops),
            self.shapes,
            tuple(inputs),
            self._outputs(),
            params,
            frozenset(integers),
            traced_by="export",
        )

    def _number(self, value: Tensor) -> int:
        number = len(self.shapes)
        self.shapes[number] = tuple(int(size) for size in value.shape)
        return number

    def _call(self, node: fx.Node) -> None:
        args, kwargs = (tree_map(self._look_up, part) for part in (tuple(node.args), dict(node.kwargs)))
        if node.target is operator.getitem:
            self.numbers[node] = args[0][args[1]]
            return
        outputs = tree_map(lambda v: Ref(self._number(v)) if isinstance(v, Tensor) else v, node.meta.get("val"))
        self.numbers[node] = outputs
        if not any(isinstance(leaf, Ref) for leaf in tree_flatten(outputs)[0]):
            return
        stack = list(node.meta.get("nn_module_stack", {}).values())
        schema = getattr(node.target, "_schema", None)  # a control-flow operator has none
        name = schema.name.partition("::")[2] if schema else getattr(node.target, "__name__", str(node.target))
        module = str(stack[-1][0]) if stack else ""
        self.ops.append(Op(name, node.target, module, args, kwargs, outputs))  # pyright: ignore[reportArgumentType]

    def _look_up(self, leaf: Any) -> Any:
        return self.numbers.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf

    def _outputs(self) -> tuple[int, ...]:
        node = next(node for node in self.program.graph.nodes if node.op == "output")
        users = [s.arg.name for s in self.program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
        leaves = [n for n in tree_flatten(node.args)[0] if isinstance(n, fx.Node) and n.name in users]
        return tuple(ref.value for ref in (self.numbers[n] for n in leaves) if isinstance(ref, Ref))
