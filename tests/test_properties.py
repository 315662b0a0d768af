"""Contract of the graph on random networks of supported pieces.

* Network to graph to network is exact; every number of every parameter has one home.
* Reordering the channels of a group of coupled channels, the same way wherever they are, changes the graph's order and
  nothing of the function.
* A change of the features changes the parameters, each by what was added to its own features, and the function.
* Channels that may be removed can be, and the rest computes what the network does without them.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from pieces import networks
from reading import assert_prunable, check, outputs, some_removed
from torch import Tensor, nn
from torch.func import functional_call

from gmn.convert import to_graph, to_model
from gmn.graph import NetworkGraph
from gmn.groups import couplings

Network = tuple[nn.Module, Tensor]
QUICK = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@QUICK
@given(networks())
def test_round_trip(network: Network) -> None:
    graph = check(*network)
    assert graph.spec.num_nodes > 6


def reordered(graph: NetworkGraph, seed: int = 0) -> Tensor:
    """An order that permutes every group of channels that may be pruned, by one permutation wherever they are."""
    generator = torch.Generator().manual_seed(seed)
    spec, coupled = graph.spec, couplings(graph.spec)
    owner = torch.repeat_interleave(torch.tensor([group.size for group in spec.groups]))
    order = torch.arange(spec.num_nodes)
    for group in coupled.group[coupled.prunable].unique().tolist():
        alike: dict[tuple[int, ...], list[Tensor]] = {}  # channels with nodes in the same places
        for channel in (coupled.group == group).nonzero().flatten().tolist():
            nodes = (coupled.channel == channel).nonzero().flatten()
            alike.setdefault(tuple(owner[nodes].tolist()), []).append(nodes)
        for members in alike.values():
            for new, old in enumerate(torch.randperm(len(members), generator=generator).tolist()):
                order[members[new]] = members[old]
    return order


def with_buffers(graph: NetworkGraph) -> nn.Module:
    """The network of a graph, with running statistics from the graph too."""
    model = to_model(graph)
    buffers = dict(model.named_buffers())
    for slot in graph.spec.node_slots:
        if not slot.trainable:
            values = graph.node_features[slot.nodes[0] : sum(slot.nodes), slot.column]
            slot.write(buffers[slot.param].view(-1), values)
    return model


@QUICK
@given(networks())
def test_the_order_of_channels_does_not_matter(network: Network) -> None:
    model, x = network
    graph = to_graph(model, x)
    order = reordered(graph)
    permuted = graph.permute(order)
    other = with_buffers(permuted)
    (found,), (wanted,) = outputs(other, x), outputs(model, x)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    again = to_graph(other, x)
    assert again.spec == graph.spec
    assert torch.equal(again.node_features, permuted.node_features)
    assert all(torch.equal(a, b) for a, b in zip(again.edge_features, permuted.edge_features, strict=True))
    back = permuted.permute(order.argsort())
    assert torch.equal(back.node_features, graph.node_features)


@QUICK
@given(networks())
def test_features_reach_their_parameters_and_the_function(network: Network) -> None:
    model, x = network
    graph = to_graph(model, x)
    nodes = graph.node_features.clone().requires_grad_()
    edges = tuple(e.clone().requires_grad_() for e in graph.edge_features)
    state = graph.replace(nodes + 1, tuple(e + 1 for e in edges)).to_state_dict()
    for name, parameter in model.named_parameters():
        assert torch.allclose(state[name], parameter + 1), name
    assert all(value.requires_grad for value in state.values())
    generator = torch.Generator().manual_seed(0)
    wanted = {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}
    sum((wanted[name] * value).sum() for name, value in state.items()).backward()
    landed = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in (nodes, *edges))
    found = graph.replace(landed[0], landed[1:]).to_state_dict()
    homes = {slot.param for slot in graph.spec.edge_slots if not slot.home}
    assert not homes  # no weight is used twice here
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        changed = functional_call(model, {name: value.detach() for name, value in state.items()}, (x,))
    assert not torch.equal(changed, outputs(model, x)[0])


@QUICK
@given(networks(norms=False))
def test_channels_that_may_go_can_go(network: Network) -> None:
    model, x = network
    if not bool(some_removed(to_graph(model, x)).keep.all()):
        assert_prunable(model, x)
        assert_prunable(model, x, share=0.4, seed=1)
