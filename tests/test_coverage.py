"""The fast part of `gmn bench convert`: small networks of every kind, with the checks of the whole suites.

* The round trip is bit-exact, an edited graph computes something else, and every parameter of the graph is moved by it.
* At least 95 % of the parameters of convolutions, linear layers, norms and attention lie in the graph.
* One channel of every group that may go can be removed together, and the network still runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gmn.bench_checks import randomise
from gmn.bench_convert import Result, measure
from gmn.convert import to_graph
from gmn.groups import KeepMask
from gmn.suites import Entry, Input, suite
from gmn.surgery import remove, settled

SMALL = Input((1, 3, 64, 64))
TORCHVISION = (
    *("alexnet", "squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5", "mobilenet_v3_small"),
    *("regnet_y_400mf", "efficientnet_b0"),
)
TIMM = (
    *("convnext_zepto_rms", "levit_128s", "edgenext_xx_small", "ghostnet_050", "hrnet_w18_small", "repvit_m0_9"),
    *("poolformer_s12", "xcit_nano_12_p8_224", "efficientvit_m0", "legacy_seresnet18", "skresnet18", "starnet_s050"),
)
ENTRIES = [
    *(Entry(name, f"torchvision.{name}", (SMALL,)) for name in TORCHVISION),
    *(Entry(name, f"timm.{name}", ()) for name in TIMM),
    *suite("extra"),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_there_and_back(entry: Entry, tmp_path: Path) -> None:
    if entry.missing:
        pytest.skip(f"needs {entry.needs}")
    result = Result(tmp_path / "result.json")
    measure(entry, result)
    assert result.values["ok"], result.values.get("error")
    assert result.values["layer_share"] >= 0.95


def test_the_subset_is_large_enough() -> None:
    assert len({entry.name for entry in ENTRIES}) >= 20


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.name in {*TORCHVISION, *TIMM[:4]}], ids=lambda entry: entry.name
)
def test_what_may_go_can_go(entry: Entry) -> None:
    torch.manual_seed(0)
    model = randomise(entry.build())
    (x,) = entry.example(model, 0)
    spec = to_graph(model, x).spec
    coupled = settled(model, spec, x)
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    for g in coupled.group[coupled.prunable].unique().tolist():
        members = (coupled.group == g).nonzero().flatten()
        keep[members[: len(members) // 4]] = False
    smaller = remove(model, spec, KeepMask(coupled.nodes(keep)), x, coupled=coupled)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (smaller, model)]
    assert sizes[0] < 0.95 * sizes[1]
