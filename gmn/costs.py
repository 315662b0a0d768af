"""What a network costs: FLOPs, parameters, latency. The one counter of the whole tree.

A multiply-add counts as one FLOP, as in torch-pruning and in the paper's tables (some tools count two).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gmn.batches import tensors_in
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

    args, kwargs = split_inputs(example_inputs)
    # torch-pruning divides by the batch size itself, but sees it only in positional arguments
    batch = next((a.shape[0] for a in kwargs.values() if isinstance(a, torch.Tensor)), 1)
    with evaluation(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flops = count_ops_and_params(model, kwargs or (args[0] if len(args) == 1 else args))[0]
    return Cost(float(flops) / batch, sum(p.numel() for p in model.parameters()))


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
