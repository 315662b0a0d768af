"""Class names in WordNet, and tasks by them.

* Wu-Palmer has the values of the dictionary's tree, 1 for a name and itself, the same both ways.
* Every class of CIFAR-100 has the sense that the data set means; a user's override goes first.
* A missing package, dictionary or name is said, with what to do.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gmn import similarity, wordnet
from gmn.errors import GmnError
from gmn.similarity import TaskView, WordNet, scored

SHARED = Path(os.environ.get("GMN_SHARED", str(Path(__file__).parents[2] / "shared")))
# An ancestor for the classes of each parent class of CIFAR-100: a sense outside it would be the wrong one.
CIFAR100 = {
    "mammal.n.01": "beaver dolphin otter seal whale",
    "fish.n.01": "aquarium_fish flatfish ray shark trout",
    "vascular_plant.n.01": "orchid poppy rose sunflower tulip",
    "artifact.n.01": "bottle bowl can cup plate",
    "produce.n.01": "apple mushroom orange pear sweet_pepper",
    "instrumentality.n.03": "clock keyboard lamp telephone television",
    "furniture.n.01": "bed chair couch table wardrobe",
    "animal.n.01": "bee beetle butterfly caterpillar cockroach",
    "carnivore.n.01": "bear leopard lion tiger wolf",
    "object.n.01": "bridge castle house road skyscraper",
    "physical_entity.n.01": "cloud forest mountain plain sea",
    "ungulate.n.01": "camel cattle",
    "placental.n.01": "chimpanzee elephant fox hamster mouse porcupine rabbit raccoon shrew skunk squirrel",
    "marsupial.n.01": "kangaroo possum",
    "invertebrate.n.01": "crab lobster snail spider worm",
    "person.n.01": "baby boy girl man woman",
    "reptile.n.01": "crocodile dinosaur lizard snake turtle",
    "tree.n.01": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "conveyance.n.03": "bicycle bus motorcycle pickup_truck train rocket streetcar tank tractor",
    "garden_tool.n.01": "lawn_mower",
}
NAMES = " ".join(CIFAR100.values()).split()


@pytest.fixture(scope="module")
def words() -> Iterator[None]:
    """The WordNet dictionary, or a skip."""
    pytest.importorskip("nltk")
    places = [os.environ.get("GMN_NLTK_DATA"), os.environ.get("NLTK_DATA"), str(SHARED / "data" / "nltk_data")]
    folder = next((place for place in places if place and Path(place).is_dir()), None)
    with pytest.MonkeyPatch.context() as patch:
        if folder:
            patch.setenv("NLTK_DATA", folder)
        try:
            wordnet.dictionary()
        except GmnError as problem:
            if "is not there" not in str(problem):
                raise
            pytest.skip("the WordNet dictionary is absent")
        yield


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("dog", "dog", 1.0),
        ("dog", "cat", 24 / 28),  # carnivore is the 12th synset from the root, two steps above both
        ("lamp", "table", 16 / 18),  # furniture, the 8th, one above both
        ("maple_tree", "palm_tree", 20 / 23),  # tree, the 10th, two above a maple and one above a palm
        ("bicycle", "motorcycle", 18 / 22),  # wheeled vehicle, the 9th by way of vehicle; one and three
        ("apple", "apple", 1.0),  # nltk says 0.91
        ("boy", "man", 16 / 18),  # male, the 8th by way of organism, one above both; nltk says 0.67
    ],
)
def test_wu_palmer(a: str, b: str, expected: float) -> None:
    assert wordnet.wu_palmer(a, b) == pytest.approx(expected)
    assert wordnet.wu_palmer(b, a) == wordnet.wu_palmer(a, b)


@pytest.mark.usefixtures("words")
def test_wu_palmer_is_nltks_for_most_pairs() -> None:
    pairs = list(itertools.combinations(NAMES[::3], 2))
    synset = {name: wordnet.dictionary().synset(wordnet.sense(name)) for name in NAMES}
    same = [abs(wordnet.wu_palmer(a, b) - synset[a].wup_similarity(synset[b])) < 1e-12 for a, b in pairs]
    assert sum(same) / len(pairs) > 0.9
    assert all(0.0 < wordnet.wu_palmer(a, b) <= 1.0 for a, b in pairs)


@pytest.mark.usefixtures("words")
def test_every_class_of_cifar100_has_the_sense_that_the_data_set_means() -> None:
    assert len(set(NAMES)) == 100
    for ancestor, names in CIFAR100.items():
        outside = [name for name in names.split() if ancestor not in wordnet._hypernyms(wordnet.sense(name))]
        assert not outside, f"not under {ancestor}"


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Pickup truck", "pickup.n.01"),
        ("dogs", "dog.n.01"),
        ("T-shirt/top", "jersey.n.03"),
        ("no such fish, Tinca tinca", "tench.n.01"),
        ("oak-tree", "oak.n.02"),
        ("n02084071", "dog.n.01"),
        ("crane.n.05", "crane.n.05"),
        ("tiger", "tiger.n.02"),
    ],
)
def test_a_name_has_a_sense(name: str, expected: str) -> None:
    assert wordnet.sense(name) == expected


@pytest.mark.usefixtures("words")
def test_overrides_go_first_and_may_be_wrong() -> None:
    assert wordnet.sense("mouse") == "mouse.n.01"
    assert wordnet.sense("mouse", {"mouse": "mouse.n.04"}) == "mouse.n.04"
    assert wordnet.sense("tiger", {"tiger": "tiger.n.01"}) == "tiger.n.01"
    assert wordnet.wu_palmer("ankle boot", "boot", {"ankle boot": "boot.n.01"}) == 1.0
    with pytest.raises(GmnError, match=r"'ankle boot' is not in WordNet.*overrides=\{'ankle boot'"):
        wordnet.sense("ankle boot")
    for wrong in ("mouse.n.99", "mouse.n.00", "mouse", "run.v.01", "n00000001", ""):
        with pytest.raises(GmnError, match=f"'{wrong}', for the class name 'mouse'"):
            wordnet.sense("mouse", {"mouse": wrong})


def test_a_missing_dictionary_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finder = pytest.importorskip("nltk.data")
    monkeypatch.setattr(finder, "path", [])
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    with pytest.raises(GmnError, match=r"not there.*nltk\.downloader wordnet, or set NLTK_DATA"):
        wordnet.dictionary.__wrapped__()
    (tmp_path / "corpora" / "wordnet").mkdir(parents=True)
    with pytest.raises(GmnError, match="cannot be read"):
        wordnet.dictionary.__wrapped__()
    (tmp_path / "corpora" / "wordnet.zip").write_bytes(b"PK torn")
    with pytest.raises(GmnError, match="cannot be read"):
        wordnet.dictionary.__wrapped__()


def test_without_nltk_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.data", None)
    with pytest.raises(GmnError, match=r"pip install nltk"):
        wordnet.dictionary.__wrapped__()


@pytest.mark.usefixtures("words")
def test_the_nearest_tasks_by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same classes first, in any order, then kin, then strangers; a pair of names is compared once."""
    calls: list[tuple[str, str]] = []
    original = wordnet.wu_palmer

    def counted(a: str, b: str, overrides: Mapping[str, str]) -> float:
        calls.append((a, b))
        return original(a, b, overrides)

    monkeypatch.setattr(similarity, "wu_palmer", counted)
    measure, target = WordNet(), TaskView(("tiger", "oak_tree", "bus"))
    names = ("cup", "road", "sea"), ("bus", "tiger", "oak_tree"), ("lion", "pine_tree", "train")
    views = [TaskView(classes) for classes in names]
    scores = [scored(measure, target, view) for view in views * 10]
    assert scores[0] < scores[2] < scores[1] == 1.0
    assert scores == scores[:3] * 10
    assert len(calls) == len({frozenset(pair) for pair in calls}) <= 27
    assert pickle.loads(pickle.dumps(measure)).score(target, views[2]) == measure.score(target, views[2])
