"""Contract of `gmn.overlap`.

* IoU and recall are those of masks worked out by hand, and of Python sets; coupled nodes count as one channel.
* Layers are the prunable groups in the order of the network; frozen groups do not count.
* IoU is symmetric, 1 for equal masks, 0 for disjoint ones, NaN for two empty ones; d sums to what the target keeps.
* What does not fit is refused.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import Residual, small

from gmn.convert import to_graph
from gmn.errors import PruningError
from gmn.groups import Couplings, couplings
from gmn.overlap import iou, layer_names, recall

# Two inputs; layer "a" of four channels, the first two of two nodes each; layer "b" of four; two outputs.
CHANNEL = torch.tensor([0, 1, 2, 3, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11])
GROUP = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3])
COUPLED = Couplings(CHANNEL, GROUP, ("input", "a", "b", "out"), {0: "network input", 3: "network output"})
NAN = float("nan")


def mask(a: str, b: str) -> Tensor:
    """[N] bool from the channels of both layers: "1100" keeps the first two."""
    return torch.tensor([bit == "1" for bit in f"11{a}{b}11"])[CHANNEL]


def masks(*layers: tuple[str, str]) -> Tensor:
    return torch.stack([mask(*layer) for layer in layers])


def random_masks(number: int, share: float, seed: int) -> Tensor:
    """[number, N]: no layer is emptied."""
    kept = torch.rand(number, len(GROUP), generator=torch.Generator().manual_seed(seed)) < share
    kept[:, ~COUPLED.prunable] = True
    for place, row in enumerate(kept):
        row[2 + place % 4] = row[6 + place % 3] = True
    return kept[:, CHANNEL]


def sets(keep: Tensor) -> list[set[int]]:
    """The channels of each prunable layer that a mask keeps, node by node."""
    kept = {channel for node, channel in enumerate(CHANNEL.tolist()) if keep[node]}
    return [{channel for channel in kept if GROUP[channel] == group} for group in (1, 2)]


def assert_same(found: Tensor, expected: list[list[float]] | list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True, rtol=0, atol=1e-12)


def test_iou_by_hand() -> None:
    # By nodes the first would be 4/5: its two shared channels have two nodes each.
    assert_same(iou(mask("1100", "1110"), mask("1101", "0111"), COUPLED), [2 / 3, 2 / 4])
    assert_same(iou(mask("1010", "1000"), mask("0110", "0001"), COUPLED), [1 / 3, 0.0])


def test_iou_with_many_neighbours_is_one_after_the_other() -> None:
    target, others = random_masks(1, 0.5, 0)[0], random_masks(30, 0.5, 1)
    found = iou(target, others, COUPLED)
    assert found.shape == (30, 2)
    assert_same(found, [iou(target, other, COUPLED).tolist() for other in others])
    expected = [[len(s & t) / len(s | t) for s, t in zip(sets(target), sets(other), strict=True)] for other in others]
    assert_same(found, expected)
    assert len(found.unique()) > 4


def test_iou_of_no_neighbours_is_empty() -> None:
    assert iou(mask("1111", "1111"), torch.zeros(0, len(CHANNEL), dtype=torch.bool), COUPLED).shape == (0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_iou_is_symmetric_and_one_for_equal_masks(seed: int) -> None:
    one, two = random_masks(2, 0.6, seed)
    forth, back = iou(one, two, COUPLED), iou(two, one, COUPLED)
    torch.testing.assert_close(forth, back, equal_nan=True)
    assert bool(((forth >= 0) & (forth <= 1)).all())
    assert_same(iou(one, one, COUPLED), [1.0, 1.0])


def test_disjoint_masks_have_iou_0_and_empty_ones_none() -> None:
    assert_same(iou(mask("1100", "0000"), mask("0011", "0000"), COUPLED), [0.0, NAN])


def test_recall_by_hand() -> None:
    neighbours = masks(("1000", "0001"), ("1100", "0001"), ("1010", "1000"))  # votes: a 3 1 1 0, b 1 0 0 2
    found = recall(mask("1100", "0011"), neighbours, COUPLED)
    assert_same(found.b, [[1 / 2, NAN, 1.0], [0.0, 1.0, NAN]])
    assert found.d.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert found.d.dtype == torch.int64


@pytest.mark.parametrize("seed", range(4))
def test_recall_is_that_of_sets(seed: int) -> None:
    target, neighbours = random_masks(1, 0.5, seed)[0], random_masks(5, 0.4, 100 + seed)
    found = recall(target, neighbours, COUPLED)
    for layer, (own, group) in enumerate(zip(sets(target), (1, 2), strict=True)):
        all_channels = torch.eq(GROUP, group).nonzero().flatten().tolist()
        votes = {k: sum(k in sets(other)[layer] for other in neighbours) for k in all_channels}
        with_votes = [{k for k in all_channels if votes[k] == a} for a in range(6)]
        assert found.d[layer].tolist() == [len(b & own) for b in with_votes]
        assert_same(found.b[layer], [len(b & own) / len(b) if b else NAN for b in with_votes[1:]])


@pytest.mark.parametrize("seed", range(4))
def test_recall_counts_every_kept_channel_once_in_any_order_of_neighbours(seed: int) -> None:
    target, neighbours = random_masks(1, 0.5, seed)[0], random_masks(6, 0.3, 50 + seed)
    found, turned = (recall(target, voters, COUPLED) for voters in (neighbours, neighbours.flip(0)))
    assert found.d.sum(dim=1).tolist() == [len(own) for own in sets(target)]
    assert torch.equal(found.d, turned.d)
    torch.testing.assert_close(found.b, turned.b, equal_nan=True, rtol=0, atol=0)


def test_neighbours_that_agree_with_the_target_recall_all_of_it() -> None:
    target = mask("1010", "0001")
    found = recall(target, target.expand(4, -1), COUPLED)
    assert_same(found.b, [[NAN, NAN, NAN, 1.0]] * 2)
    assert found.d.tolist() == [[0, 0, 0, 0, 2], [0, 0, 0, 0, 1]]


def test_layers_are_the_prunable_groups_in_order() -> None:
    assert layer_names(COUPLED) == ["a", "b"]
    spec = to_graph(small(Residual()), torch.zeros(1, 3, 8, 8)).spec
    coupled = couplings(spec)
    assert layer_names(coupled) == ["0", "1.conv1"]
    full = torch.ones(spec.num_nodes, dtype=torch.bool)
    residual = int(coupled.channel[3])  # the first channel of "0", which 1.conv2 adds to
    keep = coupled.nodes(torch.arange(coupled.num_channels) != residual)
    assert int((~keep).sum()) > 1
    assert_same(iou(full, keep, coupled), [5 / 6, 1.0])


def test_a_network_with_nothing_to_prune_has_no_layers() -> None:
    fixed = Couplings(CHANNEL, GROUP, COUPLED.names, dict.fromkeys(range(4), "fixed"))
    full = torch.ones(len(CHANNEL), dtype=torch.bool)
    assert layer_names(fixed) == []
    assert iou(full, full[None], fixed).shape == (1, 0)
    assert recall(full, full[None], fixed).d.shape == (0, 2)


ALL = mask("1111", "1111")
TORN = ALL.clone()
TORN[2] = False  # one of the two nodes of a's first channel


@pytest.mark.parametrize(
    ("target", "neighbours", "message"),
    [
        (ALL[:-1], ALL[None], r"expected bool \[N\] with N = 14 nodes; got torch.bool \[13\]"),
        (ALL, ALL[None, :-1], r"expected bool \[neighbours, N\] with N = 14 nodes; got torch.bool \[1, 13\]"),
        (ALL.float(), ALL[None], r"got torch.float32 \[14\]"),
        (ALL, ALL[None].long(), r"got torch.int64 \[1, 14\]"),
        (ALL[None], ALL[None], r"expected bool \[N\] with N = 14 nodes; got torch.bool \[1, 14\]"),
        (ALL, ALL[None, None], r"got torch.bool \[1, 1, 14\]"),
        (torch.tensor(True), ALL[None], r"got torch.bool \[\]"),
        (TORN, ALL[None], "separates channels that are coupled"),
        (ALL, torch.stack([ALL, TORN]), "separates channels that are coupled"),
    ],
)
def test_what_does_not_fit_is_refused(target: Tensor, neighbours: Tensor, message: str) -> None:
    for function in (iou, recall):
        with pytest.raises(PruningError, match=message):
            function(target, neighbours, COUPLED)


def test_recall_needs_neighbours_that_vote() -> None:
    with pytest.raises(PruningError, match="no neighbour"):
        recall(ALL, ALL[None][:0], COUPLED)
    with pytest.raises(PruningError, match=r"expected bool \[neighbours, N\]"):
        recall(ALL, ALL, COUPLED)
