"""Contract of `gmn.groups` on networks of others: what goes together is what torch-pruning finds.

* The partition of all output channels of convolutions and linear layers into coupled channels is torch-pruning's.
* Every channel that torch-pruning would remove and we would not is frozen, for a reason that is expected there.
* Where torch-pruning visits a layer twice in one group it keeps one visit: our channels are unions of its channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision.models as tv
from torch import nn

from gmn.convert import to_graph
from gmn.graph import GraphSpec
from gmn.groups import couplings

Channel = frozenset[tuple[str, int]]  # (layer, output channel)
OUTPUT = "network output"


def slim(vgg: nn.Module) -> nn.Module:
    """With a smaller classifier; the first of its layers still reads four positions of each channel."""
    vgg.avgpool = nn.AdaptiveAvgPool2d(2)
    vgg.classifier = nn.Sequential(nn.Linear(512 * 4, 64), nn.ReLU(), nn.Linear(64, 10))
    return vgg


# torch-pruning does not know what the network is for: it would remove classes. Of grouped convolutions its pruners
# remove the same number from every group, which is no matter of single channels; we leave them whole.
GROUPED = (OUTPUT, "grouped convolution")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "resnet18": (partial(tv.resnet18, num_classes=10), (OUTPUT,)),
    "resnet50": (partial(tv.resnet50, num_classes=10), (OUTPUT,)),
    "mobilenet_v2": (partial(tv.mobilenet_v2, num_classes=10), (OUTPUT,)),
    "mobilenet_v3_small": (partial(tv.mobilenet_v3_small, num_classes=10), (OUTPUT,)),
    "efficientnet_b0": (partial(tv.efficientnet_b0, num_classes=10), (OUTPUT,)),
    "densenet121": (partial(tv.densenet121, num_classes=10), (OUTPUT,)),
    "vgg11_bn": (lambda: slim(tv.vgg11_bn()), (OUTPUT,)),
    "regnet_x_400mf": (partial(tv.regnet_x_400mf, num_classes=10), GROUPED),
    "convnext_tiny": (partial(tv.convnext_tiny, num_classes=10), (OUTPUT,)),
    "googlenet": (partial(tv.googlenet, num_classes=10, aux_logits=False, init_weights=False), (OUTPUT,)),
    "inception_v3": (partial(tv.inception_v3, num_classes=10, aux_logits=False, init_weights=False), (OUTPUT,)),
    "squeezenet1_1": (partial(tv.squeezenet1_1, num_classes=10), (OUTPUT,)),
    "mnasnet0_5": (partial(tv.mnasnet0_5, num_classes=10), (OUTPUT,)),
    **{
        name: (partial(timm.create_model, name, num_classes=10), (OUTPUT,))
        for name in ("hrnet_w18_small", "cspnext_tiny", "repvit_m1", "legacy_seresnet18", "dla34", "mobileone_s0")
    },
    "regnety_002": (partial(timm.create_model, "regnety_002", num_classes=10), GROUPED),
}


def theirs(model: nn.Module, x: torch.Tensor) -> set[Channel]:
    """Output channels that torch-pruning removes together, one set for each channel of the root of a group."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, x)
    found: set[Channel] = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        sets: dict[int, set[tuple[str, int]]] = {}
        for item in group.items:
            layer = item.dep.target.module
            if graph.is_out_channel_pruning_fn(item.dep.handler) and isinstance(layer, (nn.Conv2d, nn.Linear)):
                for index, root in zip(item.idxs, item.root_idxs, strict=True):
                    sets.setdefault(root, set()).add((names[layer], index))
        found |= {frozenset(channel) for channel in sets.values()}
    return found


def ours(spec: GraphSpec) -> tuple[set[Channel], dict[Channel, str]]:
    """Coupled output channels that may be removed, and those that may not, each with the reason."""
    coupled = couplings(spec)
    sets: dict[int, set[tuple[str, int]]] = {}
    for param, slots in spec.weights().items():
        for row, node in enumerate(spec.made_by(slots).tolist()):
            sets.setdefault(int(coupled.channel[node]), set()).add((param.removesuffix(".weight"), row))
    prunable = coupled.prunable.tolist()
    free = {frozenset(rows) for channel, rows in sets.items() if prunable[channel]}
    frozen = {frozenset(rows): coupled.frozen[int(coupled.group[c])] for c, rows in sets.items() if not prunable[c]}
    return free, frozen


def both(build: Callable[[], nn.Module], size: int = 64) -> tuple[set[Channel], dict[Channel, str], set[Channel]]:
    with torch.random.fork_rng():
        model = build().eval()
    x = torch.zeros(1, 3, size, size)
    return *ours(to_graph(model, x).spec), theirs(model, x)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected:UserWarning")  # layer scales of ConvNeXt
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_channels_go_together(name: str) -> None:
    build, reasons = NETWORKS[name]
    free, frozen, other = both(build, size=96 if name.startswith("inception") else 64)
    assert free | set(frozen) == other
    assert all(why.startswith(reasons) for why in frozen.values())
    assert {next(reason for reason in reasons if why.startswith(reason)) for why in frozen.values()} == set(reasons)
    assert len(free) > 300


def test_a_layer_that_a_channel_reaches_twice() -> None:
    """The halves of a ghost module are one convolution and its depthwise copy: both meet the gate after it."""
    free, frozen, other = both(partial(timm.create_model, "ghostnet_050", num_classes=10))
    mine = free | set(frozen)
    assert set(frozen.values()) == {OUTPUT}
    pieces = {piece: channel for channel in mine for piece in channel}
    assert set(pieces) == {piece for channel in other for piece in channel}
    for channel in other:
        (home,) = {pieces[piece] for piece in channel}
        assert channel <= home
    apart = mine - other
    assert len(apart) == 1164
    assert all(len({layer for layer, _ in channel}) < len(channel) for channel in apart)  # some layer comes twice
