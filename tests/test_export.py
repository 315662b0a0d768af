"""Contract of `gmn.export_model` and `gmn export`.

* Pruned networks (batch norm and residuals, grouped and depthwise, attention heads) give the same outputs from
  safetensors, torch.export and ONNX, on batches of any size; so do networks of several inputs.
* A network with a fixed number of samples is refused with a hint, and taken with that number.
* A file that gives other outputs, lacks its packages or is there already is an error, and nothing is left behind.
* The network that was given stays as it was.
* The command takes a saved network, a name, or a run: its best row on validation images, or one that is named.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import CNN, built, call, make_run
from reading import Made
from torch import Tensor, nn
from zoo import Residual, small

import gmn
from gmn import export_formats
from gmn.checkpoint import load_json
from gmn.errors import GmnError
from gmn.export import difference, export_model
from gmn.export_formats import FORMATS
from gmn.trace import split_inputs

for package in FORMATS["onnx"].packages:
    pytest.importorskip(package, reason=f"pip install {package}")

TINY = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 4}
VIT = {"name": "timm.vit_tiny_patch16_224", "num_classes": 4, "in_channels": 3, "options": TINY}
x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    """Reads an image and a word, both by name, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.words = nn.Linear(12, 4), nn.Embedding(7, 4)

    def forward(self, *, image: Tensor, word: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"score": self.linear(image.flatten(1)) * scale + self.words(word).mean(1)}


def smaller(network: nn.Module, speed_up: float) -> nn.Module:
    return gmn.prune(network, x, speed_up=speed_up).model


def grouped() -> nn.Module:
    """Channels in groups, which stay, and depthwise ones, which go."""
    depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    return small(Residual(groups=3), nn.Conv2d(6, 24, 1), nn.BatchNorm2d(24), depthwise, nn.Conv2d(24, 6, 1))


def by_onnx(path: Path, inputs: Any) -> list[Tensor]:
    """What ONNX Runtime gives; inputs by their names in the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    args, kwargs = split_inputs(inputs)
    names = [entry.name for entry in session.get_inputs()]
    given = kwargs or dict(zip(names, args, strict=True))
    return [torch.from_numpy(found) for found in session.run(None, {name: given[name].numpy() for name in names})]


def check(model: nn.Module, folder: Path, inputs: Any, pick: Callable[[Any], Tensor] = lambda found: found) -> None:
    """Both programs give the network's output."""
    args, kwargs = split_inputs(inputs)
    with torch.no_grad():
        expected = pick(model(*args, **kwargs))
        found = pick(torch.export.load(folder / "model.pt2").module()(*args, **kwargs))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_onnx(folder / "model.onnx", inputs)[0], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("network", [CNN, VIT], ids=lambda network: network["name"])
def test_pruned_networks_in_every_format(network: dict[str, Any], tmp_path: Path) -> None:
    model = smaller(built(network), 2.0)
    assert network is CNN or model.get_submodule("blocks.0.attn").num_heads < 4  # type: ignore[operator]
    found = export_model(model, x, tmp_path / "out", network=network, facts={"accuracy": 0.5})
    assert [row.format for row in found] == ["safetensors", "pt2", "onnx"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        file.name for row in found for file in row.files
    )
    assert all(row.bytes == sum(path.stat().st_size for path in row.files) for row in found)
    assert all(row.difference <= 1e-4 for row in found)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    batch = torch.randn(5, 3, 16, 16)
    check(model, tmp_path / "out", batch)
    again = gmn.load_model(tmp_path / "out")
    assert torch.equal(again(batch), model(batch))
    content = load_json(tmp_path / "out" / "model.json")
    assert (content["accuracy"], content["input_shape"]) == (0.5, [3, 16, 16])


def test_pruned_convolutions_in_groups(tmp_path: Path) -> None:
    model = smaller(grouped(), 1.5)
    assert model.get_submodule("4").groups < 24  # type: ignore[operator]
    assert model.get_submodule("1.conv1").groups == 3
    assert [row.format for row in export_model(model, x, tmp_path)] == ["pt2", "onnx"]  # it has no name
    check(model, tmp_path, torch.randn(5, 3, 16, 16))


def test_a_dict_of_inputs(tmp_path: Path) -> None:
    model = Words()
    inputs = {"image": torch.randn(2, 3, 4), "word": torch.tensor([[0, 6, 1], [2, 3, 5]]), "scale": 0.5}
    export_model(model, inputs, tmp_path)
    more = {"image": torch.randn(4, 3, 4), "word": torch.randint(7, (4, 3)), "scale": 0.5}
    check(model, tmp_path, more, lambda found: found["score"])


def test_two_inputs_of_which_one_has_no_batch(tmp_path: Path) -> None:
    model = Made(lambda self, a, b: (self.linear(a) @ b, a), linear=nn.Linear(4, 6))
    weights = torch.randn(6, 3)
    export_model(model, (torch.randn(2, 4), weights), tmp_path)
    check(model, tmp_path, (torch.randn(5, 4), weights), lambda found: found[0])


def test_a_fixed_number_of_samples(tmp_path: Path) -> None:
    model = Made(lambda self, a: self.linear(a.reshape(2, -1)), linear=nn.Linear(12, 4))
    a = torch.randn(2, 12)
    with pytest.raises(GmnError, match=r"does not run on a batch of 1: .*--batch 1, batch=1"):
        export_model(model, a, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export_model(model, a, tmp_path, batch=2)
    check(model, tmp_path, torch.randn(2, 12))
    with pytest.raises((RuntimeError, AssertionError), match=r"== 2|equal to 2"):
        torch.export.load(tmp_path / "model.pt2").module()(torch.randn(8, 12))


def test_a_network_that_decides_by_its_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Made(lambda self, a: a * 2 if a.sum() > 2 else a)
    with pytest.raises(GmnError, match="Made cannot be exported to pt2 for any number of samples"):
        export_model(model, torch.randn(2, 3), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_other_outputs_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by(factor: float) -> None:
        opened = export_formats._open_pt2
        skewed = lambda folder: lambda inputs: [factor * t for t in opened(folder)(inputs)]  # noqa: E731
        monkeypatch.setitem(FORMATS, "pt2", dataclasses.replace(FORMATS["pt2"], open=skewed))

    model = small()
    for factor in (1.0002, float("nan")):
        off_by(factor)
        with pytest.raises(GmnError, match="the pt2 file gives other outputs"):
            export_model(model, x, tmp_path / "out", formats=["pt2"])
        assert list(tmp_path.iterdir()) == []
    off_by(1.00005)
    (row,) = export_model(model, x, tmp_path / "out", formats=["pt2"])
    assert row.difference == pytest.approx(5e-5, rel=0.01)


def test_difference() -> None:
    a, b = torch.tensor([2.0, -8.0]), torch.tensor([True, False])
    assert difference([a, b], [a, b]) == 0
    assert difference([a, b], [a, ~b]) == 1 / 8
    assert difference([a], [a[:1]]) == float("inf")
    assert difference([a], [a, b]) == float("inf")
    assert difference([torch.zeros(2)], [torch.ones(2)]) == 1


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = small(), tmp_path / "out"
    for options, message in (
        ({"formats": ["onx"]}, "did you mean 'onnx'"),
        ({"formats": []}, "no format"),
        ({"formats": ["safetensors"]}, "how the network is built"),
        ({"batch": 0}, "bad batch"),
    ):
        with pytest.raises(GmnError, match=message):
            export_model(model, x, folder, **options)
    with pytest.raises(GmnError, match="no batch"):
        export_model(model, torch.tensor(1.0), folder)
    with pytest.raises(GmnError, match="does not run on a batch of 1"):
        export_model(model, x[:, :2], folder)
    with pytest.raises(GmnError, match="NaN or infinity"):
        export_model(model, x / 0, folder)
    wrong = {**CNN, "name": "cifar.resnet14"}
    with pytest.raises(GmnError, match="cannot be rebuilt"):
        export_model(model, x, folder, formats=["safetensors"], network=wrong)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GmnError, match=r"no onnxruntime; pip install onnxruntime"):
        export_model(model, x, folder)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_and_the_network_stay(tmp_path: Path) -> None:
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "model.pt2").write_text("mine")
    with pytest.raises(GmnError, match="the output exists"):
        export_model(model, x, tmp_path, formats=["pt2"])
    assert (tmp_path / "model.pt2").read_text() == "mine"
    export_model(model, x, tmp_path, formats=["pt2"], overwrite=True)
    assert (tmp_path / "model.pt2").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_beside_a_large_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "ONE_FILE", 0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    (row,) = export_model(model, torch.randn(1, 32), tmp_path, formats=["onnx"])
    assert [path.name for path in row.files] == ["model.onnx", "model.onnx.data"]
    a = torch.randn(2, 32)
    torch.testing.assert_close(by_onnx(tmp_path / "model.onnx", a)[0], model(a).detach(), atol=1e-5, rtol=1e-4)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run.parent)
    assert call(monkeypatch, "export", "run", "-o", "best") == 0
    shown = capsys.readouterr().out
    assert "direct-seed1" in shown
    assert "model.onnx" in shown
    content = load_json(Path("best/model.json"))
    assert (content["row"], content["seed"], content["input_shape"]) == ("direct", 1, [3, 16, 16])
    other = ("export", "run", "-o", "other", "--format", "safetensors")
    assert call(monkeypatch, *other, "--row", "metanetwork") == 0
    assert load_json(Path("other/model.json"))["row"] == "metanetwork"
    folder = ("export", "run/models/direct-seed0", "-o", "one", "--format", "pt2", "--batch", "4")
    assert call(monkeypatch, *folder) == 0
    builder = ("export", "cifar.resnet8", "--set-option", "width=4", "--classes", "3", "-o", "named")
    assert call(monkeypatch, *builder, "--format", "safetensors") == 0
    assert gmn.load_model("named").get_submodule("linear").out_features == 3
    capsys.readouterr()
    for arguments, message in (
        ((*other, "--row", "direkt"), "did you mean 'direct'"),
        ((*builder, "--row", "direct"), "--row has no meaning here"),
        (("export", "run", "-o", "new", "--batch", "many"), "bad batch"),
        (("export", "run", "-o", "best"), "the output exists"),
        (("export", "nowhere", "-o", "new"), "unknown network"),
    ):
        assert call(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_run_that_is_not_finished(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (run / "report.json").unlink()
    assert call(monkeypatch, "export", str(run), "-o", str(run.parent / "out")) == 2
    assert "--resume" in capsys.readouterr().err
