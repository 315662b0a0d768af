"""The Python examples of the README and of the documents run as they stand, and recipes in them are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import gmn.rules
import gmn.scores
from gmn.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run_example(page: str) -> dict[str, Any]:
    """The names that the first Python block of a page leaves behind."""
    names: dict[str, Any] = {}
    exec(blocks(page, "python")[0], names)
    return names


def test_a_rule_of_ones_own(capsys) -> None:
    names = run_example("docs/converting.md")
    del gmn.rules._MODULES[names["LowRank"]]
    graph, model, same = names["graph"], names["model"], names["same"]
    assert "in the graph: 99 of 99 parameters (100.0%)" in capsys.readouterr().out
    assert [block.shape for block in graph.spec.blocks] == [(1, 6, 8, 1), (1, 2, 6, 1), (1, 5, 2, 1), (1, 3, 5, 1)]
    assert torch.equal(graph.edge_features[2][0, :, :, 0], model[1].up.T)
    x = torch.randn(4, 8)
    assert torch.equal(same(x), model(x))
    edited = graph.replace(graph.node_features, tuple(e + 1 for e in graph.edge_features))
    assert torch.equal(gmn.to_model(edited)[1].down, model[1].down + 1)  # type: ignore[index]


def test_a_criterion_of_ones_own() -> None:
    names = run_example("docs/criteria.md")
    del gmn.scores._SCORES["largest-weight"]
    pruned, other = names["pruned"].model, names["other"]
    assert pruned.conv1.out_channels == 16
    assert all(m.out_channels % 4 == 0 for m in pruned.modules() if isinstance(m, torch.nn.Conv2d))
    assert min(names["pruned"].report["speed_up"], other.report["speed_up"]) >= 1.5
    assert dict(names["masked"].mask.dense) == {"conv1": "inputs: 3, no multiple of 4", "linear": "prune.keep 'linear'"}


def test_the_example_runs(capsys) -> None:
    names = run_example("README.md")
    printed = capsys.readouterr().out
    assert "nodes in" in printed
    assert names["pruned"].report["speed_up"] >= 2.0  # type: ignore[attr-defined]
    same, model = names["same"], names["model"]
    assert isinstance(same, torch.nn.Module)
    assert isinstance(model, torch.nn.Module)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())


def test_recipes_of_the_documents_are_read(tmp_path: Path) -> None:
    recipes = blocks("docs/training.md", "yaml")
    assert len(recipes) == 3
    usual = load_recipe("quickstart")
    for number, text in enumerate(recipes):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert load_recipe(path) != usual
