"""How near two tasks are: five measures behind one interface, and others that a user registers.

    shared_classes   |C_t & C_n|, classes of both tasks                                  MVP-SSL, section 3.2
    shared_parents   |P_t & P_n|, parent classes of both tasks                           MVP-SSL, appendix A.3
    prototypes       mean cosine of the class prototypes that the best matching pairs    MVP-SSL, section 5.1
    wordnet          mean Wu-Palmer similarity of the class names, matched the same way  MVP, section 3.2
    leep             LEEP of the neighbour's pruned model on the target's training data  MVP, section 3.2

Higher is nearer. The first two are counts, made for tasks of one size. Scores of different measures do not compare.
The formulas: `gmn/measures.py`, `gmn/wordnet.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gmn.errors import GmnError
from gmn.measures import check_labels, leep, matched, prototype_similarity, shape_of, shared
from gmn.names import import_function, nearest
from gmn.wordnet import wu_palmer


@dataclass(frozen=True, eq=False)
class TaskView:
    """What a similarity may look at of a task; what is not at hand stays out, and each measure asks for what it needs.

    Args:
        classes: Names of the C classes, no two alike.
        parents: Parent class of each class, or empty.
        prototypes: [C, D] class means of the pre-trained network's penultimate features.
        labels: [n] of the target's training images, numbers into `classes`.
        predict: The neighbour's pruned model on a target's training images: target -> [n, Z] probabilities, one row per
            label of the target and in that order. It is called when a measure wants it.

    Raises:
        GmnError: Parts that do not fit each other.
    """

    classes: tuple[str, ...]
    parents: tuple[str, ...] = ()
    prototypes: Tensor | None = None
    labels: Tensor | None = None
    predict: Callable[[TaskView], Tensor] | None = None

    def __post_init__(self) -> None:
        count = len(self.classes)
        if not count or len(set(self.classes)) < count:
            hint = "where a data set has two classes of one name, use WordNet ids"
            raise GmnError("a task needs classes, no two alike", got=str(self.classes), hint=hint)
        if self.parents and len(self.parents) != count:
            raise GmnError("parents do not fit the classes", expected=f"{count} or none", got=str(len(self.parents)))
        if self.prototypes is not None and (self.prototypes.dim() != 2 or len(self.prototypes) != count):
            shape = shape_of(self.prototypes)
            raise GmnError("prototypes do not fit the classes", expected=f"[{count}, D]", got=shape, where=str(self))
        if self.labels is not None:
            check_labels(self.labels, len(self.labels), count)

    def __str__(self) -> str:
        return f"the task of {', '.join(self.classes[:5])}{' and others' if len(self.classes) > 5 else ''}"

    def missing(self, part: str, measure: str) -> GmnError:
        """The error that this task lacks what a measure compares."""
        return GmnError(f"the similarity {measure!r} needs {part}", got="none", where=str(self))


class Similarity(ABC):
    """A measure of how near two tasks are; `register_similarity` gives it its name."""

    name: ClassVar[str] = ""
    reads_images: ClassVar[bool] = True
    """Whether it compares prototypes, labels or predictions; if not, names are all it gets, and the search is quick."""

    @abstractmethod
    def score(self, target: TaskView, neighbour: TaskView) -> float:
        """How near the neighbour is to the target: higher is nearer. It need not be symmetric.

        Raises:
            GmnError: A task lacks what the measure compares.
        """


AnySimilarity = TypeVar("AnySimilarity", bound=Similarity)
_SIMILARITIES: dict[str, type[Similarity]] = {}


def register_similarity(name: str) -> Callable[[type[AnySimilarity]], type[AnySimilarity]]:
    """Class decorator: `similarity_by_name(name)` makes this `Similarity`.

    Raises:
        GmnError: Another class has the name, or the class is no `Similarity`.
    """

    def register(measure: type[AnySimilarity]) -> type[AnySimilarity]:
        if not (isinstance(measure, type) and issubclass(measure, Similarity)):
            raise GmnError("only a Similarity can be registered", got=repr(measure))
        known = _SIMILARITIES.get(name)
        # a module that is loaded again, as in a notebook, may register its own class again
        if known and (known.__module__, known.__qualname__) != (measure.__module__, measure.__qualname__):
            raise GmnError(f"the name {name!r} of a similarity is taken", got=measure.__qualname__, where=repr(known))
        measure.name = name
        _SIMILARITIES[name] = measure
        return measure

    return register


def similarity_by_name(name: str, **options: Any) -> Similarity:
    """The similarity of a registered name, or of a class of one's own, `package.module:Class`.

    Args:
        name: What to make.
        options: For the class; `overrides` for `wordnet`.

    Raises:
        GmnError: No similarity of that name, or options that it does not take.

    >>> similarity_by_name("shared_classes").score(TaskView(("bear", "bee")), TaskView(("bee", "bus")))
    1.0
    """
    make = import_function(name, GmnError) if ":" in name else _SIMILARITIES.get(name)
    if make is None:
        known = ", ".join(sorted(_SIMILARITIES))
        raise GmnError(f"unknown similarity {name!r}", expected=f"one of {known}", hint=nearest(name, _SIMILARITIES))
    try:
        made = make(**options)
    except (TypeError, ValueError) as error:
        got = f"{', '.join(f'{key}={value!r}' for key, value in options.items())}: {error}"
        raise GmnError(f"the similarity {name!r} does not take these options", got=got) from error
    if not isinstance(made, Similarity):
        raise GmnError(f"{name} makes no Similarity", got=repr(made))
    return made


@register_similarity("shared_classes")
class SharedClasses(Similarity):
    """Number of classes that both tasks have."""

    reads_images = False

    def score(self, target: TaskView, neighbour: TaskView) -> float:
        return float(shared(target.classes, neighbour.classes))


@register_similarity("shared_parents")
class SharedParents(Similarity):
    """Number of distinct parent classes that both tasks have; a parent of two classes counts once."""

    reads_images = False

    def score(self, target: TaskView, neighbour: TaskView) -> float:
        for task in (target, neighbour):
            if not task.parents:
                raise task.missing("parents", self.name)
        return float(shared(target.parents, neighbour.parents))


@register_similarity("wordnet")
class WordNet(Similarity):
    """Mean Wu-Palmer similarity of the class names, paired by the best matching; in (0, 1], 1 for the same classes.

    Args:
        overrides: Class name -> synset, for names whose first noun sense is the wrong one; see `gmn.wordnet.sense`.
    """

    reads_images = False

    def __init__(self, overrides: Mapping[str, str] | None = None) -> None:
        self.overrides = dict(overrides or {})
        self._pairs: dict[tuple[str, str], float] = {}  # a zoo of 1,000 tasks uses its 100 classes again and again

    def score(self, target: TaskView, neighbour: TaskView) -> float:
        rows = [[self.pair(a, b) for b in neighbour.classes] for a in target.classes]
        return matched(torch.tensor(rows, dtype=torch.float64))

    def pair(self, a: str, b: str) -> float:
        """Wu-Palmer similarity of two class names, computed once."""
        if (a, b) not in self._pairs:
            self._pairs[a, b] = self._pairs[b, a] = wu_palmer(a, b, self.overrides)
        return self._pairs[a, b]


@register_similarity("prototypes")
class Prototypes(Similarity):
    """Mean cosine of the class prototypes, paired by the best matching."""

    def score(self, target: TaskView, neighbour: TaskView) -> float:
        if target.prototypes is None:
            raise target.missing("prototypes", self.name)
        if neighbour.prototypes is None:
            raise neighbour.missing("prototypes", self.name)
        return prototype_similarity(target.prototypes, neighbour.prototypes)


@register_similarity("leep")
class Leep(Similarity):
    """LEEP of the neighbour's pruned model on the target's training data; not symmetric, at most 0."""

    def score(self, target: TaskView, neighbour: TaskView) -> float:
        if target.labels is None:
            raise target.missing("labels of its training images", self.name)
        if neighbour.predict is None:
            raise neighbour.missing("a way to predict", self.name)
        return leep(neighbour.predict(target), target.labels)


def scored(similarity: Similarity, target: TaskView, neighbour: TaskView) -> float:
    """The similarity of two tasks, which is a number; GmnError if it is NaN, or a task lacks what the measure reads.

    >>> scored(SharedClasses(), TaskView(("bear", "cup")), TaskView(("bear", "bee")))
    1.0
    """
    score = float(similarity.score(target, neighbour))
    if math.isnan(score):
        raise GmnError(f"the similarity {similarity.name!r} is NaN")
    return score
