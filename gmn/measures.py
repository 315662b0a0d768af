"""The arithmetic of task similarity: counts, matched pairs, LEEP, and groups of similarity.

`gmn.similarity` puts one interface over them. A: classes of one task, B: of the other, D: features, n: images of the
target task, Z: classes of a source model, y: labels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gmn.errors import GmnError


def shared(a: Collection[str], b: Collection[str]) -> int:
    """How many distinct names are in both: |a & b|, a count as in the papers, not divided by the sizes.

    >>> shared(("bear", "bee", "bowl"), ("bowl", "bear", "bus"))
    2
    """
    return len(set(a) & set(b))


def matched(similarities: Tensor) -> float:
    """Mean similarity of the pairs of the best one-to-one matching (Hungarian algorithm).

    max over matchings M of  1/|M| sum_(i,j) in M  s_ij,  |M| = min(A, B): of the larger side some stay alone

    Args:
        similarities: [A, B] s_ij.

    Raises:
        GmnError: No matrix, an empty one, or values that are not finite.

    >>> matched(torch.tensor([[0.9, 0.8], [0.7, 0.0]]))  # 0.8 and 0.7; 0.9 would leave 0.0 to the other two
    0.75
    """
    from scipy.optimize import linear_sum_assignment  # a second to import

    if similarities.dim() != 2 or not similarities.numel() or not bool(similarities.isfinite().all()):
        raise GmnError(
            "these similarities match nothing", expected="a matrix of finite values", got=shape_of(similarities)
        )
    scores = similarities.detach().to("cpu", torch.float64).numpy()
    return float(scores[linear_sum_assignment(scores, maximize=True)].mean())


def prototype_similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the class prototypes of two tasks that the best matching pairs; in [-1, 1].

    A prototype is the mean of a class's penultimate features in the pre-trained network; one of zeros has cosine 0.

    Args:
        a: [A, D] prototypes of one task.
        b: [B, D] those of the other; B may differ from A, see `matched`.

    Raises:
        GmnError: Shapes that do not fit, or values that are not finite.

    Source: MVP-SSL, section 5.1.

    >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> prototype_similarity(a, a.flip(0))
    1.0
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise GmnError("prototypes of two tasks do not fit", expected="[A, D] and [B, D]", got=shape_of(a, b))
    unit_a, unit_b = (torch.nn.functional.normalize(x.detach().to("cpu", torch.float64), eps=1e-300) for x in (a, b))
    return matched(unit_a @ unit_b.T)


def leep(predictions: Tensor, labels: Tensor) -> float:
    """LEEP, the log expected empirical prediction: how well a source model's outputs foretell the target's labels.

    P(y, z) = 1/n sum_(i: y_i = y) theta_z(x_i)        P(y | z) = P(y, z) / sum_y' P(y', z)
    LEEP    = 1/n sum_i log sum_z P(y_i | z) theta_z(x_i)

    It is 0 at best, when every source class foretells one label for sure, and minus the entropy of the labels where the
    predictions are the same for every image.

    Args:
        predictions: [n, Z] theta: the source model's probabilities of its Z classes on the target's images.
        labels: [n] y: the images' labels in the target task, integers from 0.

    Raises:
        GmnError: No images, shapes that do not fit, rows that are no distributions, labels that are no class numbers.

    Source: Nguyen et al., "LEEP: a new measure to evaluate transferability of learned representations", 2020, eq. 2.

    >>> leep(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 0, 1]))
    0.0
    """
    theta = _distributions(predictions)
    check_labels(labels, len(theta))
    values, label = labels.detach().cpu().unique(return_inverse=True)  # classes without an image have no part in LEEP
    joint = theta.new_zeros(len(values), theta.shape[1]).index_add_(0, label, theta)
    conditional = joint / joint.sum(dim=0).clamp(min=torch.finfo(theta.dtype).tiny)  # never predicted: 0, not 0/0
    # Never 0: an image adds to P(y_i, z) what it predicts itself. At most 1, but for rounding.
    expected = (conditional[label] * theta).sum(dim=1).clamp(max=1.0)
    return float(expected.log().mean())


def _distributions(predictions: Tensor) -> Tensor:
    """[n, Z] in double, on the CPU, every row summing to 1."""
    if predictions.dim() != 2 or not predictions.numel():
        raise GmnError("LEEP needs predictions", expected="[n, Z] with n > 0 images", got=shape_of(predictions))
    theta = predictions.detach().to("cpu", torch.float64)
    total = theta.sum(dim=1, keepdim=True)
    # The sum of a row in half precision is off by thousandths. The comparisons are false for NaN.
    right = (theta >= 0).all(dim=1) & ((total[:, 0] - 1).abs() < 1e-2)
    if not bool(right.all()):
        row = int((~right).nonzero()[0])
        raise GmnError(
            "LEEP needs probabilities",
            expected="rows >= 0 that sum to 1",
            got=f"row {row}: sum {float(total[row]):.4g}, smallest {float(theta[row].min()):.4g}",
            hint="of logits take the softmax",
        )
    return theta / total


def check_labels(labels: Tensor, images: int, classes: int | None = None) -> None:
    """Labels are class numbers from 0, one per image; below `classes` where that is known.

    Raises:
        GmnError: They are not.
    """
    if labels.dim() != 1 or len(labels) != images:
        raise GmnError("labels do not fit the images", expected=f"[{images}]", got=shape_of(labels))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise GmnError("labels are no class numbers", expected="integers", got=str(labels.dtype))
    low, high = (int(labels.min()), int(labels.max())) if images else (0, 0)
    if low < 0 or (classes is not None and high >= classes):
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise GmnError("labels are out of range", expected=allowed, got=f"{low} to {high}")


def shape_of(*tensors: Tensor) -> str:
    """Shapes for a message.

    >>> shape_of(torch.zeros(2, 3), torch.zeros(4))
    '[2, 3] and [4]'
    """
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)


def groups_of_five(scores: Sequence[float]) -> list[int]:
    """The group of similarity, 1 (nearest) to 5, of each score: five intervals of equal width from highest to lowest.

    group = 1 + min(4, floor(5 (high - s) / (high - low)))

    The highest score opens group 1 and the lowest closes group 5; a score on an inner border is in the farther group.
    Groups may be empty; where all scores are equal, all are in group 1.

    Args:
        scores: Of one target's neighbours.

    Raises:
        GmnError: A score that is not finite.

    Source: MVP, section 3.2: "five groups of equal intervals", similarity decreasing from group 1 to 5.

    >>> groups_of_five([1.0, 0.79, 0.5, 0.0])
    [1, 2, 3, 5]
    """
    wrong = [score for score in scores if not math.isfinite(score)]
    if wrong:
        raise GmnError("groups of similarity need finite scores", got=str(wrong[0]))
    if not scores or max(scores) == min(scores):
        return [1] * len(scores)
    high, width = max(scores), max(scores) - min(scores)
    return [1 + min(4, math.floor(5 * (high - score) / width)) for score in scores]
