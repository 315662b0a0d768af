"""The command line: `gmn meta-train`, `gmn prune`, `gmn report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gmn.errors import GmnError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make trained neural networks smaller with graph metanetworks.",
)

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a built-in recipe.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a field: --set meta_train.epochs=3")]
RunOption = Annotated[Path | None, typer.Option("--run", help="The run folder. Default: runs/NAME")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Options of all commands; `main` reads --debug itself."""


@app.command("meta-train", epilog="Examples:  gmn meta-train quickstart   |   gmn meta-train my.yaml --set seed=1")
def meta_train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    run: RunOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Learn a metanetwork from data models, then prune a network with it and compare."""
    from gmn import pipeline, report  # torch takes seconds to import: not for --help
    from gmn import recipe as recipes

    settings = recipes.load_recipe(recipe, overrides or ())
    folder = run or Path("runs") / settings.name
    report.show(pipeline.meta_train(settings, folder, resume=resume, overwrite=overwrite), folder)


@app.command(epilog="Example:  gmn prune my.yaml --meta runs/quickstart --set prune.speed_up=3")
def prune(
    recipe: RecipeArgument,
    meta: Annotated[Path, typer.Option("--meta", help="A run folder or a saved metanetwork.")],
    overrides: SetOption = None,
    run: RunOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Prune the recipe's network with what was learnt in another run."""
    from gmn import api, pipeline, report
    from gmn import recipe as recipes

    settings = recipes.load_recipe(recipe, overrides or ())
    folder = run or Path("runs") / f"{settings.name}-pruned"
    path = api.metanetwork_path(meta)
    report.show(pipeline.prune_recipe(settings, folder, path, resume=resume, overwrite=overwrite), folder)


@app.command(epilog="Example:  gmn report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Show the table of a finished run and draw its plots."""
    from gmn import report as reports
    from gmn.run import load_report, open_run

    folder = open_run(run)
    reports.show(load_report(folder), folder)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2; a bug keeps its traceback."""
    debug = "--debug" in sys.argv[1:]
    arguments: list[Any] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except GmnError as error:
        if debug:
            raise
        print(f"gmn: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # no permission, disk full
        if debug:
            raise
        print(f"gmn: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
