"""One HTML page from titles, text, tables and pictures, whole in one file: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from gmn.checkpoint import load_json, save_text
from gmn.errors import GmnError

TEMPLATE = Path(__file__).with_name("page.html.j2")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"IEND\xaeB\x60\x82"  # the last chunk of a PNG, with its check sum
NUMBER = re.compile(r"[-+\u2212]?\d[\d.,]*\s*[%x]?(\s*±\s*\d[\d.,]*\s*%?)?[*†‡]*")
EMPTY = ("", "-", "\u2013")  # cells of a column of numbers that hold none


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        header: Name of each column.
        rows: The cells; columns of numbers (88.9, 1,000, 85 %, 88.9 ± 0.3, 88.9†) are set to the right.
        caption: What it shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.header):
                expected = f"{len(self.header)} cells"
                raise GmnError(
                    "a row does not fit its header", expected=expected, got=str(len(row)), where=f"row {number}"
                )


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows: also for those who cannot see it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a page, in this order.

    Attributes:
        title: Its heading.
        text: Paragraphs, with an empty line between them.
        tables: Below the pictures.
        pictures: Below the text.
        code: What to run, word for word.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    code: str = ""


@dataclass(frozen=True)
class _Png:
    base64: str
    width: int
    height: int


def origin(folder: Path) -> list[Section]:
    """What made a run: its recipe, versions and machine."""
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return [
        Section("How it was made", "The recipe, every default spelled out:", code=recipe),
        Section("Versions and machine", code=json.dumps(load_json(folder / "environment.json"), indent=2)),
    ]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write a page that opens from disk: no script, no link to outside, pictures inside it.

    Everything is text and is escaped. It follows the reader's light or dark scheme, fits a phone, and prints.

    Args:
        path: Of the HTML file, which is written whole or not at all.
        title: Of the page.
        sections: Its parts; with three or more, a list of contents comes first.

    Returns:
        The path.

    Raises:
        GmnError: A picture that is missing or is no whole PNG.
    """
    # In jinja2, autoescape is off unless asked for.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"png": _png, "numeric": _numeric}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    save_text(path, template.render(title=title, sections=sections) + "\n")
    return path


def _png(picture: Picture) -> _Png:
    """A picture as the page holds it."""
    try:
        content = picture.path.read_bytes()
    except OSError as error:
        raise GmnError("a picture of the page is missing", got=str(picture.path)) from error
    if not content.startswith(SIGNATURE) or not content.endswith(END):
        raise GmnError("a picture of the page is no PNG", expected="a whole PNG file", where=str(picture.path))
    width, height = struct.unpack(">II", content[16:24])
    return _Png(base64.b64encode(content).decode("ascii"), width, height)


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers and nothing else."""
    columns = [[row[place].strip() for row in table.rows] for place in range(len(table.header))]
    filled = [[cell for cell in column if cell not in EMPTY] for column in columns]
    return [bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells) for cells in filled]
