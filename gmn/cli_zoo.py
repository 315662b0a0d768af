"""The commands of `gmn zoo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

zoo_app = typer.Typer(no_args_is_help=True, help="The pruned tasks of a network: list, check, add.")
ZooArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the zoo, or of its run.")]
ZOO_LIST = "Examples:  gmn zoo list zoo --class cat --sort accuracy --limit 20   |   gmn zoo list zoo | cut -f 1"


@zoo_app.command("list", epilog=ZOO_LIST)
def zoo_list(
    folder: ZooArgument,
    label: Annotated[str | None, typer.Option("--class", metavar="NAME", help="Only tasks with this class.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="zoo (they vote) or target. Default: both")] = None,
    status: Annotated[str, typer.Option("--status", help="planned, done, failed or all.")] = "done",
    sort: Annotated[
        str, typer.Option("--sort", help="A metric, best first, or name, flops, ...; -NAME turns it round.")
    ] = "name",
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many.")] = None,
) -> None:
    """List the tasks of a zoo; in a pipe a line each, the columns apart by tabs."""
    from gmn import zoo_cli

    zoo_cli.list_tasks(folder, label=label, split=split, status=status, sort=sort, limit=limit)


@zoo_app.command("verify", epilog="Example:  gmn zoo verify zoo")
def zoo_verify(folder: ZooArgument) -> None:
    """Read every file of a zoo and compare checksums; name what is wrong; exit code 1 if something is."""
    from gmn import zoo_cli

    if not zoo_cli.verify(folder):
        raise typer.Exit(1)


@zoo_app.command("add", epilog="Example:  gmn zoo add zoo elsewhere/tasks/birds.0a1b2c3d.safetensors")
def zoo_add(
    folder: ZooArgument, file: Annotated[Path, typer.Argument(metavar="FILE", help="A task's file of another zoo.")]
) -> None:
    """Add a pruned task from a file, if it is sound and for the same network."""
    from gmn import zoo_cli

    zoo_cli.add(folder, file)
