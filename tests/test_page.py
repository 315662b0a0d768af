"""Contract of `gmn.page`.

* A page is one file: pictures are inside it, byte for byte, and nothing is loaded from, or linked to, outside.
* Whatever is in a title, a text, a cell, a caption or the code is shown as it is, and never becomes markup.
* It is well formed, adapts to dark and to paper, and its tables scroll inside their box.
* It is written whole or not at all; a picture that is missing or no PNG, and a row of another length, are refused.
"""

from __future__ import annotations

import base64
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pictures import encode, pixels

from gmn.errors import GmnError
from gmn.page import TEMPLATE, Picture, Section, Table, write_page

HOSTILE = (
    "</title></code><script>alert('1')</script>\"><img src=https://example.org/x.png onerror=f()> {{ 7 * 7 }} &amp;"
)
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """The elements of a page and the text in each kind of them; refuses what does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def png(folder: Path, name: str = "picture.png") -> Path:
    path = folder / name
    path.write_bytes(encode(pixels(1, height=7, width=11)[0]))
    return path


def full_page(folder: Path) -> Reader:
    """A page with everything, and something hostile everywhere."""
    table = Table(["method", HOSTILE], [["MVP", "88.98"], [HOSTILE, "1 000"]], HOSTILE)
    sections = [
        Section(HOSTILE, f"First.\n\n{HOSTILE}", [table], [Picture(png(folder), HOSTILE)], HOSTILE),
        Section("Two", pictures=[Picture(png(folder), "again")]),
        Section("Three"),
    ]
    path = folder / "page.html"
    assert write_page(path, HOSTILE, sections) == path
    return Reader(path.read_text(encoding="utf-8"))


def test_hostile_text_is_shown_as_it_is(tmp_path: Path) -> None:
    page = full_page(tmp_path)
    assert not page.all("script")
    assert page.texts["title"] == page.texts["h1"] == [HOSTILE]
    assert page.texts["h2"] == [HOSTILE, "Two", "Three"]
    assert page.texts["p"] == ["First.", HOSTILE]
    assert page.texts["th"] == ["method", HOSTILE]
    assert page.texts["td"] == ["MVP", "88.98", HOSTILE, "1 000"]
    assert page.texts["caption"] == page.texts["code"] == [HOSTILE]
    assert page.texts["figcaption"] == [HOSTILE, "again"]
    assert [image["alt"] for image in page.all("img")] == [HOSTILE, "again"]
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]


def test_pictures_are_inside_byte_for_byte(tmp_path: Path) -> None:
    for image in full_page(tmp_path).all("img"):
        head, _, content = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content, validate=True) == (tmp_path / "picture.png").read_bytes()
        assert (image["width"], image["height"]) == ("11", "7")


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    page = full_page(tmp_path)
    places = {f"#{section['id']}" for section in page.all("section")}
    links = [a["href"] for a in page.all("a")]
    assert links == ["#s1", "#s2", "#s3"]
    assert set(links) == places
    loading = {"src", "srcset", "href", "data", "action", "poster", "background", "style"}
    used = {(tag, name) for tag, attributes in page.found for name in attributes if name in loading}
    assert used == {("img", "src"), ("a", "href")}
    assert not {tag for tag, _ in page.found} & {"link", "iframe", "object", "embed", "base", "form", "script"}
    [style] = page.texts["style"]
    assert not re.search(r"url\(|@import|//", style)
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert str(policy).startswith("default-src 'none'; img-src data:;")


def test_the_page_adapts_to_its_reader(tmp_path: Path) -> None:
    page = full_page(tmp_path)
    [style] = page.texts["style"]
    assert "@media (prefers-color-scheme: dark)" in style
    assert "@media print" in style
    assert re.search(r"\.box, pre \{ overflow-x: auto; max-width: 100%; \}", style)
    colours = [set(re.findall(r"(--\w+): #", block)) for block in re.findall(r":root \{(.*?)\}", style)]
    assert colours == [set(re.findall(r"var\((--\w+)\)", style))] * 3
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    tags = [tag for tag, _ in page.found]
    [table] = [at for at, tag in enumerate(tags) if tag == "table"]
    assert page.found[table - 1][1]["class"] == "box"
    assert page.all("html") == [{"lang": "en"}]


def test_columns_of_numbers_are_set_to_the_right(tmp_path: Path) -> None:
    header = ["method", "accuracy", "steps", "mixed", "none"]
    rows = [["MVP", "88.98 ± 0.3", "1,000", "2", "\u2013"], ["3 bears", "-12 %", "", "all", ""]]
    write_page(tmp_path / "p.html", "t", [Section("s", tables=[Table(header, rows)])])
    page = Reader((tmp_path / "p.html").read_text(encoding="utf-8"))
    expected = [False, True, True, False, False]
    assert [cell.get("class") == "number" for cell in page.all("th")] == expected
    assert [cell.get("class") == "number" for cell in page.all("td")] == expected * 2


def test_a_small_page_has_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", "Title", [Section("One", "text"), Section("Two")])
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert {tag for tag, _ in Reader(text).found} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "section", "h2", "p")
    }
    assert text.startswith("<!doctype html>\n")


def test_paragraphs_are_parted_by_empty_lines(tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", "t", [Section("s", "One,\nstill one.\n\n\n\nTwo — ü.\n\n  ")])
    assert Reader((tmp_path / "p.html").read_text(encoding="utf-8")).texts["p"] == ["One,\nstill one.", "Two — ü."]


def test_code_keeps_its_lines_and_spaces(tmp_path: Path) -> None:
    code = "  gmn zoo \\\n    --tau 0.025 < a > b\n"
    write_page(tmp_path / "p.html", "t", [Section("s", code=code)])
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert f"<pre><code>{html.escape(code)}</code></pre>" in text


def test_the_same_parts_make_the_same_file(tmp_path: Path) -> None:
    one, two = (write_page(tmp_path / name, "t", [Section("s", "x")]).read_bytes() for name in ("a.html", "b.html"))
    assert one == two


def broken(kind: str, folder: Path) -> Path:
    good = png(folder, "good.png").read_bytes()
    path = folder / "broken.png"
    content = {"text": b"not a picture", "torn": good[:-20], "empty": b"", "jpeg": b"\xff\xd8\xff" + good[3:]}
    if kind != "missing":
        path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind", ["text", "torn", "empty", "jpeg", "missing"])
def test_a_page_with_a_bad_picture_is_not_written(kind: str, tmp_path: Path) -> None:
    page = tmp_path / "out" / "page.html"
    write_page(page, "old", [])
    before = page.read_bytes()
    message = "missing: got .*broken.png" if kind == "missing" else "is no PNG: expected a whole PNG file; in .*broken"
    with pytest.raises(GmnError, match=message):
        write_page(page, "new", [Section("s", pictures=[Picture(broken(kind, tmp_path), "c")])])
    assert page.read_bytes() == before
    assert list(page.parent.iterdir()) == [page]


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(GmnError, match="a picture of the page is missing"):
        write_page(tmp_path / "p.html", "t", [Section("s", pictures=[Picture(tmp_path, "c")])])


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    write_page(page, "old", [])
    before = page.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_page(page, "new", [Section("s", "text")])
    assert page.read_bytes() == before
    assert list(tmp_path.iterdir()) == [page]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(GmnError, match="does not fit its header: expected 2 cells; got 1; in row 2"):
        Table(["a", "b"], [["1", "2"], ["3"]])


def test_wheels_carry_the_template() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert TEMPLATE.parent == Path(__file__).parents[1] / "gmn"
    assert re.search(rf'^"gmn" = \[.*"{TEMPLATE.name}".*\]$', pyproject, re.MULTILINE)
    assert re.search(r'^    "jinja2', pyproject, re.MULTILINE)
