"""Which single weights go, and that they stay away.

* unstructured: the smallest of all go, of equal ones the first stays; limits, one ranking or the same share of each
* N:M: of every M consecutive inputs exactly the N largest stay, whatever the layer's shape; what does not fit is dense
* only weights of layers go; keep-lists, criteria by chance and by gradient, and one line for what makes no sense
* a network that was saved keeps its zeros in training; what was made of zeros is not held
* weights that are not 2:4, and machines without the hardware, are refused in one line
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gmn
from gmn.checkpoint import save_model
from gmn.costs import cost
from gmn.data import Data, load_data
from gmn.errors import GmnError, PruningError, RecipeError
from gmn.gradients import loss_gradients
from gmn.ranking import prune_to
from gmn.settings import Criterion, Prune
from gmn.weight_masks import WeightMask, n_of_m, unstructured
from gmn.weight_ranking import LEAST, weight_ladder, weight_scores

RESNET = {"name": "cifar.resnet8", "num_classes": 10, "in_channels": 1, "options": {"width": 8, "shortcut": "B"}}


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return gmn.build_network(**RESNET).eval()


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits", limit=192)


# -- masks of tensors --------------------------------------------------------------------------------------------------


def test_the_smallest_of_all_go_and_of_equal_ones_the_first_stays() -> None:
    scores = {"a": torch.tensor([[5.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([2.0, 9.0])}
    keep = unstructured(scores, 0.5)
    assert keep["a"].tolist() == [[True, False], [True, False]]
    assert keep["b"].tolist() == [False, True]
    assert [unstructured(scores, 1 / 3)[name].tolist() for name in "ab"] == [
        [[True, False], [True, True]],
        [False, True],
    ]


def test_limits_and_local_rankings_by_hand() -> None:
    scores = {"a": torch.arange(1.0, 9.0), "b": torch.arange(10.0, 14.0)}
    gone = lambda **how: [int((~keep).sum()) for keep in unstructured(scores, 0.5, **how).values()]  # noqa: E731
    assert gone() == [6, 0]
    assert gone(local=True) == [4, 2]
    assert gone(limits={"a": 0.5}) == [4, 2]
    assert gone(limits={"a": 0.375}, local=True) == [3, 3]
    with pytest.raises(PruningError, match=r"out of reach: expected 0\.5 of 12 weights; got at most 0\.41"):
        unstructured(scores, 0.5, limits={"a": 0.25})  # 2 of a, 3 of b: one stays
    assert [int(keep.sum()) for keep in unstructured({"a": torch.ones(1), "b": torch.ones(3)}, 0.5).values()] == [1, 1]


def test_a_share_of_less_than_a_weight_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), torch.zeros(1, 4)
    with pytest.raises(
        PruningError, match=r"no weight would go: expected at least 0\.019, one of 54 weights; got .*0\.009"
    ):
        gmn.prune(model, x, pattern="unstructured", sparsity=0.009)
    masked = gmn.prune(model, x, pattern="unstructured", sparsity=0.019)
    assert gmn.cost(masked.model, x).parameters == 65
    assert sum(int((~keep).sum()) for keep in masked.mask.keep.values()) == 1  # type: ignore[union-attr]
    spec, config = gmn.to_graph(model, x).spec, Prune(pattern="unstructured")
    ladder = list(weight_ladder(model, spec, config, points=2000))  # of a curve's points some may be alike
    assert len(ladder) == 2000
    assert all(bool(keep.all()) for keep in ladder[0].keep.values())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.01, 0.5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_weight_that_stays_is_smaller_than_one_that_goes(sizes: list[int], share: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(size + 1, generator=rng) for i, size in enumerate(sizes)}
    keep = unstructured(scores, share)
    flat, kept = torch.cat(list(scores.values())), torch.cat(list(keep.values()))
    assert int((~kept).sum()) == round(share * len(flat))
    spare = torch.cat([torch.full((int(k.numel()),), int(k.sum()) > 1) for k in keep.values()])
    if bool((~kept).any()) and bool((kept & spare).any()):
        assert float(flat[~kept].max()) <= float(flat[kept & spare].min())


def test_n_of_m_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0], [1.0, 4.0, 3.0, 2.0, 5.0, 7.0, 6.0, 8.0]])
    assert n_of_m(scores, 2, 4).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 0, 1]]
    assert n_of_m(scores, 1, 2).int().tolist() == [[1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1, 0, 1]]
    assert torch.equal(n_of_m(scores.T, 2, 4, axis=0), n_of_m(scores, 2, 4).T)
    with pytest.raises(PruningError, match="groups of 3 do not fit: expected a multiple of 3; got 8"):
        n_of_m(scores, 2, 3)


@given(st.integers(2, 6), st.integers(1, 3), st.lists(st.integers(1, 4), max_size=2), st.data())
@settings(max_examples=40, deadline=None)
def test_every_group_of_m_has_exactly_n(m: int, groups: int, others: list[int], draw: st.DataObject) -> None:
    n, axis = draw.draw(st.integers(1, m - 1)), draw.draw(st.integers(0, len(others)))
    shape = [*others[:axis], m * groups, *others[axis:]]
    scores = torch.randint(4, shape, generator=torch.Generator().manual_seed(m)).float()  # with ties
    keep = n_of_m(scores, n, m, axis)
    assert keep.shape == scores.shape
    inside, stays = (tensor.movedim(axis, -1).reshape(-1, m) for tensor in (scores, keep))
    assert bool((stays.sum(1) == n).all())
    lost, kept = inside.masked_fill(stays, -1.0).amax(1), inside.masked_fill(~stays, 9.0).amin(1)
    assert bool((lost <= kept).all())


# -- masks of networks -------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers whose inputs lie on different axes, and layers without groups of four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2)
        self.deep, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1, groups=2)
        self.flat = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.mix(self.deep(self.up(self.stem(x)))).flatten(1))


def test_groups_run_along_the_inputs_of_every_layer() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.zeros(1, 3, 4, 4)
    result = gmn.prune(model, x, pattern="2:4")
    assert result.mask is not None
    assert dict(result.mask.dense) == {
        "stem": "inputs: 3, no multiple of 4",
        "deep": "inputs: 1, no multiple of 4",
    }
    left = {name: (p != 0).int() for name, p in result.model.named_parameters()}
    assert bool((left["up.weight"].view(2, 4, 4, 3, 3).sum(1) == 2).all())  # [inputs, outputs of a piece, 3, 3]
    assert bool((left["mix.weight"].view(6, 1, 4).sum(2) == 2).all())
    assert bool((left["flat.weight"].view(5, 24, 4).sum(2) == 2).all())  # pixels that are read flattened are inputs
    assert bool(left["stem.weight"].all())
    assert bool(left["deep.weight"].all())
    assert all(bool(left[f"{name}.bias"].all()) for name in ("stem", "up", "deep", "mix", "flat"))
    gone = sum(getattr(model, name).weight.numel() // 2 for name in ("up", "mix", "flat"))
    whole = sum(p.numel() for p in model.parameters())
    assert result.report["parameters"] == whole - gone
    assert result.report["parameters_left"] == (whole - gone) / whole
    assert result.report["speed_up"] == 1.0


def test_attention_has_groups_in_its_packed_projection() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    pruned = gmn.prune(layer, torch.zeros(1, 3, 8), pattern="1:4").model
    packed = pruned.get_parameter("self_attn.in_proj_weight")
    assert bool(((packed != 0).view(24, 2, 4).sum(2) == 1).all())
    assert bool((pruned.get_parameter("norm1.weight") == 1).all())


class Words(nn.Module):
    """A look-up, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embed(words).mean(1))


def test_an_embedding_is_no_layer() -> None:
    pruned = gmn.prune(Words(), torch.zeros(1, 5, dtype=torch.long), pattern="unstructured", sparsity=0.5)
    assert pruned.mask is not None
    assert list(pruned.mask.keep) == ["head.weight"]
    assert int((~pruned.mask.keep["head.weight"]).sum()) == 16


def test_unstructured_takes_the_globally_smallest_weights() -> None:
    model, x = resnet(), torch.zeros(1, 1, 8, 8)
    pruned = gmn.prune(model, x, pattern="unstructured", sparsity=0.9)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    every = torch.cat([m.weight.detach().abs().flatten() for m in layers.values()])
    edge = every.sort().values[round(0.9 * len(every))]
    for name, layer in layers.items():
        expected = torch.where(layer.weight.abs() >= edge, layer.weight, torch.zeros(()))
        assert torch.equal(pruned.model.get_parameter(f"{name}.weight"), expected)
    assert pruned.report["flops"] == cost(model, x).flops
    zeros = sum(int((p == 0).sum()) for n, p in pruned.model.named_parameters() if n.removesuffix(".weight") in layers)
    assert zeros == round(0.9 * len(every))


def test_keep_limits_and_the_same_share_of_every_layer() -> None:
    x = torch.zeros(1, 1, 8, 8)
    keep = {"pattern": "unstructured", "sparsity": 0.6, "keep": ["conv1", "linear"], "limits": {"layer3.*": 0.5}}
    mask = gmn.prune(resnet(), x, **keep).mask
    assert mask is not None
    assert dict(mask.dense) == {"conv1": "prune.keep 'conv1'", "linear": "prune.keep 'linear'"}
    shares = {name: float((~kept).float().mean()) for name, kept in mask.keep.items()}
    assert max(share for name, share in shares.items() if name.startswith("layer3")) == 0.5
    gone, total = sum(int((~k).sum()) for k in mask.keep.values()), sum(k.numel() for k in mask.keep.values())
    assert gone == round(0.6 * total)
    local = gmn.prune(resnet(), x, pattern="unstructured", sparsity=0.5, ranking="local").mask
    assert local is not None
    assert {float((~kept).float().mean()) for kept in local.keep.values()} == {0.5}
    with pytest.raises(PruningError, match=r"no layer: expected one of the layers with weights to prune.*keep 'conv9'"):
        gmn.prune(resnet(), x, pattern="2:4", keep=["conv9"])
    with pytest.raises(PruningError, match=r"no weight may go: .*prune\.keep '\*'"):
        gmn.prune(resnet(), x, pattern="2:4", keep=["*"])


def test_criteria_of_weights(data: Data) -> None:
    model, names = resnet(), ["conv1.weight", "linear.weight"]
    gradients = loss_gradients(model, data.train, 64)
    for name, score in weight_scores(model, names, Criterion(score="taylor"), gradients).items():
        assert torch.equal(score, (model.get_parameter(name) * gradients[name]).abs())
    for name, score in weight_scores(model, names).items():
        assert torch.equal(score, model.get_parameter(name).abs())
    draws = [weight_scores(model, names, Criterion(score="random", seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0]["conv1.weight"], draws[1]["conv1.weight"])
    assert not torch.equal(draws[0]["conv1.weight"], draws[2]["conv1.weight"])
    by_taylor = gmn.prune(model, data.example_inputs(), pattern="2:4", criterion="taylor", data=data)
    assert by_taylor.report["validation_accuracy"] > 0
    with pytest.raises(PruningError, match="'taylor' needs gradients"):
        gmn.prune(model, data.example_inputs(), pattern="2:4", criterion="taylor")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "4:2"}, "N:M with N below M, such as 2:4; got '4:2'"),
        ({"pattern": "0:4"}, "got '0:4'"),
        ({"pattern": "weights"}, "expected channels, unstructured"),
        ({"pattern": "2:4", "speed_up": 2.0}, "pattern 2:4 takes no FLOPs away: leave speed_up out"),
        ({"pattern": "2:4", "sparsity": 0.5}, "says itself how much goes: leave sparsity out"),
        ({"sparsity": 0.5}, "pattern channels has speed_up for its target"),
        ({"pattern": "unstructured", "sparsity": 1.2}, "'sparsity': expected less than 1; got 1.2"),
        ({"pattern": "unstructured", "max_ratio": 0.5}, r"max_ratio has no meaning.*limits: {'\*': 0.95}"),
        ({"pattern": "unstructured", "round_to": 8}, "round_to has no meaning with pattern unstructured"),
        ({"pattern": "2:4", "limits": {"*": 0.5}}, "limits has no meaning with pattern 2:4"),
        ({"pattern": "2:4", "ranking": "local"}, "ranking has no meaning with pattern 2:4"),
        ({"pattern": "2:4", "votes": "zoo"}, "unknown key 'votes'"),
        ({"pattern": "2:4", "criterion": "fpgm"}, "does not score single weights: expected norm, taylor"),
        ({"pattern": "2:4", "criterion": "bn-scale"}, "does not score single weights"),
        (
            {"pattern": "2:4", "criterion": Criterion(normalize="mean")},
            "only channels have: got criterion.normalize mean",
        ),
        ({"pattern": "unstructured", "limits": {"*": 0.5}}, r"out of reach: expected 0\.8 of .* at most 0\.5 with"),
    ],
)
def test_what_makes_no_sense_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises((RecipeError, PruningError), match=said) as caught:
        gmn.prune(resnet(), torch.zeros(1, 1, 8, 8), **options)
    assert "\n" not in str(caught.value)


def test_targets_have_defaults_by_pattern() -> None:
    assert (Prune().speed_up, Prune().sparsity, Prune(speed_up=None).speed_up) == (2.0, None, 2.0)
    assert (Prune(pattern="unstructured").speed_up, Prune(pattern="unstructured").sparsity) == (None, 0.8)
    assert Prune(**Prune(pattern="2:4").model_dump()) == Prune(pattern="2:4")
    model, x = resnet(), torch.zeros(1, 1, 8, 8)
    with pytest.raises(PruningError, match="channels need a speed-up"):
        prune_to(model, gmn.to_graph(model, x), x, Prune(pattern="2:4"))


def test_ladders_end_where_they_should() -> None:
    model, x = resnet(), torch.zeros(1, 1, 8, 8)
    spec = gmn.to_graph(model, x).spec
    shares = lambda masks: [  # noqa: E731
        sum(int(k.sum()) for k in mask.keep.values()) / sum(k.numel() for k in mask.keep.values()) for mask in masks
    ]
    assert shares(weight_ladder(model, spec, Prune(pattern="2:4"), points=7)) == [0.75, 0.5, 0.25]
    own = Prune(pattern="unstructured")
    assert shares(weight_ladder(model, spec, own, points=2)) == pytest.approx([LEAST**0.5, LEAST], abs=1e-4)
    limited = own.model_copy(update={"limits": {"*": 0.75}})
    assert shares(weight_ladder(model, spec, limited, points=2)) == pytest.approx([0.5, 0.25], abs=1e-3)


def test_a_saved_network_keeps_its_zeros_in_training(data: Data, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="no weight is zero"):
        WeightMask.of_zeros(resnet())
    pruned = gmn.prune(resnet(), data.example_inputs(), pattern="2:4")
    assert pruned.mask is not None
    save_model(tmp_path, pruned.model, RESNET)
    loaded = gmn.load_model(tmp_path)
    mask = WeightMask.of_zeros(loaded)
    assert mask.keep.keys() == pruned.mask.keep.keys()
    gmn.fit(loaded, data.train, gmn.Fit(epochs=1, lr=0.1, batch_size=64), mask=mask)
    for name, keep in mask.keep.items():
        assert torch.equal(keep, pruned.mask.keep[name])
        assert torch.equal(loaded.get_parameter(name) != 0, keep)
        assert not torch.equal(loaded.get_parameter(name), pruned.model.get_parameter(name))


def test_what_was_made_of_zeros_is_not_held() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)), model[0].bias.zero_(), model[1].weight.zero_()
    assert {name: keep.tolist() for name, keep in WeightMask.of_zeros(model).keep.items()} == {
        "0.weight": [[True, False], [False, True]]
    }


# -- 2:4 in torch's own format -----------------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 6))


def test_what_semi_structured_refuses() -> None:
    model = perceptron()
    with pytest.raises(PruningError, match=r"the weights are not 2:4: .*in 0; prune with pattern 2:4"):
        gmn.semi_structured(model)
    pruned = gmn.prune(model, torch.zeros(1, 128), pattern="2:4").model
    three = gmn.prune(model, torch.zeros(1, 128), pattern="3:4").model
    with pytest.raises(PruningError, match="got 3 of 4 that are not zero"):
        gmn.semi_structured(three)
    with pytest.raises(PruningError, match="a row has no groups of 4: got 6 inputs"):
        gmn.semi_structured(nn.Linear(6, 4))
    with pytest.raises(PruningError, match="no linear layer to convert"):
        gmn.semi_structured(pruned, keep=["*"])
    with pytest.raises(PruningError, match=r"no layer: expected one of the linear layers; got keep='fc'"):
        gmn.semi_structured(pruned, keep=["fc"])
    with pytest.raises(GmnError, match=r"expected a CUDA device of compute capability 8\.0 or more; got cpu"):
        gmn.semi_structured(pruned)


def test_each_layer_is_handed_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from gmn import sparse_format as module

    pruned = gmn.prune(perceptron(), torch.zeros(1, 128), pattern="2:4").model
    monkeypatch.setattr(module, "_refuse_hardware", lambda _: None)
    monkeypatch.setattr(module, "to_sparse_semi_structured", lambda weight: 2 * weight)
    converted = gmn.semi_structured(pruned, keep=["2"])
    assert torch.equal(converted.get_parameter("0.weight"), 2 * pruned.get_parameter("0.weight"))
    assert torch.equal(converted.get_parameter("2.weight"), pruned.get_parameter("2.weight"))
    assert not converted.training


class Every(nn.Module):
    """A layer of every kind that may stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.mlp(tokens + self.attention(tokens, tokens, tokens)[0]).mean(1))


def test_what_is_compressed_and_what_stays_dense_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gmn import sparse_format as module

    pruned = gmn.prune(Every(), torch.zeros(1, 4, 4, 4), pattern="2:4").model
    monkeypatch.setattr(module, "_refuse_hardware", lambda _: None)
    monkeypatch.setattr(module, "to_sparse_semi_structured", lambda weight: 2 * weight)
    capsys.readouterr()
    gmn.semi_structured(pruned, keep=["head"])
    dense = "conv (convolution); attention (nn.MultiheadAttention); head (keep='head')"
    assert capsys.readouterr().err == f"semi-structured: mlp; dense: {dense}\n"
    gmn.semi_structured(nn.Sequential(pruned.get_submodule("mlp")))
    assert capsys.readouterr().err == "semi-structured: 0; dense: no layer\n"


CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.skipif(not CAPABLE, reason="needs a CUDA device of compute capability 8.0 or more")
def test_the_compressed_network_gives_the_same_outputs() -> None:
    pruned = gmn.prune(perceptron(), torch.zeros(1, 128), pattern="2:4").model.cuda().half()
    images = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    converted = gmn.semi_structured(pruned, keep=["2"])
    assert isinstance(converted.get_parameter("0.weight").data, torch.sparse.SparseSemiStructuredTensor)
    with torch.no_grad():
        torch.testing.assert_close(converted(images), pruned(images), rtol=1e-2, atol=1e-2)
    with pytest.raises(GmnError, match="torch cannot compress the layer"):
        gmn.semi_structured(pruned)  # 6 outputs
    with pytest.raises(GmnError, match="float16 or bfloat16"):
        gmn.semi_structured(pruned.float(), keep=["2"])
