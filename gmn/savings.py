"""What a channel costs: the multiply-adds that go when it goes, from the graph's weights alone.

    FLOPs_k = sum over the weights w of positions(w) * (numbers of w in channel k whose other channel is there still)

`positions`: how often a weight is used per run, the pixels or tokens that its layer puts out. Norms, activations and
the products inside an attention are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gmn.graph import GraphSpec
from gmn.groups import Couplings
from gmn.members import Members
from gmn.trace import evaluation, split_inputs


def positions(model: nn.Module, spec: GraphSpec, example_inputs: Any) -> dict[str, float]:
    """How often each weight of a graph is used in one run on the example inputs.

    A layer that is not called itself (its weight is taken by the module around it) counts as that module.
    """
    calls: dict[str, float] = defaultdict(float)  # by module

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] += _positions(module, (*args, *kwargs.values()), output)

        return note

    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in model.named_modules()]
    args, kwargs = split_inputs(example_inputs)
    try:
        with evaluation(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    weights = spec.weights()
    homes = {id(parameter): name for name, parameter in model.named_parameters() if name in weights}
    found = dict.fromkeys(weights, 0.0)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in homes:
            found[homes[id(parameter)]] += _calls(calls, name.rpartition(".")[0])
    return found


def _calls(calls: Mapping[str, float], module: str) -> float:
    """Those of the module, or of the nearest one around it that was called."""
    while module and module not in calls:
        module = module.rpartition(".")[0]
    return calls.get(module, 0.0)


def _positions(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> float:
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(module, _ConvTransposeNd):
        return inputs[0].numel() / module.in_channels
    if isinstance(module, _ConvNd):
        return output.numel() / module.out_channels
    if isinstance(module, nn.Embedding) or not isinstance(output, Tensor) or not output.dim():
        return 0.0  # a look-up multiplies nothing
    return output.numel() / output.shape[-1]


class Savings:
    """FLOPs that the removal of each channel saves, next to those that are left.

    Args:
        spec, coupled: The graph's structure and couplings.
        uses: From `positions`.
    """

    def __init__(self, spec: GraphSpec, coupled: Couplings, uses: Mapping[str, float]) -> None:
        self.members = Members(spec, coupled, "weights")
        self.edges: dict[str, Tensor] = {}
        for name, (slot, *_) in spec.weights().items():
            *edges, taps = slot.canonical_shape
            self.edges[name] = torch.full(edges, taps * uses[name], dtype=torch.float64)

    def __call__(self, keep: Tensor) -> Tensor:
        """[channels]: multiply-adds, 1 at least; `keep`, [channels] bool, may only lose channels from call to call."""
        self.members.silence(self.edges, keep)
        return self.members.add(self.members.sums(self.edges)).clamp(min=1.0)
