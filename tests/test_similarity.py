"""Task similarity.

* LEEP is the number worked out by hand, changes with nothing but what it depends on, and is 0 at best.
* Matching is the best over all permutations.
* A similarity is found by name, one's own too; what a task lacks is said.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from gmn import similarity
from gmn.errors import GmnError
from gmn.measures import groups_of_five, leep, matched, prototype_similarity, shared
from gmn.similarity import (
    Leep,
    Prototypes,
    SharedClasses,
    SharedParents,
    Similarity,
    TaskView,
    register_similarity,
    scored,
    similarity_by_name,
)


def distributions(images: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed)).double().mul(2).softmax(dim=1)


def labels_of(images: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))


# --- LEEP


def test_leep_by_hand() -> None:
    """4 images, 2 source classes a, b; labels 0, 0, 1, 1.

    P(y, z), times 4:   a            b             P(y | z):  a     b
        y = 0           .8+.6 = 1.4  .2+.4 = 0.6              7/9   3/11
        y = 1           .3+.1 = 0.4  .7+.9 = 1.6              2/9   8/11

    sum_z P(y_i | z) theta_z:  .8*7/9 + .2*3/11 = 67/99    .6*7/9 + .4*3/11 = 57/99
                               .3*2/9 + .7*8/11 = 57/99    .1*2/9 + .9*8/11 = 67/99

    LEEP = (ln 67/99 + ln 57/99) / 2 = (-0.390427 - 0.552069) / 2
    """
    theta = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]], dtype=torch.float64)
    assert leep(theta, torch.tensor([0, 0, 1, 1])) == pytest.approx(-0.471248, abs=1e-6)
    assert leep(theta, torch.tensor([0, 0, 1, 1])) == pytest.approx(math.log(67 * 57 / 99**2) / 2, abs=1e-14)


def test_leep_is_the_formula_in_loops() -> None:
    theta, labels = distributions(30, 4), labels_of(30, 3)
    total = 0.0
    for i in range(30):
        inner = 0.0
        for z in range(4):
            joint = sum(float(theta[j, z]) for j in range(30) if labels[j] == labels[i]) / 30
            inner += joint / (float(theta[:, z].sum()) / 30) * float(theta[i, z])
        total += math.log(inner)
    assert leep(theta, labels) == pytest.approx(total / 30, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_leep_does_not_see_names_order_or_repetition(seed: int) -> None:
    theta, labels = distributions(40, 6, seed), labels_of(40, 4, seed + 100)
    value, shuffle = leep(theta, labels), torch.Generator().manual_seed(seed)
    images, sources = torch.randperm(40, generator=shuffle), torch.randperm(6, generator=shuffle)
    assert leep(theta[images], labels[images]) == pytest.approx(value, abs=1e-12)
    assert leep(theta[:, sources], labels) == pytest.approx(value, abs=1e-12)
    assert leep(theta, torch.tensor([7, 0, 19, 2])[labels]) == pytest.approx(value, abs=1e-12)
    assert leep(theta.repeat(3, 1), labels.repeat(3)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_leep_does_not_see_a_split_of_a_source_class_nor_one_never_predicted(seed: int) -> None:
    """Two halves in a fixed proportion say the same as the whole, and a class of probability 0 says nothing."""
    theta, labels = distributions(40, 5, seed), labels_of(40, 4, seed + 100)
    value = leep(theta, labels)
    split = torch.cat([theta[:, :4], theta[:, 4:] * 0.3, theta[:, 4:] * 0.7, torch.zeros(40, 1)], dim=1)
    assert leep(split, labels) == pytest.approx(value, abs=1e-12)


def test_leep_of_sources_that_tell_all_or_nothing() -> None:
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    perfect = torch.eye(4)[torch.tensor([2, 0, 3])[labels]]  # one source class for each label, one to spare
    assert leep(perfect, labels) == 0.0
    finer = torch.eye(6)[labels + 3 * torch.tensor([0, 1, 0, 0, 1, 1, 0, 0])]  # two source classes for a label
    assert leep(finer, labels) == 0.0
    same = torch.tensor([0.1, 0.6, 0.3]).expand(8, 3)
    shares = [2 / 8, 3 / 8, 3 / 8]
    assert leep(same, labels) == pytest.approx(sum(p * math.log(p) for p in shares), abs=1e-7)
    assert leep(distributions(8, 3), torch.zeros(8, dtype=torch.long)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_leep_is_at_most_0_and_finite(seed: int) -> None:
    sharp = torch.randn(50, 5, generator=torch.Generator().manual_seed(seed)).mul(200).softmax(dim=1)
    value = leep(sharp, labels_of(50, 5, seed))
    assert math.isfinite(value)
    assert value <= 0.0


def test_leep_takes_half_precision_and_small_integers() -> None:
    theta, labels = distributions(40, 5), labels_of(40, 4)
    assert leep(theta.bfloat16(), labels.to(torch.uint8)) == pytest.approx(leep(theta, labels), abs=1e-2)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "n > 0 images"),
        (torch.ones(4), torch.zeros(4, dtype=torch.long), r"\[n, Z\]"),
        (torch.tensor([[0.5, 0.5], [3.0, -2.0]]), torch.tensor([0, 1]), r"row 1: sum 1, smallest -2; of logits"),
        (torch.tensor([[0.5, 0.6]]), torch.tensor([0]), "sum 1.1"),
        (torch.tensor([[math.nan, 0.6]]), torch.tensor([0]), "row 0"),
        (torch.ones(2, 1), torch.tensor([0]), r"expected \[2\]; got \[1\]"),
        (torch.ones(2, 1), torch.tensor([0.0, 1.0]), "integers"),
        (torch.ones(2, 1), torch.tensor([0, -1]), "out of range"),
    ],
)
def test_leep_refuses(predictions: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(GmnError, match=message):
        leep(predictions, labels)


# --- matching, prototypes, counts, groups


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (4, 4), (5, 3), (5, 5)])
def test_matching_is_the_best_of_all_permutations(shape: tuple[int, int]) -> None:
    for seed in range(10):
        scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        wide = scores if shape[0] <= shape[1] else scores.T
        rows = range(wide.shape[0])
        best = max(
            sum(float(wide[i, p[i]]) for i in rows) for p in itertools.permutations(range(wide.shape[1]), len(rows))
        )
        assert matched(scores) == pytest.approx(best / len(rows), abs=1e-6)
        assert matched(scores) == pytest.approx(matched(scores.T), abs=1e-12)


def test_prototypes_are_matched_by_cosine() -> None:
    """Lengths and the order of the classes do not matter; a task within a larger one is as near as can be."""
    a = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert prototype_similarity(a, a.flip(0) * 3.0) == pytest.approx(1.0, abs=1e-12)
    assert prototype_similarity(a, a[1:3]) == pytest.approx(1.0, abs=1e-12)
    assert prototype_similarity(a[:1], -a[:1]) == pytest.approx(-1.0, abs=1e-12)
    assert prototype_similarity(torch.zeros(1, 8), a) == 0.0
    # cosines: 1 and 0.6 / 0.8 and 0; the larger pair leaves 0 to the others, 0.6 and 0.8 together make more
    b, c = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[1.0, 0.0], [0.6, -0.8]])
    assert prototype_similarity(b, c) == pytest.approx(0.7)


def test_prototypes_that_do_not_fit() -> None:
    with pytest.raises(GmnError, match=r"\[2, 3\] and \[2, 4\]"):
        prototype_similarity(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(GmnError, match="finite"):
        prototype_similarity(torch.full((2, 3), math.nan), torch.ones(2, 3))
    with pytest.raises(GmnError, match="finite"):
        prototype_similarity(torch.ones(0, 3), torch.ones(2, 3))


def test_shared_names_are_counted_once() -> None:
    assert shared(("fish", "fish", "trees"), ("fish", "trees", "trees")) == 2
    assert shared((), ("fish",)) == 0


def test_five_groups_of_equal_width() -> None:
    assert groups_of_five([0, 1, 2, 3, 4, 5]) == [5, 5, 4, 3, 2, 1]
    assert groups_of_five([-1.0, -3.5, -1.2]) == [1, 5, 1]
    assert groups_of_five([2.0, 2.0]) == [1, 1]
    assert groups_of_five([0.3]) == [1]
    assert groups_of_five([]) == []
    for wrong in (math.nan, -math.inf):
        with pytest.raises(GmnError, match="finite"):
            groups_of_five([0.0, wrong])


# --- one interface


def test_the_built_ins_by_name() -> None:
    built_in = {"shared_classes", "shared_parents", "wordnet", "prototypes", "leep"}
    assert built_in <= set(similarity._SIMILARITIES)
    assert all(similarity_by_name(name).name == name for name in built_in)
    with pytest.raises(GmnError, match=r"unknown similarity 'prototype': expected one of leep, .*'prototypes'"):
        similarity_by_name("prototype")
    with pytest.raises(GmnError, match=r"'leep' does not take these options: got foo=1: .*no arguments"):
        similarity_by_name("leep", foo=1)
    with pytest.raises(GmnError, match="makes no Similarity"):
        similarity_by_name("builtins:dict")


def test_a_similarity_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_SIMILARITIES", dict(similarity._SIMILARITIES))

    @register_similarity("size")
    class Size(Similarity):
        def __init__(self, scale: float = 1.0) -> None:
            self.scale = scale

        def score(self, target: TaskView, neighbour: TaskView) -> float:
            return -self.scale * abs(len(target.classes) - len(neighbour.classes))

    assert similarity_by_name("size", scale=2.0).score(TaskView(("a",)), TaskView(("a", "b"))) == -2.0
    assert register_similarity("size")(Size) is Size
    with pytest.raises(GmnError, match="'leep' of a similarity is taken"):
        register_similarity("leep")(Size)
    with pytest.raises(GmnError, match="only a Similarity"):
        register_similarity("new")(dict)


def test_similarity_named_by_module() -> None:
    assert isinstance(similarity_by_name("gmn.similarity:Prototypes"), Prototypes)


def test_counts_of_classes_and_parents() -> None:
    a = TaskView(("bear", "bee", "tiger"), ("carnivores", "insects", "carnivores"))
    b = TaskView(("lion", "wolf", "bee"), ("carnivores", "carnivores", "insects"))
    assert SharedClasses().score(a, b) == 1.0
    assert SharedParents().score(a, b) == 2.0


def test_leep_runs_the_neighbours_model_on_the_targets_images() -> None:
    """The view of a target is what `predict` gets, so that one neighbour serves every target."""
    images = {("bear", "bee"): distributions(6, 3, 0), ("cup", "bowl"): distributions(4, 3, 1)}
    neighbour = TaskView(("x", "y", "z"), predict=lambda target: images[target.classes])
    for classes, theta in images.items():
        labels = labels_of(len(theta), 2)
        assert Leep().score(TaskView(classes, labels=labels), neighbour) == leep(theta, labels)


@pytest.mark.parametrize(
    ("name", "message"),
    [("shared_parents", "parents"), ("prototypes", "prototypes"), ("leep", "labels of its training images")],
)
def test_what_a_task_lacks_is_said(name: str, message: str) -> None:
    with pytest.raises(GmnError, match=f"'{name}' needs {message}.*the task of bear, bee"):
        similarity_by_name(name).score(TaskView(("bear", "bee")), TaskView(("cup", "bowl")))


def test_what_a_neighbour_lacks_is_said() -> None:
    target = TaskView(("bear",), ("carnivores",), torch.ones(1, 2), torch.zeros(3, dtype=torch.long))
    for name in ("shared_parents", "prototypes", "leep"):
        with pytest.raises(GmnError, match=f"'{name}' needs .*the task of cup"):
            similarity_by_name(name).score(target, TaskView(("cup",)))


@pytest.mark.parametrize(
    ("classes", "parts", "message"),
    [
        ((), {}, "no two alike"),
        (("crane", "crane"), {}, "WordNet ids"),
        (("a", "b"), {"parents": ("p",)}, "expected 2 or none; got 1"),
        (("a", "b"), {"prototypes": torch.ones(3, 4)}, r"expected \[2, D\]; got \[3, 4\]"),
        (("a", "b"), {"labels": torch.tensor([0, 2])}, "expected 0 to 1; got 0 to 2"),
    ],
)
def test_a_view_checks_its_parts(classes: tuple[str, ...], parts: dict[str, object], message: str) -> None:
    with pytest.raises(GmnError, match=message):
        TaskView(classes, **parts)  # type: ignore[arg-type]


def test_a_score_that_is_nan_is_refused() -> None:
    class Letter(Similarity):
        def score(self, target: TaskView, neighbour: TaskView) -> float:
            return {"a": 1.0}.get(neighbour.classes[0], math.nan)

    task = TaskView(("a",))
    assert scored(Letter(), task, task) == 1.0
    with pytest.raises(GmnError, match=r"the similarity '.*' is NaN"):
        scored(Letter(), task, TaskView(("b",)))
