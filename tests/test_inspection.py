"""What `gmn inspect` says of a network, and how it finds the network.

* coverage counts each parameter once and knows the layers that hold weights
* the tree shows a repeated block once, and what is only carried
* the table names every coupled group, or the reason why it must stay
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console, RenderableType
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from zoo import graph_of, network, pruned, small

import gmn
from gmn.convert import to_graph
from gmn.errors import CheckpointError, ConversionError, GmnError, NetworkError
from gmn.example import default_size, example_inputs
from gmn.inspection import coverage, is_weight_layer, tree
from gmn.inspection_report import groups_table, report, summary
from gmn.network_source import parse_source, rebuild
from gmn.permission import allow_code
from gmn.subject import Choices, find


def text(what: RenderableType, width: int = 120) -> str:
    """What a pipe gets."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x)) * self.gain.sum()


class Words(nn.Module):
    """An embedding that is also the classifier, two blocks that look the same, and a third that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.blocks[2].fc = nn.Linear(6, 6, bias=False)
        self.embed = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


# -- coverage ----------------------------------------------------------------------------------------------------------


def test_coverage_of_a_convolutional_network() -> None:
    model, _ = network("resnet18")
    covered = coverage(model, graph_of("resnet18").spec)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (covered.total, covered.in_graph, covered.carried, covered.layers) == (total, total, 0, total)
    assert covered.share == covered.layer_share == 1
    assert covered.missing == ()


def test_tied_parameters_count_once() -> None:
    model = Words().eval()
    spec = to_graph(model, torch.tensor([[1, 2, 3]]), on_unknown="keep").spec
    covered = coverage(model, spec)
    assert covered.total == sum(parameter.numel() for parameter in model.parameters())
    assert covered.in_graph + covered.carried == covered.total
    assert covered.layers == covered.total - 3 * 5  # all but the gains: the embedding is the weight of the head
    assert covered.layers_in_graph == covered.layers - sum(
        parameter.numel() for name, parameter in model.named_parameters() if name in covered.missing
    )


def test_weight_layers_with_a_parametrization() -> None:
    model = small(weight_norm(nn.Conv2d(6, 6, 3, padding=1)))
    spec = to_graph(model, torch.randn(1, 3, 8, 8), on_unknown="keep").spec
    covered = coverage(model, spec)
    assert covered.layers == covered.total


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        *((make(2), True) for make in (timm.layers.LayerNorm2d, timm.layers.RmsNorm, timm.layers.BatchNormAct2d)),
        *((nn.RMSNorm(2), True), (nn.GroupNorm(1, 2), True), (nn.InstanceNorm1d(2, affine=True), True)),
        *((nn.MultiheadAttention(2, 1), True), (nn.ConvTranspose3d(1, 1, 1), True)),
        *((nn.PReLU(), False), (nn.Embedding(2, 2), False), (nn.LSTM(2, 2), False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_weight_layer_is(module: nn.Module, expected: bool) -> None:
    assert is_weight_layer(module) is expected


def test_coverage_of_another_network() -> None:
    with pytest.raises(ConversionError, match="another network"):
        coverage(nn.Linear(2, 2), graph_of("resnet18").spec)


# -- the tree and the tables -------------------------------------------------------------------------------------------


def test_repeated_blocks_are_shown_once() -> None:
    model = Words().eval()
    shown = text(tree(model, to_graph(model, torch.tensor([[1, 2, 3]]), on_unknown="keep")))
    assert "blocks.0 .. blocks.1 (2 x Block)  gain [5]" in shown
    assert shown.count("norm  LayerNorm") == 2
    assert "weight [9, 6] = embed.weight" in shown
    assert "gain [5]  carried" in shown


def test_the_report_of_a_residual_network() -> None:
    model, _ = network("resnet18")
    shown = text(report(model, graph_of("resnet18")))
    assert "layer1.0 .. layer1.1 (2 x BasicBlock)" in shown
    assert "conv1  Conv2d  weight [64, 3, 7, 7]  in the graph" in shown
    assert "2 x layer4.*.conv1" in shown
    assert "network output" in shown
    assert "prunable" in shown
    assert "(100%)" in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert "coupled channels" not in text(report(model, graph_of("resnet18"), groups=False))


def test_attention_is_counted_in_heads() -> None:
    model = gmn.build_network(
        "timm.vit_tiny_patch16_224", num_classes=5, options={"depth": 2, "img_size": 32, "embed_dim": 24}
    )
    graph = to_graph(model, torch.randn(1, 3, 32, 32), on_unknown="keep")
    assert "3 heads" in text(groups_table(graph.spec))
    shown = text(summary(model, graph.spec))
    assert "2 x blocks.*.attn.qkv: 3 heads of 8 channels" in shown
    assert "cls_token [1, 1, 24]" in shown


def test_long_lists_end() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            for index in range(50):
                self.register_parameter(f"own{index}", nn.Parameter(torch.ones(2)))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Many()
    shown = text(summary(model, to_graph(model, torch.randn(1, 3)).spec))
    assert "30 more lines like these" in shown
    assert len(shown.splitlines()) < 30


# -- the network that is meant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar.resnet8", (3, 32, 32)),
        ("torchvision.resnet18", (3, 224, 224)),
        ("torchvision.mc3_18", (3, 16, 224, 224)),
        ("timm.test_vit", (3, 160, 160)),
    ],
)
def test_the_usual_input(name: str, size: tuple[int, ...]) -> None:
    model = gmn.build_network(name, num_classes=3)
    assert default_size(model) == size
    assert example_inputs(model).shape == (1, *size)


def test_a_network_without_a_usual_input() -> None:
    with pytest.raises(NetworkError, match="--input"):
        default_size(nn.Linear(2, 2))


def make_perceptron(num_classes: int, hidden: int = 5) -> nn.Module:
    """A function of one's own, found by its name."""
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


OWN = f"{__name__}:make_perceptron"


def test_a_function_of_ones_own() -> None:
    subject = find(OWN, Choices(input="6", classes=4, options=("hidden=7",)))
    assert coverage(subject.model, subject.graph.spec).share == 1
    assert subject.source.to_json() == {
        "network": OWN, "num_classes": 4, "in_channels": 6, "options": {"hidden": 7}
    }  # fmt: skip


def test_a_file_may_not_call_a_function_that_nobody_trusts() -> None:
    stated = {"network": "os:system", "num_classes": 1, "options": {"command": "echo"}}
    with pytest.raises(
        CheckpointError, match=r"source.network wants to run code: got 'os:system'; in file; .*--allow-c"
    ):
        parse_source(stated, "file")
    with allow_code(only=[OWN]):
        assert parse_source({**stated, "network": OWN}, "file").network == OWN


def test_a_file_may_not_fetch_weights() -> None:
    stated = {"network": "torchvision.squeezenet1_1", "num_classes": 2, "options": {"weights": "nowhere"}}
    assert isinstance(parse_source(stated, "file").build(), nn.Module)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (None, "does not say how its network is built"),
        ({}, "source.network"),
        ({"network": "cifar.resnet8", "num_classes": 0}, "source.num_classes"),
        ({"network": "cifar.resnet8", "num_classes": 2, "more": 1}, "source.more"),
        ({"network": "cifar.resnet8", "num_classes": 2, "sizes": {"conv1.weight": 1}}, "source.sizes.conv1.weight"),
        ({"network": "cifar.resnet9", "num_classes": 2}, "cannot be built"),
        ({"network": "cifar.resnet8", "num_classes": 2, "options": {"width": "x"}}, "cannot be built"),
        ({"network": "cifar.resnet8", "num_classes": 2, "sizes": {"nowhere.weight": [1]}}, "cannot be built"),
        (
            {"network": "cifar.resnet8", "num_classes": 2, "sizes": {"conv1.weight": [-1, 3, 3, 3]}},
            "cannot be built",
        ),
    ],
)  # fmt: skip
def test_a_source_that_is_malformed(stated: dict[str, object] | None, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        rebuild(parse_source(stated, "file"), "file", 0)
    assert message in str(error.value)


def test_a_saved_network_that_was_pruned(tmp_path: Path) -> None:
    model, _ = pruned("resnet20B")
    kind = {"name": "cifar.resnet20", "num_classes": 10, "in_channels": 3, "options": {"shortcut": "B"}}
    gmn.save_model(tmp_path / "models" / "a", model, kind, input_shape=(3, 16, 16))
    subject = find(str(tmp_path / "models" / "a"), Choices())
    rebuilt = parse_source(subject.source.to_json(), "file").build()
    rebuilt.load_state_dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"did you mean .*models/a"):
        find(str(tmp_path), Choices())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(options=("depth",)), "--set-option key=value"),
        (Choices(options=("img_size=[",)), "--set-option img_size"),
        (Choices(input="3,-1"), "bad input size"),
        (Choices(input="3,100000,100000"), "bad input size"),
        (Choices(classes=0), "classes"),
        (Choices(network="cifar.resnet8"), "--network has no meaning here"),
        (Choices(layout="nice"), "unknown layout"),
        (Choices(weights=Path("nowhere.pt")), "no such file"),
    ],
)
def test_options_that_make_no_sense(choices: Choices, message: str) -> None:
    with pytest.raises(GmnError) as error:
        find("cifar.resnet8", choices)
    assert message in str(error.value)


def test_options_that_a_folder_answers(tmp_path: Path) -> None:
    refused: list[Callable[[], object]] = [
        lambda: find(str(tmp_path), Choices(classes=3)),
        lambda: find(str(tmp_path), Choices(options=("depth=3",))),
        lambda: find(str(tmp_path / "graph.safetensors"), Choices(layout="generic")),
    ]
    for call in refused:
        with pytest.raises(GmnError, match="no meaning here"):
            call()
