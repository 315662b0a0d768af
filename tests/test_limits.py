"""Contract of `gmn.limits`, `gmn.savings` and of the ways to rank.

* A pattern means every group that a matching layer makes channels of; one that matches nothing is refused.
* Limits, keep-lists and multiples hold in every mask, and in the network that comes out.
* Local ranking takes the same share of every group, its lowest channels; global ranking does not.
* Equal scores: the first channels of the network go first, every time.
* What a channel saves is what cutting it saves; `per_flop` divides by it.
* An error says which limits stopped the ranking.
* The baseline `random` is direct pruning by another draw for each seed.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY
from torch import Tensor, nn
from zoo import graph_of, network, randomise

import gmn
from gmn import pipeline, report
from gmn.convert import to_graph
from gmn.costs import cost
from gmn.errors import PruningError, RecipeError
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask, couplings
from gmn.limits import floors, kept_whole, makers
from gmn.ranking import mask_steps, prune_to
from gmn.recipe import load_recipe
from gmn.savings import Savings, positions
from gmn.settings import Criterion, Prune, Ranking
from gmn.surgery import remove

RESNET = "resnet20B"


@cache
def vit() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.models.vision_transformer.VisionTransformer(**size, num_classes=4).eval(), torch.zeros(1, 3, 8, 8)


def subject(name: str = RESNET) -> tuple[nn.Module, GraphSpec, Couplings]:
    model, spec = (vit()[0], to_graph(*vit()).spec) if name == "vit" else (network(name)[0], graph_of(name).spec)
    return model, spec, couplings(spec)


def counts(mask: KeepMask, coupled: Couplings) -> dict[str, int]:
    """Channels that stay of each group."""
    left = torch.bincount(coupled.group[mask.keep[coupled.first_nodes]], minlength=len(coupled.names))
    return dict(zip(coupled.names, left.tolist(), strict=True))


def course(name: str = RESNET, criterion: Criterion | None = None, **config: Any) -> list[dict[str, int]]:
    """Channels that stay of each group, after each step."""
    model, spec, coupled = subject(name)
    masks = mask_steps(dict(model.state_dict()), spec, coupled, Ranking(**config), criterion)
    return [counts(mask, coupled) for mask in masks]


# Names


def test_a_group_goes_by_the_layers_that_make_it() -> None:
    _, spec, coupled = subject()
    made = makers(spec, coupled)
    group = {name: coupled.names[next(iter(groups))] for name, groups in made.items() if len(groups) == 1}
    assert group["conv1"] == group["layer1.0.conv2"] == group["layer1.2.conv2"] == "conv1"
    assert group["layer2.0.shortcut.0"] == group["layer2.1.conv2"] == "layer2.0.conv2"
    assert group["layer1.0.conv1"] == "layer1.0.conv1"
    assert not any("bn" in name for name in made)
    _, spec, coupled = subject("vit")
    made = makers(spec, coupled)
    assert made["patch_embed.proj"] == made["blocks.0.attn.proj"] == made["blocks.1.mlp.fc2"]
    assert made["blocks.0.attn.qkv"] != made["blocks.1.attn.qkv"]


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        ({"keep": ["layer1.0.conv1"]}, {"layer1.0.conv1"}),
        ({"keep": ["layer1.?.conv2"]}, {"conv1"}),
        ({"keep": ["layer3.*.conv1", "conv1"]}, {"conv1", "layer3.0.conv1", "layer3.1.conv1", "layer3.2.conv1"}),
        ({"limits": {"layer2.1.conv1": 0}}, {"layer2.1.conv1"}),
        ({"limits": {"layer2.1.*": 0.0, "layer2.1.conv1": 0.5}}, {"layer2.1.conv1", "layer2.0.conv2"}),
        ({"keep": ["linear"]}, set()),  # stays anyway, for another reason
    ],
)
def test_patterns_keep_groups_whole(config: dict[str, Any], whole: set[str]) -> None:
    _, spec, coupled = subject()
    frozen = kept_whole(spec, coupled, Ranking(**config)).frozen
    assert {coupled.names[g] for g in frozen.keys() - coupled.frozen.keys()} == whole
    assert all(frozen[g].startswith("prune.") for g in frozen.keys() - coupled.frozen.keys())
    assert all(frozen[g] == reason for g, reason in coupled.frozen.items())
    sizes = torch.bincount(coupled.group).tolist()
    for step in course(**config, steps=10):
        assert all(step[name] == sizes[coupled.names.index(name)] for name in whole)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"keep": ["layer1.0.conv11"]}, r"prune\.keep 'layer1\.0\.conv11'; did you mean 'layer1\.0\.conv1'"),
        ({"limits": {"layer4.*": 0.5}}, r"prune\.limits 'layer4\.\*': 0\.5; layers that make channels: conv1, "),
        ({"keep": ["layer1.0.bn1"]}, r"did you mean .*'layer1\.0\.conv1'"),  # a norm makes no channels
        ({"keep": ["Conv1"]}, r"did you mean 'conv1"),  # capital letters count
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=r"the pattern matches no layer.*" + message):
        course(**config)


def test_a_recipe_with_a_bad_pattern_ends_before_any_training(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [*TINY, "prune.keep=[layer9.*]"])
    with pytest.raises(PruningError, match=r"prune\.keep 'layer9\.\*'"):
        pipeline.meta_train(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").glob("data-models/*"))
    with pytest.raises(RecipeError, match=r"'prune\.limits\.conv1'.*less than 1"):
        load_recipe("quickstart", ["prune.limits={conv1: 1.5}"])


# Limits and multiples


def test_limits_hold_and_replace_the_ratio() -> None:
    config: dict[str, Any] = {"max_ratio": 0.5, "limits": {"layer1.*": 0.25, "layer3.?.conv1": 0.8, "layer3.1.*": 0.6}}
    _, spec, coupled = subject()
    last = course(**config, steps=40)[-1]
    # 16, 32 and 64 channels; the lowest of several limits counts, also above the ratio
    wanted = {"layer1.0.conv1": 12, "conv1": 12, "layer2.0.conv1": 16, "layer2.0.conv2": 16}
    wanted |= {"layer3.0.conv1": 64 - 51, "layer3.1.conv1": 64 - 38, "layer3.0.conv2": 64 - 38}
    assert {name: last[name] for name in wanted} == wanted
    assert floors(spec, coupled, Ranking(**config))[coupled.names.index("conv1")] == 12


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_what_stays_is_a_multiple(ranking: Any) -> None:
    _, _, coupled = subject()
    sizes = dict(zip(coupled.names, torch.bincount(coupled.group).tolist(), strict=True))
    frozen = {coupled.names[g] for g in coupled.frozen}
    steps = course(round_to=8, steps=30, ranking=ranking)
    assert all(step[name] % 8 == 0 for step in steps for name in sizes.keys() - frozen)
    assert all(step[name] == sizes[name] for step in steps for name in frozen)
    assert steps[-1] == {name: sizes[name] if name in frozen else 8 for name in sizes}  # 90 % of 64 leaves 7
    for before, after in pairwise(steps):
        assert before != after
        assert all(after[name] <= before[name] for name in sizes)


def test_multiples_bring_back_what_went_last() -> None:
    """Every group keeps what it keeps in the ranking without multiples, when it has that many channels."""
    model, spec, coupled = subject("vit")
    own: dict[str, Any] = {"state": dict(model.state_dict()), "spec": spec, "coupled": coupled}
    half: dict[str, Any] = {"steps": 1000, "max_ratio": 0.5}  # which leaves multiples of 4 anyway
    exact = [KeepMask(torch.ones(spec.num_nodes, dtype=torch.bool)), *mask_steps(**own, config=Ranking(**half))]
    rounded = list(mask_steps(**own, config=Ranking(**half, round_to=4)))
    assert len(rounded) < len(exact) / 3
    for group in range(len(coupled.names)):
        nodes = coupled.group[coupled.channel] == group
        by_count = {int(mask.keep[nodes].sum()): mask.keep[nodes] for mask in exact}
        assert all(torch.equal(mask.keep[nodes], by_count[int(mask.keep[nodes].sum())]) for mask in rounded)


def test_groups_that_a_multiple_does_not_fit() -> None:
    """12 channels stay 12 or 8; 6 are free; heads count heads, and 3 are free too."""
    sizes = (4, 12, 6, 2)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))
    spec = to_graph(model, torch.zeros(1, 4)).spec
    steps = list(mask_steps(dict(model.state_dict()), spec, couplings(spec), Ranking(round_to=8, steps=100)))
    found = [counts(mask, couplings(spec)) for mask in steps]
    assert {step["0"] for step in found} == {12, 8}
    assert {step["1"] for step in found} >= {5, 4, 3, 2, 1}
    last = course("vit", round_to=8, steps=30)[-1]
    assert last["blocks.0.attn.qkv"] == 1
    assert (last["patch_embed.proj"], last["blocks.0.mlp.fc1"]) == (8, 16)  # 90 % of 96 leaves 10


def test_the_pruned_network_has_them() -> None:
    model, x = network(RESNET)
    limits = {"layer1.*": 0.5}
    result = gmn.prune(model, x, speed_up=2.0, keep=["layer3.2.conv1"], limits=limits, round_to=8, steps=50)
    layers = {n: m.out_channels for n, m in result.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(width % 8 == 0 for width in layers.values())
    assert layers["layer3.2.conv1"] == 64
    assert all(width >= 8 for name, width in layers.items() if name.startswith("layer1"))
    assert 2.0 <= result.report["speed_up"] < 2.6
    assert result.model(torch.zeros(2, *x.shape[1:])).shape == (2, 10)


def test_an_error_names_the_limits() -> None:
    model, x = network(RESNET)
    config = Prune(speed_up=9.0, max_ratio=0.5, limits={"layer2.*": 0.3}, keep=["layer3.*"], round_to=4)
    with pytest.raises(PruningError) as caught:
        prune_to(model, graph_of(RESNET), x, config)
    text = str(caught.value)
    assert "with prune.max_ratio 0.5, prune.limits 'layer2.*': 0.3, prune.round_to 4;" in text
    assert "raise prune.max_ratio or prune.limits or lower prune.speed_up; these stay whole: " in text
    assert "prune.keep 'layer3.*'" in text
    with pytest.raises(PruningError, match=r"at most 1\.00x with prune\.max_ratio 0\.01; raise"):
        prune_to(model, graph_of(RESNET), x, Prune(speed_up=2.0, max_ratio=0.01))
    with pytest.raises(PruningError, match=r"nothing can be pruned: all channels must stay: .*prune\.keep '\*'"):
        prune_to(model, graph_of(RESNET), x, Prune(speed_up=2.0, keep=["*"]))


# Global and local


def test_local_ranking_takes_the_same_share_of_every_group() -> None:
    _, _, coupled = subject()
    sizes = dict(zip(coupled.names, torch.bincount(coupled.group).tolist(), strict=True))
    free = sizes.keys() - {coupled.names[g] for g in coupled.frozen}

    def spread(step: dict[str, int]) -> float:
        gone = [1 - step[name] / sizes[name] for name in free]
        return max(gone) - min(gone)

    assert all(spread(step) <= 1 / 16 + 1e-6 for step in course(ranking="local", steps=200))
    assert max(spread(step) for step in course(ranking="global", steps=50)) > 0.3


def test_local_ranking_takes_the_lowest_of_each() -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [1.0], [4.0], [2.0]]))
        model[1].weight.copy_(torch.tensor([[3.0, 1.0, 4.0, 2.0]]))
    spec = to_graph(model, torch.zeros(1, 1)).spec
    steps = mask_steps(dict(model.state_dict()), spec, couplings(spec), Ranking(ranking="local", steps=4))
    assert [(~m.keep).nonzero().flatten().tolist() for m in steps] == [[2], [2, 4], [1, 2, 4]]


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_equal_scores_go_in_the_order_of_the_network(ranking: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 40, bias=False), nn.Linear(40, 40, bias=False), nn.Linear(40, 2, bias=False))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    spec = to_graph(model, torch.zeros(1, 2)).spec
    config = Ranking(steps=80, ranking=ranking)
    criterion = Criterion(reduce="first")  # nothing that goes changes the scores of a layer before it
    masks = list(mask_steps(dict(model.state_dict()), spec, couplings(spec), config, criterion))
    gone = [int((a.keep & ~b.keep).nonzero()) for a, b in pairwise(masks)]
    for start in (2, 42):
        own = [node for node in gone if start <= node < start + 40]
        assert own == sorted(own)


# FLOPs


def test_positions_are_the_pixels_and_tokens_of_a_layer() -> None:
    model, x = vit()
    found = positions(model, to_graph(model, x).spec, x)
    assert found["patch_embed.proj.weight"] == 4
    assert found["blocks.0.attn.qkv.weight"] == found["blocks.1.mlp.fc2.weight"] == 5  # with the class token
    assert found["head.weight"] == 1
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 5, 2, stride=2))
    assert positions(mixed, to_graph(mixed, x).spec, x) == {"0.weight": 16, "1.weight": 16}
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    tokens = torch.zeros(1, 6, 8)
    assert set(positions(layer, to_graph(layer, tokens).spec, tokens).values()) == {6}  # also those inside attention


def flops(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 5 * 5, 3, bias=False))), torch.zeros(
        1, 2, 10, 10
    )


def test_savings_are_what_cutting_saves() -> None:
    model, x = flops(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 8, 1, bias=False),
        nn.Conv2d(8, 4, 3, padding=1, bias=False),
    )
    spec = to_graph(model, x).spec
    coupled = couplings(spec)
    savings = Savings(spec, coupled, positions(model, spec, x))
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    for _ in range(3):
        now = KeepMask(coupled.nodes(keep))
        whole, found = cost(remove(model, spec, now, x), x).flops, savings(keep)
        for channel in (coupled.prunable & keep).nonzero().flatten().tolist():
            less = keep.clone()
            less[channel] = False
            left = cost(remove(model, spec, KeepMask(coupled.nodes(less)), x), x).flops
            assert float(found[channel]) == whole - left, channel
        for group in range(1, 4):  # the next round is of a smaller network
            keep[int((keep & (coupled.group == group)).nonzero()[0])] = False
    assert float(found.sum()) > 0


def test_per_flop_divides_by_them() -> None:
    """Equal weights everywhere: what costs most goes first, by what its neighbours have left."""
    model, x = flops(
        nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 4, 1, stride=2, bias=False), nn.Conv2d(4, 4, 1, bias=False)
    )
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    spec = to_graph(model, x).spec
    own = {"state": dict(model.state_dict()), "spec": spec, "coupled": couplings(spec)}
    criterion, config = Criterion(normalize="none", reduce="first", p=1.0), Ranking(steps=12, per_flop=True)
    masks = list(mask_steps(**own, config=config, criterion=criterion, uses=positions(model, spec, x)))
    # scores are the rows' sums 2, 4, 4; savings of a channel (2 * 100 + 4 * 25), (4 * 25 + 4 * 25), (4 * 25 + 3 * 25)
    assert (~masks[0].keep).nonzero().flatten().tolist() == [2]
    plain = prune_to(model, to_graph(model, x), x, Prune(speed_up=1.5, steps=100), criterion)
    dear = prune_to(model, to_graph(model, x), x, Prune(speed_up=1.5, steps=100, per_flop=True), criterion)
    assert int(dear.mask.keep.sum()) >= int(plain.mask.keep.sum())


def test_per_flop_reaches_a_target_with_fewer_channels_gone() -> None:
    model, x = network(RESNET)
    results = [prune_to(model, graph_of(RESNET), x, Prune(speed_up=2.0, steps=200, per_flop=p)) for p in (False, True)]
    assert all(2.0 <= result.speed_up < 2.1 for result in results)
    gone = [int((~result.mask.keep).sum()) for result in results]
    assert gone[1] < 0.7 * gone[0]


# The baseline


def test_the_random_baseline(tmp_path: Path) -> None:
    own = [*TINY, "report.baselines=[random]", "report.seeds=2", "meta_train.epochs=1"]
    recipe = load_recipe("quickstart", [*own, "data_models.val=0"])
    content = pipeline.meta_train(recipe, tmp_path / "run")
    widths: dict[str, list[int]] = {}
    for result in content["results"]:
        assert result["speed_up"] >= recipe.prune.speed_up  # type: ignore[union-attr]
        model = gmn.load_model(tmp_path / "run" / "models" / f"{result['row']}-seed{result['seed']}")
        convs = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
        widths[f"{result['row']}-{result['seed']}"] = convs
    stages = {result["row"]: list(result["stages"]) for result in content["results"]}
    assert stages == {"metanetwork": ["rewritten", "fine-tuned", "pruned"], "random": ["pruned"]}
    assert widths["random-0"] != widths["random-1"]  # two draws
    assert "random: like direct, what goes drawn at random" in report.caption(content)
    assert [entry["row"] for entry in report.summarise(content)] == ["base", "metanetwork", "random"]
