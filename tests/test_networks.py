"""Contract of `gmn.networks` and `gmn.cifar`.

* The networks have the published parameter counts and module names.
* Networks come from four families by name; a wrong name is answered with the nearest right ones.
* Weights load from every usual file layout, and never partly: what does not fit is named.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gmn.cifar import CifarResNet, CifarVGG, ZeroPadShortcut
from gmn.errors import CheckpointError, NetworkError
from gmn.networks import build_network, load_weights

SHARED = Path(os.environ.get("GMN_SHARED", str(Path(__file__).parents[2] / "shared")))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet8(**options: object) -> nn.Module:
    return build_network("cifar.resnet8", num_classes=4, options=options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("cifar.resnet20", 10, 269_722),
        ("cifar.resnet56", 10, 853_018),
        ("cifar.vgg11_bn", 10, 9_217_728 + 2 * 2_752 + 5_130),
        ("cifar.vgg19_bn", 100, 20_018_880 + 2 * 5_504 + 51_300),
        ("torchvision.resnet18", 10, 11_181_642),
        ("timm.resnet18", 10, 11_181_642),
    ],
)
def test_parameter_counts(name: str, classes: int, expected: int) -> None:
    assert parameters(build_network(name, num_classes=classes)) == expected


def test_vgg19_has_the_nodes_of_the_paper() -> None:
    model = build_network("cifar.vgg19_bn", num_classes=100)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 17
    assert 3 + sum(len(layer.weight) for layer in layers) == 5_607
    assert all(layer.bias is None for layer in layers[:-1])


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_depths(depth: int) -> None:
    model = CifarVGG(depth, num_classes=3, in_channels=1, bias=True)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth - 3
    assert all(c.bias is not None and not c.bias.any() for c in convolutions)
    assert model.eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


def test_the_width_of_a_vgg() -> None:
    model = build_network("cifar.vgg11_bn", num_classes=3, options={"width": 4})
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [4, 8, 16, 16, 32, 32, 32, 32]
    with pytest.raises(NetworkError, match="width of at least 1; got 0"):
        build_network("cifar.vgg11_bn", num_classes=3, options={"width": 0})


def test_vgg_refuses_images_that_the_pools_would_empty() -> None:
    with pytest.raises(NetworkError, match=r"below 1x1.*at least 16x16.*got 16x15"):
        CifarVGG(11, num_classes=10)(torch.zeros(1, 3, 16, 15))


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_takes_any_image_size(shortcut: str) -> None:
    model = CifarResNet(14, num_classes=5, in_channels=1, shortcut=shortcut, width=6).eval()
    for height, width in ((32, 32), (28, 28), (9, 7)):
        assert model(torch.randn(2, 1, height, width)).shape == (2, 5)


def test_option_a_subsamples_and_pads_on_both_sides() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float).view(1, 2, 4, 4)
    y = ZeroPadShortcut(2, 4, stride=2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 1].tolist() == [[0, 2], [8, 10]]
    assert y[0, 2].tolist() == [[16, 18], [24, 26]]
    assert not y[0, 0].any()
    assert not y[0, 3].any()


def test_shortcuts_are_named_as_published() -> None:
    names = dict(resnet8(shortcut="B").named_parameters())
    assert names["layer2.0.shortcut.0.weight"].shape == (32, 16, 1, 1)
    assert "layer2.0.shortcut.1.bias" in names
    assert not any("shortcut" in name for name, _ in resnet8().named_parameters())
    assert not any(name.startswith("layer1.0.shortcut") for name in names)


def make(num_classes: int, width: int = 2) -> nn.Module:
    return nn.Linear(width, num_classes)


def test_networks_from_a_function() -> None:
    model = build_network(f"{__name__}:make", num_classes=7, options={"width": 5})
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (5, 7)


def test_memory_that_runs_out_is_no_mistake_in_the_options() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        build_network(f"{__name__}:make", num_classes=2**20, options={"width": 2**36})  # 2**58 bytes


def test_timm_takes_the_channels() -> None:
    model = build_network("timm.resnet18", num_classes=4, in_channels=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar.resnet21", r"6n \+ 2"),
        ("cifar.resnett20", "cifar.resnet20"),
        ("cifar.vgg15_bn", "cifar.vgg1[0-9]_bn"),
        ("torchvison.resnet18", "torchvision.resnet18"),
        ("torchvision.resnet19", "torchvision.resnet18"),
        ("timm.resnet19", "timm.resnet1"),
        ("resnet18", "'torchvision.resnet18' or 'timm.resnet18'"),
        ("no_such_module_here:make", "cannot import"),
        (f"{__name__}:absent", "no such function"),
        (f"{__name__}:parameters", "cannot build"),
        ("builtins:dict", "not a network"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        build_network(name, num_classes=10)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cifar.resnet20", {"options": {"shortcut": "C"}}, "'A' or 'B'"),
        ("cifar.resnet20", {"options": {"widht": 8}}, "cannot build.*widht"),
        ("cifar.resnet20", {"options": {"width": 0}}, "width of at least 1"),
        ("cifar.resnet20", {"num_classes": 0}, "0 classes"),
        ("torchvision.resnet18", {"in_channels": 1}, "3 channels.*timm"),
    ],
)
def test_wrong_options(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        build_network(name, **{"num_classes": 10, **arguments})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("layout", ["plain", "nested", "parallel"])
def test_weights_round_trip(tmp_path: Path, suffix: str, layout: str) -> None:
    source, target = resnet8(), resnet8()
    assert not same_weights(source, target)
    state: dict = {f"module.{k}" if layout == "parallel" else k: v for k, v in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if layout == "nested" else state, path)
    load_weights(target, path)
    assert same_weights(source, target)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


def test_old_checkpoints_without_batch_counters_load(tmp_path: Path) -> None:
    source, target = resnet8(), resnet8()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    load_weights(target, tmp_path / "old.pt")
    assert same_weights(source, target)


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = resnet8()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = resnet8().state_dict()
    nan = good["bn1.running_var"].clone()
    nan[3] = float("nan")
    cases = {
        "1 missing: linear.bias": without(good, "linear.bias"),
        "1 unexpected: extra": {**good, "extra": torch.zeros(1)},
        r"linear.weight of shape \[4, 64\] \(found \[9, 64\]\)": {
            **good,
            "linear.weight": torch.zeros(9, 64),
        },
        "not finite.*'bn1.running_var'": {**good, "bn1.running_var": nan},
    }
    for i, (message, state) in enumerate(cases.items()):
        torch.save(state, tmp_path / f"{i}.pt")
        with pytest.raises(NetworkError, match=message):
            load_weights(model, tmp_path / f"{i}.pt")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    for name in (
        "absent.pt",
        "torn.safetensors",
        "torn.pt",
        "empty.pt",
        "list.pt",
        "numbers.pt",
        "pickle.pt",
    ):
        with pytest.raises(CheckpointError) as caught:
            load_weights(nn.Linear(2, 2), tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_shared_weights_load(name: str) -> None:
    path = SHARED / "models" / f"{name}-cifar10.safetensors"
    if not path.is_file():
        pytest.skip("the shared models are absent")
    model = build_network(f"cifar.{name}", num_classes=10)
    load_weights(model, path)
    assert torch.equal(model.state_dict()["linear.bias"], safetensors.torch.load_file(path)["linear.bias"])


def test_heavy_libraries_are_imported_only_when_asked_for() -> None:
    import subprocess

    code = "import sys, gmn.report; sys.exit(any(m in sys.modules for m in ('timm', 'torchvision', 'torch_pruning')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "library", "maker", "option"),
    [
        ("torchvision.resnet18", "torchvision.models", "get_model", {"weights": "IMAGENET1K_V1"}),
        ("timm.resnet18", "timm", "create_model", {"pretrained": True}),
    ],
)
def test_pretrained_weights_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str, maker: str, option: dict[str, object]
) -> None:
    asked: dict[str, object] = {}

    def make(member: str, **options: object) -> nn.Module:
        asked.update(options, member=member)
        return nn.Linear(1, 1)

    monkeypatch.setattr(f"{library}.{maker}", make)
    build_network(name, num_classes=1000, options=option)
    assert asked["member"] == "resnet18"
    assert asked.items() >= option.items()
