"""The meta step.

* one backward through the metanetwork gives the gradient of the whole loss, however many mini-batches there are
* so it does with distillation from the data model
* the metanetwork runs once per step
* training moves the metanetwork, lowers its loss, and is the same after a resume
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer

import gmn
from gmn.checkpoint import load_metanetwork, optimizer_tensors, restore_optimizer, save_metanetwork
from gmn.convert import layouts
from gmn.data import Data
from gmn.meta_train import DataModel, meta_step, train_metanetwork
from gmn.settings import MetaTrain
from gmn.training import make_optimizer


@pytest.fixture(scope="module")
def data() -> Data:
    return gmn.load_data("digits", limit=256)


@pytest.fixture(scope="module")
def subject(data: Data) -> DataModel:
    torch.manual_seed(0)
    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 4}).eval()
    gmn.fit(model, data.train, gmn.Fit(epochs=3, lr=0.1, batch_size=32))
    graph = gmn.to_graph(model, data.example_inputs())
    return DataModel(model, graph, gmn.Importance(graph.spec, gmn.couplings(graph.spec)))


def new_metanetwork(subject: DataModel, *, zero_init: bool = False) -> gmn.MetaNetwork:
    torch.manual_seed(1)
    spec = subject.graph.spec
    config = gmn.MetaNetworkConfig(len(spec.columns), spec.edge_kinds, layers=2, hidden=8, zero_init=zero_init)
    return gmn.MetaNetwork(config)


def batches(data: Data, count: int, size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = data.train.batches(size)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("scale_invariant", [False, True])
def test_the_accumulated_gradient_is_the_direct_one(data: Data, subject: DataModel, scale_invariant: bool) -> None:
    accumulated, direct = new_metanetwork(subject), new_metanetwork(subject)
    parts = batches(data, 4)
    meta_step(accumulated, subject, parts, pruner_reg=0.3, scale_invariant=scale_invariant)

    state = direct(subject.graph).to_state_dict()
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    loss = F.cross_entropy(functional_call(subject.model, state, (images,)), labels)
    loss = loss + 0.3 * subject.importance.sparsity_loss(state, scale_invariant=scale_invariant)
    loss.backward()
    assert unlike(accumulated, direct) == []


def unlike(accumulated: gmn.MetaNetwork, direct: gmn.MetaNetwork) -> list[str]:
    """The parameters with another gradient, or with one of the two missing."""
    expected = {name: parameter.grad for name, parameter in direct.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)

    def alike(got: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
        if got is None or wanted is None:
            return got is wanted
        return torch.allclose(got, wanted, atol=1e-5 * scale, rtol=1e-4)

    found = {name: parameter.grad for name, parameter in accumulated.named_parameters()}
    assert found.keys() == expected.keys()
    return [name for name, grad in found.items() if not alike(grad, expected[name])]


def test_distillation_from_the_data_model(data: Data, subject: DataModel) -> None:
    accumulated, direct = new_metanetwork(subject), new_metanetwork(subject)
    parts = batches(data, 3)
    meta_step(accumulated, subject, parts, pruner_reg=0.0, distill=0.4, temperature=3.0)

    state = direct(subject.graph).to_state_dict()
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    logits, said = functional_call(subject.model, state, (images,)), subject.model(images).detach()
    p, q = (torch.exp(x / 3) / torch.exp(x / 3).sum(1, keepdim=True) for x in (said, logits))
    kl = (p * (p.log() - q.log())).sum(1).mean()
    (0.6 * F.cross_entropy(logits, labels) + 0.4 * 3**2 * kl).backward()
    assert unlike(accumulated, direct) == []
    assert all(p.grad is None for p in subject.model.parameters())


def test_the_metanetwork_runs_once_per_step(data: Data, subject: DataModel) -> None:
    metanetwork, calls = new_metanetwork(subject), []
    metanetwork.register_forward_hook(lambda *_: calls.append(1))
    metrics = meta_step(metanetwork, subject, batches(data, 3), pruner_reg=1.0, distill=0.5)
    assert len(calls) == 1
    assert metrics["accuracy_gradient"] > 0
    assert metrics["sparsity_gradient"] > 0


def test_the_data_model_is_not_changed(data: Data, subject: DataModel) -> None:
    before = copy.deepcopy(subject.model.state_dict())
    meta_step(new_metanetwork(subject), subject, batches(data, 1), pruner_reg=1.0)
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    assert all(p.grad is None for p in subject.model.parameters())


def test_training_lowers_the_sparsity_loss(data: Data, subject: DataModel) -> None:
    # the plain sum of squares: gamma and the normaliser would give the loss another meaning in every step
    criterion = gmn.Criterion(alpha=0.0, normalize="none")
    importance = gmn.Importance(subject.graph.spec, gmn.couplings(subject.graph.spec), criterion)
    plain = DataModel(subject.model, subject.graph, importance)
    metanetwork, history = new_metanetwork(subject, zero_init=True), []
    config = MetaTrain(epochs=4, steps_per_epoch=5, batch_size=32, lr=1e-2, pruner_reg=10.0, scale_invariant=False)
    train_metanetwork(metanetwork, [plain], data.train, config, log=history.append)
    assert history[-1]["sparsity"] < 0.98 * history[0]["sparsity"]


def test_a_resumed_training_ends_like_an_uninterrupted_one(data: Data, subject: DataModel, tmp_path) -> None:
    config = MetaTrain(epochs=3, steps_per_epoch=2, batch_size=32, milestones=[2], lr=1e-2)
    whole = new_metanetwork(subject)

    def save(epoch: int, optimizer: Optimizer) -> None:
        state = optimizer_tensors(optimizer)
        save_metanetwork(tmp_path / f"{epoch}.safetensors", whole, layouts()["generic"], **state)

    train_metanetwork(whole, [subject], data.train, config, seed=5, after_epoch=save)

    resumed, layout, tensors = load_metanetwork(tmp_path / "0.safetensors")
    optimizer = make_optimizer(resumed, config)
    restore_optimizer(optimizer, tensors)
    train_metanetwork(resumed, [subject], data.train, config, seed=5, start=1, optimizer=optimizer)
    assert layout == layouts()["generic"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
