"""What a user names is shown as it is, although it looks like a style or an emoji; no console of gmn does otherwise."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from gmn import consoles, progress
from gmn.consoles import plain_console, wide_console

ODD = "[/x] [red] :M: \\[a]"
GMN = Path(consoles.__file__).parent


@pytest.mark.parametrize("make", [plain_console, wide_console])
def test_text_is_shown_as_it_is(make: type, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(ODD, title=ODD, caption=ODD)
    table.add_row(ODD)
    console = make()
    console.print(table)
    console.print(ODD)
    assert capsys.readouterr().out.count(ODD) == 5


def test_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=160))
    with progress.track(ODD, 1) as advance:
        advance(ODD)
    assert ODD in stream.getvalue()


def test_no_other_consoles() -> None:
    made = [
        path.name
        for path in GMN.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console"
    ]
    assert made == ["consoles.py"]
