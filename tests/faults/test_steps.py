"""Steps that go wrong.

* A step whose loss or gradient is not finite is not taken, the schedule goes on, norms keep their statistics, the epoch
  counts it, and its means are those of the other steps.
* Five in a row stop the training with the cause, in a short one all of its steps.
* Out of memory: mini-batches are read in pieces from then on; the gradient is that of the whole where norms do not
  learn from the batch, also in evaluations, head pruning and SimSiam. What does not fit at all is an error.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from made_runs import built
from test_training import dark_and_bright, small_network
from torch import Tensor, nn

import gmn
from gmn.errors import TrainingError
from gmn.filter_pruning import Shrunk, _scores
from gmn.gradients import loss_gradients
from gmn.guard import Pieces
from gmn.head_pruning import head_prune
from gmn.loop import run_epochs
from gmn.meta_train import DataModel, meta_step
from gmn.metanetwork import MetaNetwork, MetaNetworkConfig
from gmn.settings import Fit
from gmn.settings_vote import FilterPruning, HeadPruning, SimSiam
from gmn.simsiam import pretrain
from gmn.training import evaluate, fit, make_optimizer, make_schedule


def loop(
    gradients: list[float], losses: list[float] | None = None, start: int = 0
) -> tuple[float, list[dict[str, float]]]:
    """One weight, from 0, with these gradients: its value at the end, and the log. The rate is 1, 1/2 after 2 steps.

    Half of the gradients are the first epoch's; with `start` 1 it lies behind a resumed run.
    """
    model, log = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(model.weight)
    config = Fit(epochs=2, lr=1.0, momentum=0.0, weight_decay=0.0, milestones=[1], gamma=0.5)
    optimizer, half = make_optimizer(model, config), len(gradients) // 2

    def step(index: int) -> dict[str, float]:
        model.weight.grad = torch.full((1, 1), gradients[index])
        return {"loss": losses[index] if losses else float(index)}

    def batches(epoch: int) -> list[int]:
        return list(range(half * epoch, half * (epoch + 1)))

    schedule = make_schedule(optimizer, config, half, done=start * half)
    more: dict[str, Any] = {"model": model, "seed": 0, "title": "mine", "log": log.append, "start": start}
    run_epochs(2, half, batches, step, optimizer, schedule, **more)
    return model.weight.item(), log


def test_a_step_that_is_not_finite_is_skipped(capfd: pytest.CaptureFixture[str]) -> None:
    assert loop([1.0, 1.0, 1.0, 1.0]) == (-3.0, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 2.5}])
    assert "warning" not in capfd.readouterr().err
    weight, log = loop([math.nan, 1.0, 1.0, -math.inf])
    assert weight == -1.5  # the second and the third, at half the rate
    assert log == [{"epoch": 1, "loss": 1.0, "skipped": 1}, {"epoch": 2, "loss": 2.0, "skipped": 1}]
    assert "mine: gradient is inf in epoch 2; the step is skipped" in capfd.readouterr().err
    assert loop([1.0] * 4, [math.inf, 1.0, 1.0, 1.0])[0] == -2.0


def test_several_in_a_row_stop_the_training() -> None:
    bad = math.nan
    assert loop([1.0, bad, bad, bad, bad, 1.0, bad, bad])[0] == -1.5
    with pytest.raises(TrainingError, match=r"mine: gradient is not finite: got nan in 5 steps in a row; in epoch 2"):
        loop([1.0, bad, bad, bad, bad, bad, 1.0, 1.0])
    with pytest.raises(TrainingError, match=r"in 2 steps in a row"):  # it has no more
        loop([bad, bad])


def test_the_patience_of_a_resumed_training_is_that_of_the_whole() -> None:
    """Two steps of four in a row are not all of them, wherever the training was resumed."""
    for start in (0, 1):
        assert loop([0.0, 0.0, math.nan, math.nan], start=start)[1][-1]["skipped"] == 2


def test_norms_keep_their_statistics() -> None:
    """The third of four batches has one image that is not finite."""
    seen: list[Tensor] = []

    def poison(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(inputs[0])
        return (inputs[0].clone().index_fill_(0, torch.tensor([0]), math.nan) if len(seen) == 3 else inputs[0],)

    model, log = small_network(), []
    handle = model.register_forward_pre_hook(poison)
    fit(model, dark_and_bright(), Fit(epochs=1, lr=0.1, batch_size=16), log=log.append)
    handle.remove()
    assert log[0]["skipped"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert int(model.state_dict()["1.num_batches_tracked"]) == 3


def crowded(model: nn.Module, room: int) -> list[int]:
    """Let the network have no memory for more images; the sizes of the batches that it read.

    It is out of memory at the end of a pass, when norms have already learnt from the batch.
    """
    seen: list[int] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        if len(inputs[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen.append(len(inputs[0]))

    model.register_forward_hook(hook)
    return seen


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def test_a_mini_batch_in_pieces(capfd: pytest.CaptureFixture[str]) -> None:
    config, log = Fit(epochs=2, lr=0.05, batch_size=16), []
    whole, cut = plain(), plain()
    seen = crowded(cut, 5)
    fit(whole, dark_and_bright(), config)
    fit(cut, dark_and_bright(), config, log=log.append)
    assert seen == [4] * 4 * 8
    assert [entry["pieces"] for entry in log] == [4, 4]
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    said = capfd.readouterr().err
    assert said.count("out of memory") == 2
    assert "from now on a mini-batch is read in 4 pieces" in said


def test_norms_do_not_learn_from_a_pass_that_failed() -> None:
    model = small_network()
    crowded(model, 8)
    fit(model, dark_and_bright(16), Fit(epochs=1, lr=0.1, batch_size=16))
    assert int(model.state_dict()["1.num_batches_tracked"]) == 2


def test_what_does_not_fit_at_all() -> None:
    model = small_network()
    crowded(model, 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        fit(model, dark_and_bright(), Fit(epochs=1, lr=0.1, batch_size=16))


def test_a_meta_step_in_pieces() -> None:
    """Data models are in eval mode: the gradient is the same."""
    model = built({"name": "cifar.resnet8", "num_classes": 10, "in_channels": 1, "options": {"width": 4}}).eval()
    data = gmn.load_data("digits", limit=100)
    graph = gmn.to_graph(model, data.example_inputs())
    subject = DataModel(model, graph, gmn.Importance(graph.spec, gmn.couplings(graph.spec)))
    images = next(data.train.batches(20))
    found: list[Any] = []
    for count in (1, 3):
        torch.manual_seed(0)
        config = MetaNetworkConfig(len(subject.graph.spec.columns), dict(subject.graph.spec.edge_kinds), 1, 4)
        metanetwork, pieces = MetaNetwork(config), Pieces("x", len(images[1]))
        pieces.count = count
        metrics = meta_step(metanetwork, subject, [images], pruner_reg=1.0, pieces=pieces)
        found.append((metrics, [p.grad.clone() for p in metanetwork.parameters() if p.grad is not None]))
    (whole, one), (cut, three) = found
    assert cut["pieces"] == 3
    assert whole["loss"] == pytest.approx(cut["loss"])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, three, strict=True))


def test_an_evaluation_in_pieces() -> None:
    model, split = plain().eval(), dark_and_bright()
    whole = evaluate(model, split)
    seen = crowded(model, 5)
    assert evaluate(model, split) == pytest.approx(whole)
    assert max(seen) <= 5
    assert sum(seen) == len(split)
    crowded(model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, split)


def test_scores_in_pieces() -> None:
    """Gradients of the loss and activations, which filters are pruned by."""
    model, split = small_network().eval(), dark_and_bright()
    graph = gmn.to_graph(model, torch.zeros(1, *split.images.shape[1:]))
    found, seen = list[list[Tensor]](), list[int]()
    for room in (99, 5):
        seen = crowded(model, room)
        own = list(loss_gradients(model, split, batch_size=16).values())
        for score in ("activation", "taylor"):
            config = FilterPruning(score=score, batch_size=16, score_images=20)
            own.append(_scores(model, graph.spec, gmn.couplings(graph.spec), split, config))
        found.append(own)
    assert 1 < max(seen) <= 5
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_self_supervised_training_in_pieces() -> None:
    """Its loss compares the views of one image, so that images can be read apart."""
    model = built({"name": "cifar.resnet8", "num_classes": 10, "in_channels": 1, "options": {"width": 4}})
    split, log = gmn.load_data("digits", limit=64).train, list[dict[str, float]]()
    example, seen = torch.zeros(2, 1, 8, 8), crowded(model, 9)
    config = SimSiam(epochs=1, batch_size=len(split) // 2, projection=16, bottleneck=8)
    pretrain(model, split, config, example, log=log.append)
    assert log[0]["pieces"] > 1
    assert -1 <= log[0]["loss"] < 0
    assert max(seen) <= 9


def test_head_pruning_in_pieces() -> None:
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 4}
    model = built({"name": "timm.vit_tiny_patch16_224", "num_classes": 10, "in_channels": 1, "options": options})
    split, found = gmn.load_data("digits", limit=64).train, list[Shrunk]()
    for room in (100, 4):
        config = HeadPruning(iterations=30, final_iterations=0, lr=1e-3, batch_size=16)
        own = copy.deepcopy(model)
        crowded(own, room)
        found.append(head_prune(own, split, config, torch.zeros(1, 1, 8, 8), ratio=0.5))
    assert torch.equal(found[0].keep.keep, found[1].keep.keep)
    for a, b in zip(found[0].model.parameters(), found[1].model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
