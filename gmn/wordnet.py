"""Class names in WordNet: which sense a name has, and how near two senses are (Wu and Palmer).

    wup(a, b) = max over common hypernyms c of  2 D(c) / (2 D(c) + up(a, c) + up(b, c))

D(c) is the number of synsets from the root down to c, both included, along the longest path; up(a, c) the least number
of steps from a up to c. So wup(a, a) = 1, wup(a, b) = wup(b, a), and the values lie in (0, 1].

nltk reads the dictionary; its own `wup_similarity` is the same for most pairs. Where a synset has several hypernyms it
fixes c by its shortest path to the root and lets the paths to c pass above c; then an apple is 0.91 like an apple, and
a boy 0.67 like a man, not 0.89.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from gmn.errors import GmnError, of_machine

# The names of CIFAR-100 that are no nouns of WordNet, or whose first noun sense is another than the data set's parent
# class means: the first tiger is an audacious person, the first otter a fur, the first flatfish a dish.
OVERRIDES: Mapping[str, str] = {
    "aquarium_fish": "fish.n.01",
    "beaver": "beaver.n.07",
    "castle": "castle.n.02",
    "cloud": "cloud.n.02",
    "dolphin": "dolphin.n.02",
    "flatfish": "flatfish.n.02",
    "forest": "forest.n.02",
    "girl": "female_child.n.01",
    "keyboard": "computer_keyboard.n.01",
    "lamp": "lamp.n.02",
    "leopard": "leopard.n.02",
    "lobster": "lobster.n.02",
    "maple_tree": "maple.n.02",
    "mushroom": "mushroom.n.05",
    "otter": "otter.n.02",
    "plate": "plate.n.04",
    "raccoon": "raccoon.n.02",
    "ray": "ray.n.07",
    "seal": "seal.n.09",
    "shrew": "shrew.n.02",
    "skunk": "skunk.n.04",
    "sweet_pepper": "sweet_pepper.n.02",
    "table": "table.n.02",
    "television": "television_receiver.n.01",
    "tiger": "tiger.n.02",
    "trout": "trout.n.02",
    "turtle": "turtle.n.02",
    "whale": "whale.n.02",
}

_WRITTEN = re.compile(r"n(?P<id>\d{8})|(?P<lemma>.+)\.n\.(?P<number>\d+)")


@functools.cache
def dictionary() -> Any:
    """nltk's reader of the WordNet dictionary; reading it takes seconds, once in a process.

    Raises:
        GmnError: nltk or the dictionary is missing, or the dictionary cannot be read.
    """
    try:
        finder = importlib.import_module("nltk.data")
        base: Any = importlib.import_module("nltk.corpus.reader.wordnet").WordNetCorpusReader
    except ImportError as problem:
        raise GmnError("WordNet needs the package nltk", hint="pip install nltk") from problem

    class English(base):
        def map_wn(self, version: str = "wordnet") -> None:
            """No table for other languages: making it takes longer than all the rest, and wants nltk's own paths."""

    try:
        with warnings.catch_warnings():  # that there are no other languages
            warnings.simplefilter("ignore", UserWarning)
            return English(_root(finder), None)
    except GmnError:
        raise
    except Exception as problem:  # a torn zip or folder: whatever nltk stumbles over
        if of_machine(problem):
            raise
        hint = "python -m nltk.downloader --force wordnet"
        raise GmnError("the WordNet dictionary cannot be read", got=repr(problem), hint=hint) from problem


def _root(finder: Any) -> Any:
    # nltk reads NLTK_DATA once, when it is imported; it may have been set since
    folders = [path for path in os.environ.get("NLTK_DATA", "").split(os.pathsep) if path]
    for resource in ("corpora/wordnet.zip/wordnet/", "corpora/wordnet"):
        try:
            return finder.find(resource, [*folders, *finder.path])
        except LookupError:
            continue
    raise GmnError(
        "the WordNet dictionary is not there",
        expected=f"corpora/wordnet.zip in one of {[*folders, *finder.path]}",
        hint="python -m nltk.downloader wordnet, or set NLTK_DATA to the folder that holds corpora/wordnet.zip",
    )


def sense(name: str, overrides: Mapping[str, str] | None = None) -> str:
    """The noun synset that a class name means, such as `dog.n.01`.

    In this order: the override of that name, the built-in one, a synset or a WordNet id written as the name
    (`dog.n.01`, `n02084071`), and the first noun sense of the name. Of names in a list, "tench, Tinca tinca", the
    first that is known counts; case, blanks and plurals do not matter.

    Args:
        name: A class name.
        overrides: Class name -> synset.

    Raises:
        GmnError: No noun of that name, or an override that names no noun synset.
    """
    written = (overrides or {}).get(name, OVERRIDES.get(_plain(name), name if _WRITTEN.fullmatch(name) else None))
    if written is not None:
        return _written(written, name).name()
    for spelling in _spellings(name):
        found = dictionary().synsets(spelling, pos="n")
        if found:
            return found[0].name()
    raise GmnError(
        f"the class name {name!r} is not in WordNet",
        expected="a noun of the dictionary",
        hint=f"say what it means, as in overrides={{{name!r}: 'dog.n.01'}}",
    )


def wu_palmer(a: str, b: str, overrides: Mapping[str, str] | None = None) -> float:
    """Wu-Palmer similarity of two class names (formula above), in (0, 1]; 1 for names of the same sense.

    Args:
        a: A class name.
        b: Another.
        overrides: Class name -> synset, before the built-in table and the first noun sense; see `sense`.

    Raises:
        GmnError: A name without a sense.

    Source: Wu and Palmer, "Verb semantics and lexical selection", 1994; MVP, section 3.2.
    """
    up_a, up_b = _hypernyms(sense(a, overrides)), _hypernyms(sense(b, overrides))
    common = [(up_a[c][0], up_a[c][1] + up_b[c][1]) for c in up_a.keys() & up_b.keys()]
    # before WordNet 2.1 nouns had several roots: nothing in common is 0
    return max((2 * depth / (2 * depth + steps) for depth, steps in common), default=0.0)


@functools.cache
def _hypernyms(synset: str) -> dict[str, tuple[int, int]]:
    """Hypernym -> (its depth, fewest steps up to it), the synset itself included."""
    above: dict[str, tuple[int, int]] = {}
    for hypernym, steps in dictionary().synset(synset).hypernym_distances():
        depth, fewest = above.get(hypernym.name(), (hypernym.max_depth() + 1, steps))
        above[hypernym.name()] = depth, min(steps, fewest)
    return above


def _written(synset: str, name: str) -> Any:
    """The noun synset that is written as a lemma and a number or as a WordNet id."""
    match, words = _WRITTEN.fullmatch(synset), dictionary()
    if match and match["id"]:
        with warnings.catch_warnings():  # that there is none: the error below says so
            warnings.simplefilter("ignore", UserWarning)
            found = words.synset_from_pos_and_offset("n", int(match["id"]))
    else:
        senses = words.synsets(match["lemma"], pos="n") if match else []
        found = senses[int(match["number"]) - 1] if match and 0 < int(match["number"]) <= len(senses) else None
    if found is None:
        raise GmnError(
            f"{synset!r}, for the class name {name!r}, is no noun of WordNet", expected="one such as 'dog.n.01'"
        )
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _spellings(name: str) -> Iterator[str]:
    for part in re.split(r"[,/]", name):
        yield _plain(part)
        yield _plain(part).replace("-", "_")
