"""Contract of `gmn.tasks`.

* Tasks are different sets of classes, decided by the seed; zoo and targets share none; more tasks begin with the same.
* A task's data holds its classes alone, numbered anew; a head has its classes and leaves the rest as it was.
"""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from zoo import network, small

from gmn.convert import to_graph
from gmn.data import load_data
from gmn.errors import DataError, NetworkError
from gmn.tasks import head_of, sample_tasks, task_data, with_head

NAMES = [f"class {n}" for n in range(10)]


def test_tasks_are_different_sets_of_classes() -> None:
    tasks = sample_tasks(NAMES, [3, 5], 20, 6, seed=0)
    assert len({task.classes for task in tasks}) == len({task.name for task in tasks}) == 26
    assert [task.split for task in tasks] == ["zoo"] * 20 + ["target"] * 6
    assert [len(task.classes) for task in tasks] == [3, 5] * 13
    assert all(task.class_names == tuple(NAMES[c] for c in task.classes) for task in tasks)
    assert sample_tasks(NAMES, [3, 5], 20, 6, seed=0) == tasks
    assert sample_tasks(NAMES, [3, 5], 10, 0, seed=0) == tasks[:10]
    assert [t.classes for t in sample_tasks(NAMES, [3, 5], 20, 6, seed=1)] != [t.classes for t in tasks]
    assert {task.classes for task in sample_tasks("abc", [2], 2, 1, seed=3)} == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize(("sizes", "count"), [([2], 4), ([4], 1), ([1], 1)])
def test_more_tasks_than_sets_of_classes(sizes: list[int], count: int) -> None:
    with pytest.raises(DataError, match=r"too few classes for so many tasks: expected \d different tasks of \d of 3"):
        sample_tasks("abc", sizes, count, 0, seed=0)


def test_the_data_of_a_task() -> None:
    data = load_data("digits")
    part = task_data(data, (7, 2, 5))
    assert part.class_names == ("7", "2", "5")
    for name in ("train", "val", "test"):
        whole, split = getattr(data, name), getattr(part, name)
        kept = [k for k, label in enumerate(whole.labels.tolist()) if label in (7, 2, 5)]
        assert torch.equal(split.images, whole.images[kept])
        assert [(7, 2, 5)[label] for label in split.labels.tolist()] == whole.labels[kept].tolist()
        assert torch.equal(split.mean, whole.mean)
    with pytest.raises(DataError, match=r"no such class: expected 0 to 9; got \[10\]"):
        task_data(data, (1, 10))


def renewed(model: nn.Module, x: torch.Tensor, classes: int, seed: int) -> nn.Module:
    return with_head(model, head_of(to_graph(model, x).spec), classes, seed=seed)


def test_a_head_for_a_task() -> None:
    model, x = network("resnet20B")
    new = renewed(model, x, 3, 1)
    assert new(x).shape == (1, 3)
    assert model(x).shape == (1, 10)
    before, after = model.state_dict(), new.state_dict()
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["linear.weight", "linear.bias"]
    assert torch.equal(renewed(model, x, 3, 1).linear.weight, new.linear.weight)  # type: ignore[union-attr, arg-type]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2)
    assert renewed(vit.eval(), torch.zeros(1, 3, 16, 16), 4, 0).head.out_features == 4  # type: ignore[union-attr]


def test_a_network_without_a_head() -> None:
    with pytest.raises(NetworkError, match="no head to replace: expected a linear layer; got Conv2d; in 1"):
        renewed(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 4, 4), 3, 0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = small(), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.body(x), self.other(x.mean((2, 3)))

    with pytest.raises(NetworkError, match="expected an output made by the last layer alone"):
        renewed(Two(), torch.zeros(1, 3, 8, 8), 3, 0)
