"""Contract of `gmn.head_pruning`, and of `gmn.groups.inside`.

* Heads and nodes of every layer end at the ratio, whether or not a score ever falls below the threshold; the residual
  stream stays whole; the mask is over the original network's nodes and is the shape of what is left.
* What the loss does not need goes first; what is gone stays gone; when all layers are at their ratio, scoring stops.
* A score multiplies what a unit hands on, queries and keys never; the scores stay behind in the weights that read.
* The original is not changed; a seed decides everything; only steps that were taken are counted.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from reading import Made
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import gmn.head_pruning
from gmn.convert import to_graph
from gmn.costs import training_flops
from gmn.data import Split
from gmn.errors import PruningError
from gmn.graph import GraphSpec, NodeGroup
from gmn.groups import Couplings, couplings, inside
from gmn.head_pruning import _Scored, head_prune
from gmn.settings_vote import HeadPruning

STILL = 1e-30
"""A learning rate at which nothing changes."""


def quick(**changes: Any) -> HeadPruning:
    return HeadPruning(**{"iterations": 4, "final_iterations": 2, "batch_size": 8, "lr": 1e-3, **changes})


def example() -> Tensor:
    return torch.zeros(1, 3, 8, 8)


def task(count: int = 16) -> Split:
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Split(images, torch.arange(count) % 5, torch.full((3,), 0.5), torch.full((3,), 0.3))


def vit(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=depth, num_heads=4, mlp_ratio=2, num_classes=5
    )
    with torch.no_grad():
        for block in model.blocks:  # initialised so small that blocks hardly count
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.weight.mul_(10)
    return model.eval()


def nodes_of(spec: GraphSpec, name: str) -> slice:
    group = next(group for group in spec.groups if group.name == name)
    return slice(group.start, group.start + group.size)


def left(model: nn.Module, keep: Tensor, name: str) -> list[int]:
    return keep[nodes_of(to_graph(model, example()).spec, name)].nonzero().flatten().tolist()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights of every step with scores."""
    seen: list[dict[str, Tensor]] = []

    def call(model: nn.Module, weights: dict[str, Tensor], args: tuple[Tensor, ...]) -> Tensor:
        seen.append({name: weight.detach().clone() for name, weight in weights.items()})
        return functional_call(model, weights, args)

    monkeypatch.setattr(gmn.head_pruning, "functional_call", call)
    return seen


# -- ratios ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "heads", "nodes"), [(0.5, 2, 24), (0.75, 1, 12), (0.95, 1, 2)])
def test_every_layer_ends_at_its_ratio(ratio: float, heads: int, nodes: int) -> None:
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    shrunk = head_prune(model, task(), quick(threshold=0.9), example(), ratio=ratio, seed=1)
    for block in shrunk.model.blocks:
        assert block.attn.num_heads == heads
        assert (block.attn.qkv.out_features, block.attn.proj.in_features) == (18 * heads, 6 * heads)
        assert (block.mlp.fc1.out_features, block.mlp.fc2.in_features) == (nodes, nodes)
        assert block.attn.proj.out_features == block.mlp.fc2.out_features == 24
    spec = to_graph(model, example()).spec
    keep = shrunk.keep.validate(spec, inside(spec, couplings(spec))).keep
    assert int((~keep).sum()) == 2 * (24 - 6 * heads) + 2 * (48 - nodes)
    assert to_graph(shrunk.model, example()).spec.num_nodes == int(keep.sum())
    assert not shrunk.model.training
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_ratio_is_reached_though_no_score_falls() -> None:
    model = vit()
    config = quick(penalty=0.0, score_lr=STILL, iterations=3, final_iterations=0)
    shrunk = head_prune(model, task(), config, example(), ratio=0.75)
    assert [(b.attn.num_heads, b.mlp.fc1.out_features) for b in shrunk.model.blocks] == [(1, 12)] * 2
    assert shrunk.training_flops == training_flops(model, example(), 3 * 8)
    assert not shrunk.model.training


def test_scoring_stops_when_all_layers_are_at_their_ratio(calls: list[dict[str, Tensor]]) -> None:
    """One step takes every score from 1 to 0.4."""
    model = vit()
    config = quick(penalty=100.0, score_lr=0.6, iterations=50, final_iterations=3)
    shrunk = head_prune(model, task(), config, example(), ratio=0.5)
    assert len(calls) == 1
    assert [(b.attn.num_heads, b.mlp.fc1.out_features) for b in shrunk.model.blocks] == [(2, 24)] * 2
    left_over = 50 - 1 + 3  # steps of J that were not needed fine-tune, as the last K do
    expected = training_flops(model, example(), 8) + training_flops(shrunk.model, example(), left_over * 8)
    assert shrunk.training_flops == expected


def test_layers_at_their_ratio_take_no_steps(calls: list[dict[str, Tensor]]) -> None:
    model = vit(1)
    shrunk = head_prune(model, task(), quick(lr=STILL), example(), ratio=1e-3)
    assert not calls
    assert shrunk.training_flops == training_flops(model, example(), (4 + 2) * 8)  # all of them fine-tune
    assert bool(shrunk.keep.keep.all())
    pairs = zip(shrunk.model.parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in pairs)


# -- what goes ---------------------------------------------------------------------------------------------------------


def colours(dead: tuple[int, ...], *, by: str) -> tuple[nn.Module, Split]:
    """Three colours to tell apart, and a network in which one unit answers to each; the dead ones are of no use."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3, bias=False)
    )
    conv, classifier = model[0], model[4]
    live = [unit for unit in range(6) if unit not in dead]
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
        for colour, unit in enumerate(live):
            conv.weight[unit, colour] = classifier.weight[colour, unit] = 1.0
        if by == "silent":
            conv.bias[list(dead)] = -1.0
            classifier.weight[:, list(dead)] = 1.0
        else:
            conv.weight[list(dead)] = 1.0
    labels = torch.arange(24) % 3
    images = (F.one_hot(labels)[:, :, None, None].expand(24, 3, 8, 8) * 255).to(torch.uint8)
    return model, Split(images, labels, torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("by", ["silent", "unread"])
@pytest.mark.parametrize(("threshold", "steps"), [(0.5, 11), (0.01, 13)])
def test_nodes_of_no_use_go(by: str, threshold: float, steps: int) -> None:
    """By the threshold, after ten steps of 0.05, or as the lowest when the steps are over."""
    model, split = colours((1, 3, 4), by=by)
    config = quick(iterations=13, final_iterations=0, lr=STILL, penalty=1e-6, threshold=threshold)
    shrunk = head_prune(model, split, config, example(), ratio=0.5)
    assert left(model, shrunk.keep.keep, "0") == [0, 2, 5]
    costs = training_flops(model, example(), steps * 8), training_flops(shrunk.model, example(), (13 - steps) * 8)
    assert shrunk.training_flops == sum(costs)


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("by", ["silent", "unread"])
def test_a_head_of_no_use_goes(dead: int, by: str) -> None:
    """The labels are what the network says, so the only head that speaks can but gain from a higher score."""
    torch.manual_seed(3)

    def run(self: Any, images: Tensor) -> Tensor:
        return self.fc(self.attn(self.norm(self.patch(images).flatten(2).transpose(1, 2))).mean(1))

    model = Made(
        run,
        patch=nn.Conv2d(3, 8, 4, 4),
        norm=nn.LayerNorm(8),
        attn=Attention(8, num_heads=2, proj_bias=False),
        fc=nn.Linear(8, 5, bias=False),
    )
    part = slice(4 * dead, 4 * dead + 4)
    with torch.no_grad():
        if by == "silent":
            model.attn.qkv.weight[16:][part] = 0.0
        else:
            model.attn.proj.weight[:, part] = 0.0
    split = task()
    says = model(next(split.batches(16))[0]).argmax(1)
    split = Split(split.images, says, split.mean, split.std)
    config = quick(iterations=20, final_iterations=0, lr=STILL, penalty=1e-6, batch_size=16)
    shrunk = head_prune(model, split, config, example(), ratio=0.5)
    assert left(model, shrunk.keep.keep, "attn.qkv") == [n for n in range(8) if n // 4 != dead]


def scored_colours() -> tuple[_Scored, Tensor]:
    """Scores of a network, half of whose six units must go, and the channels of the units."""
    model, _ = colours((1, 3, 4), by="silent")
    spec = to_graph(model, example()).spec
    coupled = inside(spec, couplings(spec))
    return _Scored(model, spec, coupled, 0.5), coupled.channel[nodes_of(spec, "0")]


def test_the_highest_stay_where_too_many_fall() -> None:
    scored, units = scored_colours()

    def after(scores: list[float], threshold: float) -> list[int]:
        with torch.no_grad():
            scored.scores[units] = torch.tensor(scores)
        scored.drop(threshold)
        return scored.alive[units].nonzero().flatten().tolist()

    assert after([0.9, 0.4, 0.8, 0.5, 0.7, 0.6], 0.5) == [0, 2, 3, 4, 5]
    assert after([0.1, 0.9, 0.3, 0.2, 0.4, -0.5], 0.5) == [2, 3, 4]
    assert after([0.1, 0.9, 0.3, 0.2, 0.4, 0.5], 1.0) == [2, 3, 4]
    assert bool(scored.alive[~scored.coupled.prunable].all())


def test_what_is_gone_stays_gone(calls: list[dict[str, Tensor]]) -> None:
    config = quick(iterations=25, penalty=1e-3, score_lr=0.1, threshold=0.6)
    head_prune(vit(), task(), config, example(), ratio=0.75)
    counts = set()
    for name in ("blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight"):
        gone = [(call[name] == 0).all(0) for call in calls]
        assert all(bool(after[before].all()) for before, after in itertools.pairwise(gone))
        assert not bool(gone[0].any())
        assert int(gone[-1].sum()) <= 0.75 * len(gone[-1])
        counts |= {int(columns.sum()) for columns in gone}
    assert len(counts) > 3  # they went one after the other


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_stay_behind_in_the_weights_that_read() -> None:
    """With weights that do not move: the original with its heads and nodes times the scores is what comes back."""
    model = vit()
    config = quick(lr=STILL, iterations=6, final_iterations=0, threshold=0.9, penalty=1e-3)
    shrunk = head_prune(model, task(), config, example(), ratio=0.5)
    scaled = copy.deepcopy(model)
    for index, (old, new) in enumerate(zip(scaled.blocks, shrunk.model.blocks, strict=True)):
        for reader, now, name in (
            (old.attn.proj, new.attn.proj, "attn.qkv"),
            (old.mlp.fc2, new.mlp.fc2, "mlp.fc1"),
        ):
            kept = left(model, shrunk.keep.keep, f"blocks.{index}.{name}")
            factors = now.weight / reader.weight[:, kept]
            scores = torch.zeros(reader.in_features)
            scores[kept] = factors.detach().mean(0)
            assert torch.allclose(factors, scores[kept].expand_as(factors), atol=1e-4)
            assert float((scores[kept] - 1).abs().max()) > 0.01
            reader.register_forward_pre_hook(lambda _, args, scores=scores: args[0] * scores)
            if name == "attn.qkv":
                by_head = scores.view(4, 6)
                assert torch.allclose(by_head, by_head[:, :1].expand(4, 6), atol=1e-4)
    images = next(task().batches(8))[0]
    with torch.no_grad():
        assert torch.allclose(shrunk.model(images), scaled(images), atol=1e-4)
        assert not torch.allclose(shrunk.model(images), model(images), atol=1e-2)


def test_queries_and_keys_are_not_scaled(calls: list[dict[str, Tensor]]) -> None:
    model = vit()
    config = quick(lr=STILL, final_iterations=0, penalty=100.0, score_lr=0.1)
    shrunk = head_prune(model, task(), config, example(), ratio=0.5)
    readers = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.proj", "mlp.fc2")}
    assert len(calls) == 4
    assert all(set(call) == readers for call in calls)
    for step, call in enumerate(calls):
        for name, weight in call.items():
            assert torch.allclose(weight, model.state_dict()[name] * (1 - 0.1 * step), atol=1e-4)
    for index, block in enumerate(shrunk.model.blocks):
        heads = left(model, shrunk.keep.keep, f"blocks.{index}.attn.qkv")
        rows = model.blocks[index].attn.qkv.weight.view(3, 24, 24)[:, heads]
        assert torch.equal(block.attn.qkv.weight.view(3, 12, 24), rows)


def test_layers_at_their_ratio_are_penalised_no_more() -> None:
    scored, units = scored_colours()
    with torch.no_grad():
        scored.scores[units] = torch.tensor([0.9, 0.4, 0.8, -0.5, 0.7, 0.6])
    assert scored.norm().item() == pytest.approx(3.9)
    scored.drop(0.5)
    assert scored.norm().item() == pytest.approx(3.0)
    scored.drop(0.7)
    assert scored.norm().item() == 0


def test_a_unit_that_no_weight_reads_is_refused() -> None:
    def run(self: Any, images: Tensor) -> Tensor:
        self.aside(images.flatten(1))
        return self.last(F.relu(self.first(images.flatten(1))))

    model = Made(run, aside=nn.Linear(192, 7), first=nn.Linear(192, 8), last=nn.Linear(8, 5))
    with pytest.raises(PruningError, match=r"no weight reads .* got 7 units without; in aside"):
        head_prune(model, task(), quick(), example(), ratio=0.5)


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_network_still_learns() -> None:
    labels = torch.arange(40) % 5
    shades = (labels * 50)[:, None, None, None].expand(40, 3, 8, 8)
    noise = torch.randint(0, 40, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    split = Split((shades + noise).to(torch.uint8), labels, torch.full((3,), 0.4), torch.full((3,), 0.3))
    config = quick(iterations=40, final_iterations=60, lr=3e-3, batch_size=20)
    shrunk = head_prune(vit(), split, config, example(), ratio=0.75)
    images, target = next(split.batches(40))
    assert float((shrunk.model(images).argmax(1) == target).float().mean()) > 0.9


@pytest.mark.parametrize(("ratio", "last"), [(0.5, 0), (1e-3, 2)], ids=["with scores", "without"])
def test_a_seed_decides_everything(ratio: float, last: int) -> None:
    config = quick(final_iterations=last)
    runs = [head_prune(vit(1), task(), config, example(), ratio=ratio, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    assert torch.equal(first, again)
    assert torch.equal(runs[0].keep.keep, runs[1].keep.keep)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    inside_autocast = []

    def call(model: nn.Module, weights: dict[str, Tensor], args: tuple[Tensor, ...]) -> Tensor:
        inside_autocast.append(torch.is_autocast_enabled("cpu"))
        return functional_call(model, weights, args)

    monkeypatch.setattr(gmn.head_pruning, "functional_call", call)
    exact, rough = (head_prune(vit(), task(), quick(bf16=b), example(), ratio=0.5) for b in (False, True))
    assert inside_autocast == [False] * 4 + [True] * 4
    weights = rough.model.blocks[0].mlp.fc2.weight
    assert weights.dtype == torch.float32
    assert bool(torch.isfinite(weights).all())
    assert not torch.equal(weights, exact.model.blocks[0].mlp.fc2.weight)


# -- which units -------------------------------------------------------------------------------------------------------


def test_a_group_in_several_layers_is_a_stream() -> None:
    """Layers a and c write to one stream of two channels; b has three of its own, d one."""
    groups = [NodeGroup(n, s, size, "linear") for n, s, size in (("a", 0, 2), ("b", 2, 3), ("c", 5, 2), ("d", 7, 1))]
    spec = GraphSpec(tuple(groups), (), (), (), (), (), {}, {}, (), ())
    channel, group = torch.tensor([0, 1, 2, 3, 4, 0, 1, 5]), torch.tensor([0, 0, 1, 1, 1, 2])
    coupled = Couplings(channel, group, ("a", "b", "d"), {2: "network output"})
    assert inside(spec, coupled).frozen == {0: "residual stream", 2: "network output"}
    assert inside(spec, coupled).prunable.tolist() == [False, False, True, True, True, False]
    assert coupled.frozen == {2: "network output"}
    known = Couplings(channel, group, ("a", "b", "d"), {0: "network input"})
    assert inside(spec, known).frozen == {0: "network input"}


def test_heads_and_nodes_of_a_vit_are_inside() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5
    )
    spec = to_graph(model, torch.zeros(1, 3, 32, 32)).spec
    coupled = inside(spec, couplings(spec))
    sizes = {name: int((coupled.group == g).sum()) for g, name in enumerate(coupled.names) if g not in coupled.frozen}
    assert sizes == {
        "blocks.0.attn.qkv": 4,
        "blocks.0.mlp.fc1": 192,
        "blocks.1.attn.qkv": 4,
        "blocks.1.mlp.fc1": 192,
    }
    stream = next(g for g, name in enumerate(coupled.names) if name == "patch_embed.proj")
    assert coupled.frozen[stream] == "residual stream"


def test_a_plain_network_has_units_in_every_hidden_layer() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 5)),
    ).eval()
    shrunk = head_prune(model, task(), quick(final_iterations=0), example(), ratio=0.75)
    assert [tuple(layer.weight.shape[:2]) for layer in shrunk.model if isinstance(layer, (nn.Conv2d, nn.Linear))] == [
        *((2, 3), (5, 18), (5, 5)),
    ]
    assert shrunk.model[1].num_features == 2
    assert bool((shrunk.model[1].running_mean != 0).all())  # trained in train mode
    assert bool((model[1].running_mean == 0).all())


def test_a_layer_whose_size_is_written_in_the_code_stays_whole() -> None:
    def run(self: Any, images: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(F.relu(self.first(images)).view(-1, 512))))

    model = Made(run, first=nn.Conv2d(3, 8, 1), hidden=nn.Linear(512, 20), last=nn.Linear(20, 5))
    shrunk = head_prune(model, task(), quick(), example(), ratio=0.75)
    assert (shrunk.model.first.out_channels, shrunk.model.hidden.out_features) == (8, 5)


def test_a_network_with_nothing_inside_its_blocks() -> None:
    def run(self: Any, images: Tensor) -> Tensor:
        stream = self.first(images)
        return self.last((stream + self.second(stream)).mean((2, 3)))

    model = Made(run, first=nn.Conv2d(3, 8, 1), second=nn.Conv2d(8, 8, 1), last=nn.Linear(8, 5))
    reasons = "network input; network output; residual stream"
    with pytest.raises(PruningError, match=f"nothing can be pruned: all channels must stay: {reasons}"):
        head_prune(model, task(), quick(), example(), ratio=0.5)
