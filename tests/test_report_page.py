"""Contract of the page of a run with a metanetwork.

* It is one file with the table, the pictures, the recipe and the machine; the weights' statistics are in the run.
* The table is there in Markdown too, with its caption, for an issue or a README.
* A browser that opens it from disk shows every picture.
* Runs that took their metanetwork from elsewhere, or were made by an older gmn, have a page too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from gmn import pipeline, report, report_page
from gmn.compare import STATISTICS
from gmn.curve_cli import curve
from gmn.recipe import load_recipe
from gmn.run import load_report
from gmn.weight_statistics import MEASURES

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ASK = """<iframe src="report.html" onload="document.title =
  [...this.contentDocument.images].map(i => `${i.naturalWidth}x${i.naturalHeight}`).join(' ')"></iframe>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "page"
    rows = ["report.baselines=[direct, random]", "report.seeds=2"]
    report.show(pipeline.meta_train(load_recipe("quickstart", [*TINY, *rows]), folder), folder)
    return folder


def test_a_page_has_everything(run: Path) -> None:
    text = (run / "report.html").read_text()
    for title in ("Networks", "How easy to prune", "Meta-training", "What the metanetwork did to the weights"):
        assert f">{title}</h2>" in text
    assert re.search(r"random.*±.*x", text, re.DOTALL)
    assert "pruner_reg" in text
    assert "torch" in text
    assert text.count("data:image/png;base64,") == 5


def test_the_table_in_markdown(run: Path) -> None:
    content = load_report(run)
    lines = (run / "report.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert rows == [report.header(content), ["---"] * 7, *report.cells(content)]
    assert lines[0] == "**quickstart: pruned to 1.8x**"
    assert "random: like direct" in lines[-1]


def test_statistics_of_every_layer(run: Path) -> None:
    content: dict[str, list[dict[str, Any]]] = json.loads((run / STATISTICS).read_text())
    before, after = content["before"], content["after"]
    assert [layer["layer"] for layer in before] == [layer["layer"] for layer in after]
    assert before[0]["layer"] == "conv1"
    assert all(layer[measure] >= 0 for layer in before for measure in MEASURES)
    assert any(one["l2"] != other["l2"] for one, other in zip(before, after, strict=True))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_every_picture(run: Path) -> None:
    curve(run, checkpoints="0,2", points=3, images=50, drop=0.1, finetune_images=0)
    report_page.write(load_report(run), run)
    (run / "ask.html").write_text(ASK)
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    home = [f"--user-data-dir={run / 'browser'}", "--virtual-time-budget=5000"]
    command = [BROWSER, *flags, *home, (run / "ask.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    sizes = re.search(r"<title>(.*?)</title>", shown)
    assert sizes is not None
    numbers = [tuple(map(int, size.split("x"))) for size in sizes[1].split()]
    assert len(numbers) == 6
    assert all(width > 600 and height > 400 for width, height in numbers)


def test_pages_without_meta_training_or_statistics(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / STATISTICS).unlink()
    text = report_page.write({**load_report(other), "meta_train": []}, other).read_text()
    assert ">Meta-training</h2>" not in text
    assert ">What the metanetwork did to the weights</h2>" not in text
    assert ">Networks</h2>" in text
