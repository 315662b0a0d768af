"""The story of the whole program: what `gmn meta-train` and `gmn prune` do, step by step, for every method.

metanetwork:  data models --meta-train--> checkpoints --select on validation--> metanetwork
              network --[initial pruning]--> graph --metanetwork--> graph --> network' --fine-tune--> prune --fine-tune
vote:         network + tasks --prune for each--> zoo of masks and weights
              new task --nearest tasks of the zoo--> vote --> sub-network --fine-tune
matrix:       every entry --metanetwork, as above--> every network with the metanetwork of every other
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmn.api import NETWORK, metanetwork_path
from gmn.checkpoint import digest_of, load_json, load_metanetwork, save_json
from gmn.compare import compare
from gmn.engine import HERE, Engine
from gmn.errors import RecipeError
from gmn.learnt import METANETWORK, adopt
from gmn.matrix import Matrix
from gmn.meta_job import MetaJob
from gmn.permission import allow_code
from gmn.recipe import AnyRecipe, dump_recipe, load_recipe
from gmn.run import Run, one_of_its_runs, open_run, reading
from gmn.settings import Recipe
from gmn.settings_matrix import MatrixRecipe
from gmn.settings_vote import VoteRecipe
from gmn.vote_compare import compare_votes, measured, planned
from gmn.vote_job import VoteJob
from gmn.zoo import Zoo
from gmn.zoo_index import zoo_path
from gmn.zoo_task import check_same

VOTERS = "voters.json"
"""In a run that pruned with the zoo of another one: where that is, and what tells its network from others."""

Report = dict[str, Any]


def meta_train(
    recipe: AnyRecipe, folder: Path, *, resume: bool = False, overwrite: bool = False, engine: Engine = HERE
) -> Report:
    """Learn what the recipe says, metanetworks or a zoo, and prune with it and without it; returns the report.

    Everything finished is kept in the run folder, so that `resume` goes on where a run stopped.

    Args:
        engine: Where tasks of a zoo, rows of a comparison, entries and cells of a matrix are made.
    """
    run = Run(folder, dump_recipe(recipe), resume=resume, overwrite=overwrite)
    with run, allow_code(only=_named_by(recipe)):  # what the run saves names it too
        if isinstance(recipe, MatrixRecipe):
            return Matrix(recipe, run, engine).report()
        if isinstance(recipe, VoteRecipe):
            return _learn_votes(recipe, run, engine)
        return _learn_metanetwork(recipe, run, engine)


def prune_recipe(
    recipe: AnyRecipe,
    folder: Path,
    meta: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    engine: Engine = HERE,
) -> Report:
    """Prune the recipe's network with what was learnt in another run; returns the report.

    Raises:
        GmnError: if what was learnt is of another method, or does not fit the network.
    """
    if isinstance(recipe, MatrixRecipe):
        raise RecipeError("a matrix learns what it prunes with", hint=f"gmn meta-train {recipe.name}")
    zoo = zoo_path(meta)
    path = zoo or metanetwork_path(meta)
    if (zoo is not None) != isinstance(recipe, VoteRecipe):
        expected = "a recipe with `method: vote`" if zoo else "a recipe with `method: metanetwork`"
        raise RecipeError(f"{meta} and the recipe are of different methods", expected=expected, got=recipe.method)
    if (zoo or overwrite) and path.resolve().is_relative_to(folder.resolve()):
        hint = "give another with --run"
        raise RecipeError("the run folder is the one that was learnt in", got=str(folder), hint=hint)
    run = Run(folder, dump_recipe(recipe), resume=resume, overwrite=overwrite)
    with run, allow_code(only=_named_by(recipe)):  # what the run saves names it too
        if isinstance(recipe, VoteRecipe):
            return _prune_with_votes(recipe, run, path, engine)
        metanetwork, layout, _ = load_metanetwork(path)
        job = MetaJob(recipe, run, (metanetwork, layout))
        adopt(run, METANETWORK, path)
        return compare(job, metanetwork.to(job.device), layout, engine=engine)


def join(folder: Path) -> None:
    """Share the work of a vote run: tasks of its zoo that wait, then the comparison's trials, the last ones first."""
    job = reopened(folder)
    if not (job.folder / NETWORK / "model.json").is_file():  # two processes would make two
        hint = "join it when it prunes tasks; a stopped run goes on with gmn meta-train --resume"
        raise RecipeError("the run has no network yet", got=str(folder), hint=hint)
    job.build()
    measured(job, planned(job)[::-1], "comparing, from the end")


def reopened(folder: Path, engine: Engine = HERE) -> VoteJob:
    """A vote run that is there, to go on with; RecipeError if it has no zoo of its own."""
    recipe = load_recipe(open_run(folder) / "recipe.yaml")
    if not isinstance(recipe, VoteRecipe):
        raise RecipeError("the run has no zoo", expected="a run of a recipe with `method: vote`", got=str(folder))
    if found := voters(folder):
        hint = f"its voters are in {found[0]}"
        raise RecipeError("the run has no zoo", expected="a run of gmn meta-train", got=str(folder), hint=hint)
    return VoteJob(recipe, Run(folder, dump_recipe(recipe), resume=True, shared=True), engine=engine)


def reopened_metanetwork(folder: Path) -> MetaJob:
    """A run that meta-trained, to look at; RecipeError if it is of another method. `with job.run` lets go of it."""
    recipe = load_recipe(open_run(folder) / "recipe.yaml")
    if not isinstance(recipe, Recipe):
        expected = "a run of a recipe with `method: metanetwork`"
        hint = one_of_its_runs(folder)
        raise RecipeError("the run has no metanetwork", expected=expected, got=str(folder), hint=hint)
    return MetaJob(recipe, Run(folder, dump_recipe(recipe), resume=True, visits=True))


def _named_by(recipe: AnyRecipe) -> list[str]:
    """The names of the recipe's networks."""
    of = recipe.entries.values() if isinstance(recipe, MatrixRecipe) else [recipe]
    kinds = [kind for own in of if isinstance(own, Recipe) for kind in own.data_models.also.values()]
    return [own.network.name for own in (*of, *kinds)]


def _learn_metanetwork(recipe: Recipe, run: Run, engine: Engine) -> Report:
    job = MetaJob(recipe, run, learns=True)
    job.learn()
    metanetwork, layout = job.select()
    # with a training in the recipe the pruned network is one more, trained with a seed of its own
    return compare(job, metanetwork, layout, seen=recipe.data_models.fit is None, engine=engine)


def _learn_votes(recipe: VoteRecipe, run: Run, engine: Engine) -> Report:
    if recipe.target is not None:
        hint = "leave it out; `gmn prune RECIPE --meta RUN` reads it"
        raise RecipeError("target names a task to prune for", got="gmn meta-train", hint=hint)
    job = VoteJob(recipe, run, engine=engine)
    job.build()
    return compare_votes(job)


def _prune_with_votes(recipe: VoteRecipe, run: Run, zoo: Path, engine: Engine) -> Report:
    own = recipe.network.model_dump(include={"name", "options"})
    if stated := Zoo.open(zoo).about.get("network"):
        check_same("the zoo is of another network than the recipe's", own, stated, zoo)
    found = None if run.replaces else voters(run.folder)
    if found is not None and found[1] != network_digest(zoo):
        raise RecipeError("cannot resume with another zoo", got=str(zoo), hint="start anew with --overwrite")
    job = VoteJob(recipe, run, zoo, engine)
    if found is None:
        save_json(run.folder / VOTERS, {"zoo": str(zoo), "network_sha256": network_digest(zoo)})
    return compare_votes(job)


def voters(folder: Path) -> tuple[Path, str] | None:
    """Where the zoo lies that a run pruned with, and the digest of its network; None if it has one of its own."""
    path = folder / VOTERS
    if not path.is_file():
        return None
    with reading(path):
        content = load_json(path)
        return Path(content["zoo"]), str(content["network_sha256"])


def network_digest(zoo: Path) -> str | None:
    """The SHA-256 of the weights of a zoo's network; None if they are not there."""
    path = zoo / NETWORK / "weights.safetensors"
    return digest_of(path) if path.is_file() else None
