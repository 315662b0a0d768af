"""Contract of `gmn.surgery`, `gmn.ranking` and `gmn.costs`.

* A network without some channels computes what the whole network does with those channels set to zero.
* `prune_to` stops at the first step past the target, and says which limit stands in its way if there is none.
* The sizes of a pruned network rebuild it: its state dict loads strictly.
* A multiply-add is one FLOP.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from zoo import FlatVGG, Residual, graph_of, network, pruned, randomise, small

from gmn.address import positions
from gmn.api import prune
from gmn.convert import to_graph
from gmn.costs import cost
from gmn.criteria import Importance
from gmn.errors import PruningError
from gmn.graph import GraphSpec
from gmn.groups import KeepMask, couplings, parametric
from gmn.ranking import mask_steps, prune_to
from gmn.settings import Prune
from gmn.surgery import remove, resize, shapes

IMAGES = torch.zeros(1, 3, 8, 8)


# Masks


def random_mask(spec: GraphSpec, share: float = 0.3) -> KeepMask:
    """A mask without about this share of the channels that may go."""
    coupled = couplings(spec)
    generator = torch.Generator().manual_seed(3)
    drop = (torch.rand(coupled.num_channels, generator=generator) < share) & coupled.prunable
    first = torch.tensor([int((coupled.group == g).nonzero()[0]) for g in range(len(coupled.names))])
    drop[first] = False  # no group is emptied
    return KeepMask(coupled.nodes(~drop))


def silenced(model: nn.Module, spec: GraphSpec, mask: KeepMask) -> nn.Module:
    """The network with every weight that reads a removed channel set to zero: its value no longer counts."""
    model = copy.deepcopy(model)
    parameters, weights = dict(model.named_parameters()), parametric(spec)
    for slot in spec.edge_slots:
        block = spec.blocks[slot.block]
        if slot.block not in weights or block.form == "diagonal":
            continue
        keep = mask.keep[block.src[0] : sum(block.src)].to(torch.float32)
        slot.canonical(parameters[slot.param].data)[:, :, positions(slot.inputs)] *= keep.view(1, 1, -1, 1)
    return model


@pytest.mark.parametrize("name", ["resnet20A", "resnet20B", "mobilenet_v2", "densenet121", "flat"])
def test_the_smaller_network_computes_the_same(name: str) -> None:
    model, x = (randomise(FlatVGG()), IMAGES) if name == "flat" else network(name)
    spec = to_graph(model, x).spec
    mask = random_mask(spec)
    smaller = remove(model, spec, mask, x)
    assert 0.1 < 1 - float(mask.keep.float().mean()) < 0.5
    images = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = silenced(model, spec, mask)(images), smaller(images)
        assert not torch.allclose(wanted, model(images), rtol=0.01)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert cost(smaller, x).parameters < cost(model, x).parameters
    again = to_graph(smaller, x).spec
    assert again.num_nodes == int(mask.keep.sum())


def test_what_a_mask_drops_is_what_goes() -> None:
    model = small(Residual())
    spec = to_graph(model, IMAGES).spec
    start = next(g.start for g in spec.groups if g.name == "1.conv1")
    keep = torch.ones(spec.num_nodes, dtype=torch.bool)
    keep[[start + 1, start + 4]] = False
    smaller = remove(model, spec, KeepMask(keep), IMAGES)
    rows = [0, 2, 3, 5]
    assert torch.equal(smaller[1].conv1.weight, model[1].conv1.weight[rows])
    assert torch.equal(smaller[1].conv1.bias, model[1].conv1.bias[rows])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(smaller[1].bn1, name), getattr(model[1].bn1, name)[rows])
    assert torch.equal(smaller[1].conv2.weight, model[1].conv2.weight[:, rows])
    assert torch.equal(smaller[0].weight, model[0].weight)
    assert model[1].conv1.out_channels == 6  # the original stays


def test_a_flattened_channel_goes_with_all_its_positions() -> None:
    model = randomise(FlatVGG())
    spec = to_graph(model, IMAGES).spec
    start = next(g.start for g in spec.groups if g.name == "conv2")
    keep = torch.ones(spec.num_nodes, dtype=torch.bool)
    keep[start + 2] = False
    smaller = remove(model, spec, KeepMask(keep), IMAGES)
    columns = [c for c in range(48) if c // 4 != 2]
    assert torch.equal(smaller.fc1.weight, model.fc1.weight[:, columns])


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model, x = network("resnet20A")
    spec = graph_of("resnet20A").spec
    keep = torch.ones(spec.num_nodes, dtype=torch.bool)
    with pytest.raises(PruningError, match="another network"):
        remove(model, spec, KeepMask(keep[1:]), x)
    keep[3] = False
    with pytest.raises(PruningError, match="coupled"):
        remove(model, spec, KeepMask(keep), x)


# Steps to a target


@pytest.mark.parametrize("name", ["resnet20B", "mobilenet_v2"])
def test_prune_to_reaches_the_target_and_stops(name: str) -> None:
    model, x = network(name)
    graph, config = graph_of(name), Prune(speed_up=2.0, steps=100)
    result = prune_to(model, graph, x, config)
    assert 2.0 <= result.speed_up < 2.0 * 1.03
    assert result.before == cost(model, x)
    assert result.after == cost(result.model, x)
    assert result.speed_up == result.before.flops / result.after.flops
    masks = list(mask_steps(dict(model.state_dict()), graph.spec, couplings(graph.spec), config))
    (step,) = [i for i, mask in enumerate(masks) if torch.equal(mask.keep, result.mask.keep)]
    before = remove(model, graph.spec, masks[step - 1], x)
    assert result.before.flops / cost(before, x).flops < 2.0


def test_steps_take_the_lowest_and_only_remove() -> None:
    model, _ = network("resnet20B")
    spec = graph_of("resnet20B").spec
    coupled = couplings(spec)
    config = Prune(speed_up=2.0, steps=50, max_ratio=0.8)
    masks = list(mask_steps(dict(model.state_dict()), spec, coupled, config))
    step = round(int(coupled.prunable.sum()) / 50)
    last, keep = torch.ones(spec.num_nodes, dtype=torch.bool), torch.ones(coupled.num_channels, dtype=torch.bool)
    for mask in masks:
        assert not (mask.keep & ~last).any()
        before, keep = keep, keep.clone()
        keep[coupled.channel[~mask.keep]] = False
        assert int(before.sum() - keep.sum()) <= step
        last = mask.keep
    for group, size in enumerate(torch.bincount(coupled.group).tolist()):
        left = int(keep[coupled.group == group].sum())
        assert left == (size if group in coupled.frozen else size - int(0.8 * size)), coupled.names[group]


def test_the_network_to_prune_is_not_changed() -> None:
    model = small(Residual())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune_to(model, to_graph(model, IMAGES), IMAGES, Prune(speed_up=1.3, steps=20))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_zeroed_channels_go_first() -> None:
    model = small(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight):
            tensor[[1, 3]] = 0.0
        model[3].weight[:, [1, 3]] = 0.0
    spec = to_graph(model, IMAGES).spec
    masks = list(mask_steps(dict(model.state_dict()), spec, couplings(spec), Prune(speed_up=2.0, steps=6)))
    assert (~masks[0].keep).nonzero().flatten().tolist() == [3 + 1, 3 + 3]


def test_scores_are_taken_anew_after_each_step() -> None:
    """The next channel to go is the lowest of the network that is left, as if it had been cut for real."""
    torch.manual_seed(0)
    sizes = (4, 12, 12, 12, 2)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))
    x = torch.zeros(1, 4)
    spec = to_graph(model, x).spec
    masks = list(mask_steps(dict(model.state_dict()), spec, couplings(spec), Prune(speed_up=2.0, steps=36)))
    assert len(masks) == 3 * 10  # 90 % of 12
    for mask, following in pairwise(masks[:15]):
        smaller = remove(model, spec, mask, x)
        left = to_graph(smaller, x).spec
        coupled = couplings(left)
        importance = Importance(left, coupled)
        scores = importance.scores(smaller.state_dict())
        lowest = int(scores.masked_fill(~coupled.prunable, float("inf")).argmin())
        gone = (mask.keep & ~following.keep).nonzero().flatten().tolist()
        assert gone == mask.keep.nonzero().flatten()[coupled.channel == lowest].tolist()


def shallow() -> tuple[nn.Module, Tensor]:
    return randomise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.zeros(1, 4)


def test_a_target_out_of_reach_names_the_limit() -> None:
    model, x = shallow()  # 66 multiply-adds; 34 with half of the hidden neurons
    with pytest.raises(PruningError, match=r"out of reach: expected 3x; got at most 1\.94x with prune\.max_ratio 0\.5"):
        prune_to(model, to_graph(model, x), x, Prune(speed_up=3.0, max_ratio=0.5))
    model, x = network("resnet20A")
    with pytest.raises(PruningError, match=r"raise prune\.max_ratio.*stay whole: .*zero-padded shortcut layer2"):
        prune_to(model, graph_of("resnet20A"), x, Prune(speed_up=500.0))


def test_a_network_at_the_target_already() -> None:
    model, x = pruned("resnet20A")
    before = cost(network("resnet20A")[0], x)
    with pytest.raises(PruningError, match=r"at the target already: expected a target above 1\.\d\dx; got 1\.2x"):
        prune_to(model, to_graph(model, x), x, Prune(speed_up=1.2), before=before)


def test_nothing_to_prune() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4)
    with pytest.raises(PruningError, match=r"nothing can be pruned: all channels must stay: network input; .*output"):
        prune_to(model, to_graph(model, x), x, Prune(speed_up=1.5))


# Attention


def test_whole_heads_are_removed_and_the_module_is_told() -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    model, x = timm.create_model("vit_tiny_patch16_224", **size).eval(), torch.randn(2, 3, 32, 32)
    spec = to_graph(model, x).spec
    coupled = couplings(spec)
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    ((first, _), _), ((second, _), _) = spec.heads
    keep[coupled.channel[[first, first + 6, second + 18]]] = False  # two heads of the first block, one of the second
    mask = KeepMask(coupled.nodes(keep))
    smaller = remove(model, spec, mask, x)
    assert [block.attn.num_heads for block in smaller.blocks] == [2, 3]
    assert [tuple(block.attn.qkv.weight.shape) for block in smaller.blocks] == [(36, 24), (54, 24)]
    with torch.no_grad():
        wanted = silenced(model, spec, mask)(x)
        assert torch.allclose(smaller(x), wanted, atol=1e-6)
        assert not torch.allclose(wanted, model(x), atol=1e-3)
    assert to_graph(smaller, x).spec.num_nodes == int(mask.keep.sum())


def test_a_position_embedding_follows_the_channels() -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 4, "num_classes": 5}
    model, x = timm.create_model("vit_tiny_patch16_224", **size).eval(), torch.randn(2, 3, 32, 32)
    spec = to_graph(model, x).spec
    coupled = couplings(spec)
    start = next(group.start for group in spec.groups if group.name == "patch_embed.proj")
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    keep[coupled.channel[[start + 1, start + 23]]] = False
    smaller = remove(model, spec, KeepMask(coupled.nodes(keep)), x)
    left = [*range(1), *range(2, 23)]
    assert torch.equal(smaller.pos_embed, model.pos_embed[..., left])
    assert torch.equal(smaller.cls_token, model.cls_token[..., left])
    assert torch.equal(smaller.blocks[0].norm1.weight, model.blocks[0].norm1.weight[left])
    assert smaller.blocks[0].norm1.normalized_shape == (22,)


# Rebuilding


@pytest.mark.parametrize("name", ["resnet20A", "resnet20B", "mobilenet_v2", "densenet121"])
def test_sizes_rebuild_a_pruned_network(name: str) -> None:
    model, x = pruned(name)
    fresh = copy.deepcopy(network(name)[0])
    assert shapes(fresh) != shapes(model)
    rebuilt = resize(fresh, shapes(model))
    assert rebuilt is fresh
    assert shapes(rebuilt) == shapes(model)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), model(x))
    assert cost(rebuilt, x) == cost(model, x)


@pytest.mark.parametrize(
    "sizes",
    [
        {"absent.weight": [4, 2]},
        {"0.weight": [8]},
        {"0.weight": [8, 0]},
        {"0.weight": [800, 4]},
    ],
)
def test_sizes_of_another_network_are_refused(sizes: Any) -> None:
    with pytest.raises(PruningError, match="for another network"):
        resize(shallow()[0], sizes)


# Costs


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_flops_of_a_convolution(groups: int, batch: int) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=groups, bias=False)
    counted = cost(conv, torch.zeros(batch, 4, 10, 12))
    assert counted.flops == 8 * (4 // groups) * 9 * 5 * 6
    assert counted.parameters == 8 * (4 // groups) * 9


def test_flops_are_per_image_also_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, *, images: Tensor) -> Tensor:
            return self.conv(images)

    assert cost(Named(), {"images": torch.zeros(5, 3, 8, 8)}).flops == 3 * 4 * 9 * 6 * 6


def test_flops_of_resnet20() -> None:
    """41 million multiply-adds (He et al. 2016): convolutions and the classifier; norms and pools add little."""
    model, x = network("resnet20A")
    layers = 32**2 * 9 * (3 * 16 + 6 * 16 * 16)
    layers += 16**2 * 9 * (16 * 32 + 5 * 32 * 32) + 8**2 * 9 * (32 * 64 + 5 * 64 * 64) + 64 * 10
    assert layers == pytest.approx(40.55e6, rel=1e-3)
    assert layers <= cost(model, x).flops < 1.03 * layers


def test_counting_leaves_the_model_alone() -> None:
    model = small(Residual()).train()
    model[1].bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, IMAGES)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_flops_of_inputs_in_containers() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, inputs: dict[str, Tensor], scale: Tensor | None = None) -> Tensor:
            return self.conv(inputs["x"]) * (1 if scale is None else scale)

    images, expected = {"x": torch.zeros(5, 3, 8, 8)}, 3 * 4 * 9 * 6 * 6
    assert cost(Nested(), (images,)).flops == expected
    assert cost(Nested(), {"scale": torch.tensor(2.0), "inputs": images}).flops == expected


def test_counting_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cost(nn.Linear(3, 4), {"input": torch.zeros(1, 3)})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("table", [{16: 0.5}, [0.5]])
def test_a_size_that_the_code_looks_up_stays(table: Any) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            x = x * (table[x.shape[1]] if isinstance(table, dict) else table[16 - x.shape[1]])
            return self.c(self.b(x).relu())

    small = prune(Table(), torch.zeros(1, 8), speed_up=1.2).model
    assert small.a.out_features == 16
    assert small.b.out_features < 12


def test_an_instance_norm_without_numbers_of_its_own_knows_its_width() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16), nn.Conv2d(16, 2, 3))
    spec = to_graph(model, IMAGES).spec
    keep = torch.ones(spec.num_nodes, dtype=torch.bool)
    keep[3:7] = False
    smaller = remove(model, spec, KeepMask(keep), IMAGES)
    assert (smaller[0].out_channels, smaller[1].num_features) == (12, 12)  # type: ignore[index]
    assert not any(module._forward_pre_hooks for module in smaller.modules())
    assert model[1].num_features == 16


def test_half_precision_ranks_as_single_does() -> None:
    model = small(Residual(16), width=16)
    spec = to_graph(model, IMAGES).spec

    def last(state: dict[str, Tensor]) -> Tensor:
        return list(mask_steps(state, spec, couplings(spec), Prune(speed_up=2.0, steps=10)))[5].keep

    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert torch.equal(last(halves), last({name: tensor.float() for name, tensor in halves.items()}))
