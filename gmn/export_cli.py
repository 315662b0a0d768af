"""What `gmn export` does: a network by its name or folder into files for other programs, and a table of them."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from gmn.consoles import wide_console
from gmn.errors import GmnError
from gmn.export import Batch, Exported, export_model
from gmn.run import is_run
from gmn.run_networks import best
from gmn.subject import Choices, named


def export(
    name: str, output: Path, choices: Choices, *, formats: str, batch: str, row: str | None, overwrite: bool
) -> None:
    """Export a network and print what was written.

    Args:
        name: Folder of a saved network or of a run, or a name for `build_network`.
        output: The folder to write into.
        choices: The options.
        formats: Names with commas.
        batch: "dynamic", or a number of samples.
        row: For a run: whose network; None takes the best on validation images.
        overwrite: Replace files that are there.

    Raises:
        GmnError: if the network is not found or cannot be exported.
    """
    if is_run(Path(name)):
        name = str(best(Path(name), row))
    elif row is not None:
        raise GmnError("--row has no meaning here", expected="a run folder", got=name)
    subject = named(name, choices)
    found = export_model(
        subject.model,
        subject.example,
        output,
        formats=[part.strip() for part in formats.split(",") if part.strip()],
        batch=_batch(batch),
        network=subject.network,
        facts=subject.facts,
        overwrite=overwrite,
    )
    wide_console().print(table(name, batch, found))


def _batch(text: str) -> Batch:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal() or int(text) < 1:
        raise GmnError("bad batch", expected="dynamic or a number of samples", got=repr(text), where="--batch")
    return int(text)


def table(name: str, batch: str, found: list[Exported]) -> Table:
    """Files, their size, and how far their outputs are from the network's."""
    samples = "any number of samples" if batch == "dynamic" else f"batches of {batch}"
    caption = f"for {samples}; opened again, run on two batches: largest difference, relative to the largest output"
    result = Table(title=name, caption=caption)
    for column in ("file", "MB", "difference"):
        result.add_column(column, justify="left" if column == "file" else "right", overflow="fold")
    for row in found:
        difference = f"{row.difference:.1e}" if row.difference else "0"
        result.add_row("\n".join(map(str, row.files)), f"{row.bytes / 1e6:.2f}", difference)
    return result
