"""Contract of `gmn.vote`.

* Units are drawn without replacement from p = softmax(votes / tau), layer by layer (chi-square on many draws).
* A small tau follows the majority, a large one ignores it; a seed decides the draw; frozen layers stay whole.
* A kept unit starts from the mean over the neighbours that keep it, and from the origin where none does; also for
  coupled layers whose neighbours keep different units, for norms, and for attention heads.
* What does not fit is refused.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import timm
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from zoo import Residual, small

from gmn.convert import to_graph
from gmn.errors import PruningError
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask, couplings
from gmn.ranking import mask_steps
from gmn.settings import Prune
from gmn.surgery import remove
from gmn.vote import average, counts, draw, prior, vote

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def mlp(hidden: int = 4) -> tuple[nn.Module, GraphSpec, Couplings]:
    """Two inputs, hidden neurons that may go, one output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 1)).eval()
    spec = to_graph(model, torch.zeros(1, 2)).spec
    return model, spec, couplings(spec)


def nodes(spec: GraphSpec, name: str, *dropped: int) -> Tensor:
    """[N] bool: all nodes but some of one group."""
    start = next(group.start for group in spec.groups if group.name == name)
    keep = torch.ones(spec.num_nodes, dtype=torch.bool)
    keep[[start + k for k in dropped]] = False
    return keep


def pairs_of(p: list[float]) -> dict[frozenset[int], float]:
    """Probability of each pair when two are drawn without replacement, by hand: first a, then b of the rest."""
    chance: Counter[frozenset[int]] = Counter()
    for a, b in itertools.permutations(range(len(p)), 2):
        chance[frozenset((a, b))] += p[a] * p[b] / (1 - p[a])
    return dict(chance)


def test_the_draw_follows_the_formula() -> None:
    _, _, coupled = mlp()
    votes = torch.zeros(coupled.num_channels)
    hidden = coupled.prunable.nonzero().flatten()
    votes[hidden] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    wanted = pairs_of(torch.softmax(torch.tensor([0.0, 1.0, 2.0, 3.0]).double() / 2.0, 0).tolist())
    generator, found = torch.Generator().manual_seed(0), Counter[frozenset[int]]()
    for _ in range(6000):
        kept = draw(votes, coupled, 0.5, generator, 2.0)[hidden]
        found[frozenset(kept.nonzero().flatten().tolist())] += 1
    assert set(found) <= set(wanted)
    assert chisquare([found[pair] for pair in wanted], [6000 * chance for chance in wanted.values()]).pvalue > 0.01
    uniform = [1000.0] * len(wanted)
    assert chisquare([found[pair] for pair in wanted], uniform).pvalue < 1e-6  # the test can tell


def test_the_temperature_decides_how_much_the_majority_counts() -> None:
    _, spec, coupled = mlp(6)
    keeps = torch.stack([nodes(spec, "0", 0, 1), nodes(spec, "0", 0, 2), nodes(spec, "0", 0, 1)])
    assert counts(keeps, coupled)[coupled.prunable].tolist() == [0, 1, 2, 3, 3, 3]
    cold = [vote(keeps, coupled, ratio=0.5, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    assert all(torch.equal(mask.keep, nodes(spec, "0", 0, 1, 2)) for mask in cold)
    hot = [vote(keeps, coupled, ratio=0.5, generator=torch.Generator().manual_seed(s), tau=1e6) for s in range(60)]
    start = next(group.start for group in spec.groups if group.name == "0")
    share = torch.stack([mask.keep[start : start + 6] for mask in hot]).float().mean(0)
    assert bool(((share > 0.3) & (share < 0.7)).all())


def test_ties_go_to_the_nearest_neighbour_where_that_is_asked_for() -> None:
    _, spec, coupled = mlp(6)
    near, far, other = (nodes(spec, "0", *dropped) for dropped in ((0, 1, 2), (2, 3, 4), (3, 4, 5)))
    keeps = torch.stack([near, far])
    assert counts(keeps, coupled, "nearest")[coupled.prunable].tolist() == [1.25, 1.25, 0.0, 1.5, 1.5, 2.75]
    for majority, wanted in ((keeps, near), (torch.stack([near, other, other]), other)):
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            found = vote(majority, coupled, ratio=0.5, generator=generator, ties="nearest")
            assert torch.equal(found.keep, wanted)
    chance = [vote(keeps, coupled, ratio=0.5, generator=torch.Generator().manual_seed(s)).keep for s in range(20)]
    assert len({tuple(keep.tolist()) for keep in chance}) > 1


def test_a_seed_decides_and_every_layer_gets_its_number() -> None:
    model = small(Residual(8), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1), width=8)
    spec = to_graph(model, IMAGES).spec
    coupled = couplings(spec)
    keeps = torch.ones(3, spec.num_nodes, dtype=torch.bool)
    one, two, other = (vote(keeps, coupled, ratio=0.75, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one.keep, two.keep)
    assert not torch.equal(one.keep, other.keep)
    one.validate(spec, coupled)
    left = torch.bincount(
        coupled.group[one.keep[[(coupled.channel == c).nonzero()[0, 0] for c in range(len(coupled.group))]]]
    )
    sizes = torch.bincount(coupled.group)
    frozen = torch.tensor([g in coupled.frozen for g in range(len(sizes))])
    assert torch.equal(left[frozen], sizes[frozen])
    assert torch.equal(left[~frozen], (sizes[~frozen] / 4).long())
    smaller = remove(model, spec, one, IMAGES)
    assert smaller[1].conv1.out_channels == 2
    tiny = vote(keeps, coupled, ratio=0.99, generator=torch.Generator().manual_seed(0))
    tiny.validate(spec, coupled)  # one unit of each layer stays


def neighbour(model: nn.Module, spec: GraphSpec, keep: Tensor, x: Tensor, add: float) -> dict[str, Tensor]:
    """The pruned network of a neighbour whose numbers are the model's plus a constant."""
    state = remove(model, spec, KeepMask(keep), x).state_dict()
    return {name: tensor + add if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def test_means_of_two_neighbours_by_hand() -> None:
    model, spec, _ = mlp(4)
    keeps = torch.stack([nodes(spec, "0", 0, 1), nodes(spec, "0", 0, 2)])
    origin, x = dict(model.state_dict()), torch.zeros(1, 2)
    mean = average(
        spec, origin, [neighbour(model, spec, keeps[0], x, 1.0), neighbour(model, spec, keeps[1], x, 3.0)], keeps
    )
    # unit 0: nobody keeps it; 1: the second alone (+3); 2: the first alone (+1); 3: both (+2)
    shift = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert torch.allclose(mean["0.weight"], origin["0.weight"] + shift[:, None])
    assert torch.allclose(mean["0.bias"], origin["0.bias"] + shift)
    assert torch.allclose(mean["2.weight"], origin["2.weight"] + shift)
    assert torch.allclose(mean["2.bias"], origin["2.bias"] + 2.0)
    assert torch.equal(origin["0.weight"], model.state_dict()["0.weight"])  # not changed in place


def test_one_neighbour_is_plain_transfer() -> None:
    model = small(Residual(), nn.PReLU())
    spec = to_graph(model, IMAGES).spec
    keep = nodes(spec, "1.conv1", 2, 5)
    own = neighbour(model, spec, keep, IMAGES, 0.5)
    state = average(spec, dict(model.state_dict()), [own], keep[None])
    full = small(Residual(), nn.PReLU())
    full.load_state_dict(state)
    again = remove(full, spec, KeepMask(keep), IMAGES)
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def test_coupled_layers_and_heads_average_number_by_number() -> None:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3}
    model, x = timm.create_model("vit_tiny_patch16_224", **size).eval(), torch.randn(1, 3, 16, 16)
    spec = to_graph(model, x).spec
    coupled = couplings(spec)
    ((start, _), _) = spec.heads[0]
    keeps = torch.ones(2, spec.num_nodes, dtype=torch.bool)
    stream = next(group.start for group in spec.groups if group.name == "patch_embed.proj")
    keeps[0] = ~torch.isin(coupled.channel, coupled.channel[[start, stream + 3]])  # a head, and channel 3 of the stream
    keeps[1] = ~torch.isin(coupled.channel, coupled.channel[[stream + 7]])
    origin = dict(model.state_dict())
    states = [neighbour(model, spec, keep, x, add) for keep, add in zip(keeps, (2.0, 4.0), strict=True)]
    delta = {name: value - origin[name] for name, value in average(spec, origin, states, keeps).items()}
    qkv = delta["blocks.0.attn.qkv.weight"].view(3, 4, 4, 16)
    assert torch.allclose(qkv[:, 0, :, 0], torch.tensor(4.0))  # head 0: the second neighbour alone
    whole = origin["blocks.0.attn.qkv.weight"].view(3, 4, 4, 16)
    assert torch.equal(qkv[:, 0, :, 7], -whole[:, 0, :, 7])  # head 0 and channel 7: nobody has both
    assert torch.allclose(qkv[:, 1:, :, 3], torch.tensor(4.0))
    assert torch.allclose(qkv[:, 1:, :, 7], torch.tensor(2.0))
    assert torch.allclose(qkv[:, 1:, :, 0], torch.tensor(3.0), atol=1e-6)
    assert torch.allclose(delta["pos_embed"][0, :, [3, 7, 0]], torch.tensor([4.0, 2.0, 3.0]), atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    model, spec, coupled = mlp()
    generator = torch.Generator()
    for keeps in (torch.ones(0, spec.num_nodes, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(
            PruningError, match=rf"do not vote on this network: expected bool \[neighbours, {spec.num_nodes}\]"
        ):
            vote(keeps, coupled, ratio=0.5, generator=generator)
    keeps = torch.ones(1, spec.num_nodes, dtype=torch.bool)
    for ratio, tau in ((1.0, 1.0), (-0.1, 1.0), (0.5, 0.0)):
        with pytest.raises(PruningError, match="malformed vote"):
            vote(keeps, coupled, ratio=ratio, generator=generator, tau=tau)
    pruned = remove(model, spec, KeepMask(nodes(spec, "0", 1)), torch.zeros(1, 2)).state_dict()
    with pytest.raises(
        PruningError,
        match=r"does not fit its mask: expected 8 numbers of type torch.float32; "
        r"got \[3, 2\] of \[4, 2\], torch.float32; in 0\.weight",
    ):
        average(spec, dict(model.state_dict()), [pruned], keeps)
    whole = model.state_dict()
    for other, got in (
        ({}, "nothing"),
        ({name: value.long() for name, value in whole.items()}, r"\[4, 2\] of \[4, 2\]"),
    ):
        with pytest.raises(
            PruningError, match=f"does not fit its mask: expected 8 numbers of type torch.float32; got {got}"
        ):
            average(spec, whole, [other], keeps)


def test_the_prior_by_hand() -> None:
    """Two layers of 2 and 3 channels; three neighbours. Votes 3, 0 and 1, 1, 2: shares 1, 0 and 1/3, 1/3, 2/3."""
    coupled = Couplings(torch.arange(5), torch.tensor([0, 0, 1, 1, 1]), ("a", "b"), {})
    keeps = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 1, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    expected = 2.0 ** torch.tensor([0.5, -0.5, -1 / 9, -1 / 9, 2 / 9])
    torch.testing.assert_close(prior(keeps, coupled, 1.0), expected)
    torch.testing.assert_close(prior(keeps, coupled, 3.0), expected**3)
    assert torch.equal(prior(keeps, coupled, 0.0), torch.ones(5))


def test_the_prior_decides_what_goes_first() -> None:
    """Four equal channels, of which neighbours keep the last two: the first two go."""
    model = small(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1))
    with torch.no_grad():
        for name in ("1.weight", "3.weight"):
            model.get_parameter(name).fill_(1.0)
        model[1].bias.fill_(1.0)
    graph = to_graph(model, torch.zeros(1, 3, 8, 8))
    coupled = couplings(graph.spec)
    keep = torch.ones(1, graph.spec.num_nodes, dtype=torch.bool)
    start = next(g.start for g in graph.spec.groups if g.name == "1")
    keep[0, start : start + 2] = False
    config = Prune(speed_up=1.5, max_ratio=0.6, steps=200)
    state = dict(model.state_dict())
    own = next(iter(mask_steps(state, graph.spec, coupled, config, prior=prior(keep, coupled, 1.0)))).keep
    gone = (~own).nonzero().flatten().tolist()
    assert gone
    assert set(gone) <= {start, start + 1}
