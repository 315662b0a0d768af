"""What a network costs: FLOPs, parameters, latency. The one counter of the whole tree.

A multiply-add counts as one FLOP, as in torch-pruning and in the paper's tables (some tools count two). torch-pruning
counts the bias of a linear layer once per batch, so the count per image is of the batch that is given, usually one.
"""

from __future__ import annotations

import inspect
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gmn.batches import batch_size, tensors_in
from gmn.trace import evaluation, split_inputs


@dataclass(frozen=True)
class Cost:
    """FLOPs (multiply-adds) of one forward pass per image, and the number of parameters."""

    flops: float
    parameters: int


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """FLOPs and parameters of a network, counted by torch-pruning; the model is left as it was.

    >>> cost(nn.Linear(10, 5, bias=False), torch.zeros(1, 10))
    Cost(flops=50.0, parameters=50)
    """
    from torch_pruning.utils import count_ops_and_params  # imports timm and torchvision, which takes seconds

    with evaluation(model), _by_position(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flops = count_ops_and_params(_OnInputs(model, example_inputs), torch.zeros(1))[0]
    return Cost(float(flops) / batch_size(example_inputs), sum(p.numel() for p in model.parameters()))


class _OnInputs(nn.Module):
    """A network that runs on its own inputs: torch-pruning calls with positional tensors alone."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model, (self.args, self.kwargs) = model, split_inputs(inputs)

    def forward(self, _: torch.Tensor) -> Any:
        """Pass the inputs on."""
        return self.model(*self.args, **self.kwargs)


@contextmanager
def _by_position(model: nn.Module) -> Iterator[None]:
    """Layers of torch that are called with keywords alone get them by position, where torch-pruning looks."""

    def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args or not kwargs:
            return None
        given = inspect.signature(module.forward).bind(**kwargs)
        return given.args, given.kwargs

    layers = [module for module in model.modules() if type(module).__module__.startswith("torch.nn")]
    handles = [layer.register_forward_pre_hook(bound, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def training_flops(model: nn.Module, example_inputs: Any, images: int) -> float:
    """FLOPs of training on so many images: a forward pass, and a backward pass that costs two of them."""
    return 3 * images * cost(model, example_inputs).flops


def latency(models: Sequence[nn.Module], inputs: Any, *, rounds: int = 15, warmup: int = 2) -> list[float]:
    """Seconds per forward pass of each model: median over rounds in which the models take turns."""
    return [statistics.median(series) for series in latencies(models, inputs, rounds=rounds, warmup=warmup)]


def latencies(models: Sequence[nn.Module], inputs: Any, *, rounds: int = 15, warmup: int = 2) -> list[list[float]]:
    """Seconds of a forward pass of each model in every round; [models][rounds].

    Taking turns lets slow drifts of the machine (heat, other programs) fall on all of them alike.

    Args:
        models: Networks on the device of the inputs.
        inputs: One batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        rounds: How many count.
        warmup: How many before them do not.
    """
    args, kwargs = split_inputs(inputs)
    device = next((tensor.device for tensor in tensors_in(inputs)), None)
    times: list[list[float]] = [[] for _ in models]
    for turn in range(warmup + rounds):
        for index, model in enumerate(models):
            with evaluation(model), torch.no_grad():
                _wait(device)
                start = time.perf_counter()
                model(*args, **kwargs)
                _wait(device)
            if turn >= warmup:
                times[index].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device | None) -> None:
    """Until everything that was asked of an accelerator is done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type != "cpu":
        torch.get_device_module(device).synchronize()
