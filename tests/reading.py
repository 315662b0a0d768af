"""What the tests of the rules ask of a graph: the exact way back, and where numbers lie."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from gmn.convert import to_graph, to_model
from gmn.graph import NetworkGraph
from gmn.groups import KeepMask, couplings
from gmn.surgery import remove
from gmn.trace import split_inputs


class Made(nn.Module):
    """A network written as one function of itself and its inputs; its layers and parameters are given by name."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def learnt(*shape: int) -> nn.Parameter:
    """A parameter of that shape."""
    return nn.Parameter(torch.zeros(shape))


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter and no statistic is 0 or 1; signals keep their size. In place, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda t, low, high: low + (high - low) * torch.rand(t.shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        for tensor in model.parameters():
            bound = max(1, tensor[0].numel()) ** -0.5 if tensor.dim() > 1 else 0.0
            tensor.copy_(draw(tensor, -1.7 * bound, 1.7 * bound) if bound else draw(tensor, 0.2, 1.3))
        for name, tensor in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.copy_(draw(tensor, 0.1, 0.9))
    return model.eval()


def fresh(inputs: Any, seed: int = 1) -> Any:
    """Other inputs of the same shapes; indices stay below the largest one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        return torch.randint(0, int(leaf.max()) + 1, leaf.shape, generator=generator)

    return tree_map(draw, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that come out of a network in eval mode."""
    args, kwargs = split_inputs(inputs)
    with torch.no_grad():
        result = copy.deepcopy(model).eval()(*args, **kwargs)
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]


def check(model: nn.Module, inputs: Any, *, carried: tuple[str, ...] = (), **options: Any) -> NetworkGraph:
    """The graph, after checking it against the network.

    Every parameter is held by exactly one address or carried (those of `carried`), the features are its numbers, and
    the way back gives the network bit for bit, even where the template has lost all numbers that the graph holds.
    """
    graph = to_graph(model, inputs, **options)
    assert set(graph.spec.carried) == set(carried)
    assert set(graph.spec.shapes) == dict(model.named_parameters()).keys() - set(carried)
    assert_held_once(graph)
    assert_features_are_parameters(graph, model)
    blank = copy.deepcopy(model)
    for name, parameter in blank.named_parameters():
        if name not in carried:
            parameter.data.fill_(torch.nan)
    again = to_model(dataclasses.replace(graph, template=blank))
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    found, wanted = (outputs(network, fresh(inputs)) for network in (again, model))
    assert wanted
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    return graph


def assert_held_once(graph: NetworkGraph) -> None:
    """Every number of every parameter in the graph has exactly one home."""
    spec = graph.spec
    counts = {name: torch.zeros(shape) for name, shape in spec.shapes.items()}
    for slot in spec.edge_slots:
        if slot.home:
            whole = slot.canonical(counts[slot.param]).contiguous()
            slot.write(whole, slot.read(counts[slot.param]) + 1)
            counts[slot.param] = slot.restore(whole, spec.shapes[slot.param])
    for slot in spec.node_slots:
        if slot.home and slot.trainable:
            flat = counts[slot.param].flatten().clone()
            slot.write(flat, slot.read(flat) + 1)
            counts[slot.param] = flat.view(spec.shapes[slot.param])
    assert [name for name, count in counts.items() if count.unique().tolist() != [1.0]] == []


def assert_features_are_parameters(graph: NetworkGraph, model: nn.Module) -> None:
    """Every address, home or not, points at the numbers of its parameter; what no address covers is a default."""
    spec = graph.spec
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    wanted = torch.tensor(spec.defaults, dtype=graph.node_features.dtype).repeat(spec.num_nodes, 1)
    for node in spec.node_slots:
        wanted[node.nodes[0] : sum(node.nodes), node.column] = node.read(tensors[node.param].detach())
    assert torch.equal(graph.node_features, wanted)
    for edge in spec.edge_slots:
        assert torch.equal(graph.edge_features[edge.block][..., list(edge.taps)], edge.read(tensors[edge.param]))


# Where things are


def sizes(graph: NetworkGraph) -> dict[str, int]:
    """Size of every node group; a name that comes again gets a `#2`."""
    return {name: len(nodes) for name, nodes in groups(graph).items()}


def groups(graph: NetworkGraph) -> dict[str, range]:
    """Nodes of every group; a name that comes again gets a `#2`."""
    found: dict[str, range] = {}
    for group in graph.spec.groups:
        again = sum(name.partition("#")[0] == group.name for name in found)
        found[f"{group.name}#{again + 1}" if again else group.name] = range(group.start, group.start + group.size)
    return found


def blocks(graph: NetworkGraph) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """(name, source group, target group, shape) of every block, in order; ends that are no whole group are ranges."""
    names = {(nodes.start, len(nodes)): name for name, nodes in groups(graph).items()}
    return [(b.name, names.get(b.src, str(b.src)), names.get(b.dst, str(b.dst)), b.shape) for b in graph.spec.blocks]


def features(graph: NetworkGraph, name: str) -> Tensor:
    """[G, O, I, K] of the only block of that name."""
    (found,) = [e for b, e in zip(graph.spec.blocks, graph.edge_features, strict=True) if b.name == name]
    return found


def column(graph: NetworkGraph, group: str, name: str) -> Tensor:
    """One node feature of a group."""
    nodes = groups(graph)[group]
    return graph.node_features[nodes.start : nodes.stop, graph.spec.columns.index(name)]


def together(graph: NetworkGraph, group: str) -> set[str]:
    """The other groups whose k-th node goes with the k-th of this one; fails if other nodes go with it too."""
    channel, found = couplings(graph.spec).channel, groups(graph)
    names = [(name, k) for name, nodes in found.items() for k in range(len(nodes))]
    mates: set[str] | None = None
    for k, node in enumerate(found[group]):
        others = [names[other] for other in (channel == channel[node]).nonzero().flatten().tolist() if other != node]
        assert all(index == k for _, index in others), (group, k, others)
        assert mates is None or mates == {name for name, _ in others}, (group, k, others)
        mates = {name for name, _ in others}
    assert mates is not None
    return mates


def free(graph: NetworkGraph) -> set[str]:
    """Names of the groups of channels that may be removed."""
    coupled = couplings(graph.spec)
    return {coupled.names[int(group)] for group in coupled.group[coupled.prunable].unique()}


def reasons(graph: NetworkGraph, group: str) -> set[str]:
    """Why the nodes of a group must stay: what is said of some of its own nodes."""
    nodes = groups(graph)[group]
    return {why for (start, count), why in graph.spec.frozen if start < nodes.stop and nodes.start < start + count}


# Smaller networks


def some_removed(graph: NetworkGraph, share: float = 0.0, seed: int = 0) -> KeepMask:
    """A mask without one channel of every group that may be pruned, or without about a share of them."""
    coupled = couplings(graph.spec)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    for group in coupled.group[coupled.prunable].unique().tolist():
        own = (coupled.group == group).nonzero().flatten()
        count = max(1, round(share * len(own))) if len(own) > 1 else 0
        keep[own[torch.randperm(len(own), generator=generator)[: min(count, len(own) - 1)]]] = False
    return KeepMask(coupled.nodes(keep))


def silenced(model: nn.Module, graph: NetworkGraph, keep: Tensor) -> nn.Module:
    """A copy in which no weight reads a removed channel."""
    quiet = copy.deepcopy(model)
    parameters = dict(quiet.named_parameters())
    for slot in graph.spec.edge_slots:
        block = graph.spec.blocks[slot.block]
        if slot.canonical_shape[0] == 1 or slot.canonical_shape[1:3] != (1, 1):  # a depthwise kernel reads itself
            alive = keep[block.src[0] : sum(block.src)].view(block.pieces, 1, -1, 1)
            weight = parameters[slot.param].data
            whole = slot.canonical(weight).contiguous()
            slot.write(whole, slot.read(weight) * alive)
            weight.copy_(slot.restore(whole, weight.shape))
    return quiet


def assert_prunable(model: nn.Module, inputs: Any, share: float = 0.0, seed: int = 0) -> None:
    """Every channel that may be removed can be, and the rest computes what the network does without its value."""
    graph = to_graph(model, inputs)
    mask = some_removed(graph, share, seed)
    assert not bool(mask.keep.all()), "nothing to remove"
    smaller = remove(model, graph.spec, mask, inputs)
    found, wanted = (outputs(m, fresh(inputs)) for m in (smaller, silenced(model, graph, mask.keep)))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    again = to_graph(smaller, inputs)
    assert again.spec.num_nodes == int(mask.keep.sum())
