"""What `gmn study` does: a study's numbers, its pictures, and the run's page with all studies made so far."""

from __future__ import annotations

from pathlib import Path

from gmn import vote_page
from gmn.cli_options import numbers, words
from gmn.engine import HERE, Engine
from gmn.errors import GmnError
from gmn.names import refuse_unknown
from gmn.pipeline import reopened
from gmn.run import load_report, open_run
from gmn.similarity import similarity_by_name
from gmn.studies import STUDIES, Choices
from gmn.studies import study as make


def study(
    name: str,
    run: Path,
    *,
    similarity: str | None,
    targets: int,
    neighbours: str | None = None,
    iterations: str | None = None,
    engine: Engine = HERE,
) -> None:
    """Make a study of a vote run and write its page.

    Args:
        engine: Where trials that nobody has made yet are trained.
        similarity: A name, or several with commas for the study of near and far neighbours; None: the recipe's.
        neighbours, iterations: Numbers with commas; None: 1,3,5,10 neighbours, parts of the recipe's steps.

    Raises:
        GmnError: if a choice is unknown, or the run is not finished or has no zoo.
    """
    refuse_unknown("study", name, STUDIES)
    _refuse_what_it_ignores(name, neighbours, iterations)
    counts = numbers("--neighbours", neighbours) or [1, 3, 5, 10]
    load_report(open_run(run))  # a run that is not finished would be finished first
    similarities = [] if similarity is None else words(similarity)
    for own in similarities:
        similarity_by_name(own)
    if len(similarities) > 1 and name != "similarity":
        raise GmnError("a study of one similarity", expected="one name", got=repr(similarity), where="--similarity")
    job = reopened(run, engine)
    steps = job.recipe.vote.fit.iterations or 1
    usual = (
        [max(1, steps // 5), steps] if name == "similarity" else [max(1, steps * n // 10) for n in (1, 2, 5, 10, 20)]
    )
    chosen = Choices(
        similarities or [job.recipe.similarity.name], targets, counts, numbers("--iterations", iterations) or usual
    )
    picture = make(job, name, chosen)
    print(f"picture: {picture}\npage: {vote_page.write(run)}")


def _refuse_what_it_ignores(name: str, neighbours: str | None, iterations: str | None) -> None:
    for option, given, readers in (
        ("--neighbours", neighbours, ["neighbours"]),
        ("--iterations", iterations, ["iterations", "similarity"]),
    ):
        if given is not None and name not in readers:
            expected = f"the study {' or '.join(readers)}"
            raise GmnError("an option of another study", expected=expected, got=repr(name), where=option)
