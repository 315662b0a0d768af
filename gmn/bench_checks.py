"""What `gmn bench convert` checks about a network, its graph and its copy."""

from __future__ import annotations

import importlib.metadata
import re
from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gmn.errors import NetworkError
from gmn.graph import NetworkGraph

SEED, FRESH = 0, 1  # seeds of the inputs that are traced, and of those that are compared
NOISE = 0.01  # of the spread of the features
PACKAGES = ("torch", "torchvision", "timm", "transformers")


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give norms statistics and affines that differ everywhere, so that a swapped one shows; in place, eval mode.

    Parameters that are constant (biases, scales, tables) get noise; running statistics are drawn.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.dim() < 2 or bool((parameter == parameter.flatten()[0]).all())):
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor that the network returns.

    Raises:
        NetworkError: if there is none, or one is not finite, so that nothing could be compared.
    """
    torch.manual_seed(SEED)  # some networks draw numbers in eval mode too
    tensors = [leaf.clone() for leaf in tree_flatten(model(*arguments))[0] if isinstance(leaf, Tensor)]
    if not tensors or not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NetworkError("the network's outputs cannot be compared", expected="finite tensors")
    return tensors


def equal(mine: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all tensors are the same, bit for bit."""
    return len(mine) == len(others) and all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def differing(model: nn.Module, other: nn.Module) -> list[str]:
    """Names of the state-dict entries that are not equal."""
    mine, others = model.state_dict(), other.state_dict()
    same = [k for k in mine.keys() & others.keys() if _same(mine[k], others[k])]
    return sorted((mine.keys() | others.keys()) - set(same))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def edited(graph: NetworkGraph) -> NetworkGraph:
    """The graph with a little noise on every number."""
    nodes = graph.node_features
    spread = nodes.std(dim=0, correction=0).clamp(min=NOISE)
    edges = tuple(e + NOISE * e.std(correction=0).clamp(min=NOISE) * torch.randn_like(e) for e in graph.edge_features)
    return graph.replace(nodes + NOISE * spread * torch.randn_like(nodes), edges)


def unmoved(changed: nn.Module, graph: NetworkGraph) -> list[str]:
    """Parameters that the graph claims to hold and that an edit does not reach."""
    assert graph.template is not None
    before = dict(graph.template.named_parameters())
    after = dict(changed.named_parameters())
    return [name for name in graph.spec.shapes if torch.equal(before[name], after[name])]


def aggregated(carried: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Numbers of parameters by name; names that differ in their numbers only are one, largest first.

    >>> aggregated({"blocks.0.scale": (4,), "blocks.1.scale": (4,), "token": (1, 1, 16)})
    {'token': 16, 'blocks.*.scale': 8}
    """
    sizes: dict[str, int] = defaultdict(int)
    for name, shape in carried.items():
        sizes[re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)] += torch.Size(shape).numel()
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def versions() -> dict[str, str]:
    """The installed versions of what the networks come from."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
