"""Run a network once and write down what happened: an ordered list of operations on numbered values.

No symbolic tracing: the network runs for real on its example inputs, under a `TorchFunctionMode` that sees every
call of the torch API, so control flow, subclasses and in-place operations are followed as they happen. Modules for
which the caller has a rule ("leaves") are recorded as one operation and not looked into.

What runs outside of Python (a scripted function, a compiled module, a detour over numpy) is not seen. A tensor that
appears from nowhere gives that away, and the network is exported instead (`gmn.trace_export`).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from gmn.errors import MALFORMED, ConversionError, of_machine, one_line
from gmn.records import Op, Ref, Trace
from gmn.trace_export import trace_export


def trace(model: nn.Module, example_inputs: Any, is_leaf: Callable[[nn.Module], bool]) -> Trace:
    """Run `model` once in eval mode and record its operations; the model is left as it was found.

    Args:
        model: Any module.
        example_inputs: A tensor, or a tuple of positional and a dict of keyword arguments.
        is_leaf: Whether a module is recorded as one operation.

    Raises:
        ConversionError: if the network does not run on the inputs.
    """
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ConversionError("a lazy layer has no shape yet", hint="run the network once before it is converted")
    args, kwargs = _distinct(split_inputs(example_inputs))
    recorder = _Recorder(model)
    inputs = tuple(recorder.track(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor))
    with evaluation(model), _hooked(model, recorder, is_leaf), torch.no_grad():
        try:
            with recorder:
                result = model(*args, **kwargs)
        except (*MALFORMED, AssertionError) as error:
            if of_machine(error):
                raise
            shapes = ", ".join(str(tuple(t.shape)) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor))
            raise ConversionError(
                f"{type(model).__name__} does not run on the example inputs",
                got=f"input shape {shapes}",
                hint=one_line(error),
            ) from error
    if recorder.inside:
        return trace(model, example_inputs, lambda module: is_leaf(module) and module not in recorder.inside)
    results = list(_tensors(result))
    recorder.hidden |= not results or any(id(t) not in recorder.refs for t in results)
    if recorder.hidden and (exported := _export(model, args, kwargs)) is not None:
        return exported
    outputs = [recorder.refs[id(t)] for t in results if id(t) in recorder.refs]
    integers = frozenset(n for n in inputs if not recorder.alive[n].is_floating_point())
    return Trace(
        tuple(recorder.ops), recorder.shapes, inputs, tuple(outputs), recorder.params, integers, blind=recorder.hidden
    )


def _distinct(inputs: Any) -> Any:
    """The inputs with a copy of every tensor, so that one that is given twice is two inputs."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def _tensors(result: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors of what a network returns, also inside objects that torch does not know as containers."""
    for leaf in tree_flatten(result)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            yield from _tensors(vars(leaf), depth - 1)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace | None:
    with evaluation(model), torch.no_grad():
        return trace_export(model, args, kwargs)


def clone(model: nn.Module) -> nn.Module:
    """A deep copy of a network.

    Raises:
        ConversionError: if something in it cannot be copied.
    """
    shared = {id(f): f for m in model.modules() for f in vars(m).values() if isinstance(f, torch.jit.ScriptFunction)}
    try:
        return copy.deepcopy(model, shared)  # scripted functions hold no numbers, and cannot be copied
    except (TypeError, RuntimeError, AttributeError, pickle.PickleError) as error:
        raise ConversionError("the network cannot be copied", got=one_line(error)) from error


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what users pass: a tensor, a tuple, or a dict of keywords."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


TRUSTED = ("torch", "torchvision", "timm", "transformers")


class _Recorder(TorchFunctionMode):
    """Numbers tensors as they appear and records the calls between them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.refs: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a freed tensor's id() could be given to another one
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.scope: list[str] = [""]
        self.paused = 0
        self.inside: set[nn.Module] = set()  # leaves that have to be looked into after all
        self.hidden = False  # whether a tensor appeared that no recorded operation made
        self.plain = {id(t): t for module in model.modules() for t in _attributes(module)}
        self.params: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.params[self.track(tensor)] = name

    def track(self, tensor: Tensor) -> int:
        """Give a tensor a new number; an in-place result gets a new number for the same object."""
        number = len(self.alive)
        self.alive.append(tensor)
        self.refs[id(tensor)] = number
        self.shapes[number] = tuple(tensor.shape)
        return number

    def to_refs(self, tree: Any) -> Any:
        return tree_map(lambda x: Ref(self.refs[id(x)]) if isinstance(x, Tensor) and id(x) in self.refs else x, tree)

    def check(self, *arguments: Any) -> None:
        """Notice tensors that came from nowhere."""
        leaves = (leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor))
        self.hidden |= any(id(t) not in self.refs and id(t) not in self.plain for t in leaves)

    def record(self, name: str, func: Callable[..., Any] | None, args: Any, kwargs: Any, result: Any) -> None:
        outputs = tree_map(lambda x: Ref(self.track(x)) if isinstance(x, Tensor) else x, result)
        self.ops.append(Op(name, func, self.scope[-1], args, kwargs, outputs))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        ref_args, ref_kwargs = self.to_refs(args), self.to_refs(kwargs)
        self.check(args, kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ("numpy", "__array__"):  # what happens to it there is not seen
            self.hidden |= any(isinstance(r, Ref) and r.value not in self.params for r in tree_flatten(ref_args)[0])
        result = func(*args, **kwargs)
        self.plain.update({id(t): t for t in tree_flatten(result)[0] if isinstance(t, Tensor)})
        mutated = args[0] if name == "__setitem__" else result
        reads = any(isinstance(leaf, Ref) for leaf in tree_flatten((ref_args, ref_kwargs))[0])
        if reads and any(isinstance(leaf, Tensor) for leaf in tree_flatten(mutated)[0]):
            self.record(name, func, ref_args, ref_kwargs, mutated)
        return result


def own_way(module: nn.Module, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether a subclass of one of torch's layers computes something else than that layer.

    Layers of the libraries that the coverage suites convert are known to keep the order of their channels.
    """
    base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch."))
    known = type(module).__module__.partition(".")[0] in TRUSTED
    if known or base is nn.Module or type(module).forward is base.forward:
        return False
    if _same(base, module, args, kwargs, result):
        return False
    over_last = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(args) == 1 and args[0].dim() > 3
    first = over_last and _same(base, module, (args[0].movedim(1, -1),), {}, result.movedim(1, -1))
    return not first  # a norm of images with the channels first


def _same(base: type[nn.Module], module: nn.Module, args: Any, kwargs: Any, result: Any) -> bool:
    try:
        plain = base.forward(module, *args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(plain, Tensor) and isinstance(result, Tensor) and torch.equal(plain, result)


def _attributes(module: nn.Module) -> list[Tensor]:
    """Tensors that a module keeps beside its parameters and buffers."""
    return [leaf for leaf in tree_flatten(list(vars(module).values()))[0] if isinstance(leaf, Tensor)]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _hooked(model: nn.Module, recorder: _Recorder, is_leaf: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Hooks that keep the scope, and record leaf modules as one operation each."""
    handles: list[Any] = []
    pending: list[tuple[Any, Any]] = []
    try:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no such hooks, and nothing of it is seen
                before, after = _hooks(name, recorder, pending, leaf=is_leaf(module))
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(
    name: str, recorder: _Recorder, pending: list[tuple[Any, Any]], *, leaf: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    """What to do before and after a module runs."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.scope.append(name)
        if leaf:
            if not recorder.paused:
                recorder.check(args, kwargs)
                pending.append((recorder.to_refs(args), recorder.to_refs(kwargs)))
            recorder.paused += 1

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if leaf:
            if recorder.paused == 1 and own_way(module, args, kwargs, result):  # compared unseen
                recorder.inside.add(module)
            recorder.paused -= 1
            if not recorder.paused:
                recorder.record("module", None, *pending.pop(), result)
        recorder.scope.pop()

    return before, after
