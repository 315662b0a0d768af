"""Functions that a file names.

* a recipe, a saved network or a graph file that names `package.module:function` is refused, in one line that says which
  key of which file wants to run what; nothing is imported
* what the caller wrote himself, as an argument or with --set, needs no permission; a file cannot pass for it
* inside `gmn.allow_code()`, or after --allow-code, it may run; all of it, or the functions that are named
* a run goes on loading its own networks; what only reads a run (report, cost) needs no permission
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import TINY
from made_runs import call
from pydantic import BaseModel
from torch import nn

import gmn
from gmn import pipeline
from gmn.checkpoint import save_json
from gmn.errors import CheckpointError, GmnError, RecipeError
from gmn.graph_file import save_graph
from gmn.permission import NAMES_CODE, allow_code, refuse_code
from gmn.recipe import load_recipe
from gmn.settings import Recipe
from gmn.settings_vote import VoteRecipe
from gmn.subject import Choices, find

OWN = "module_of_a_stranger:build"
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
import gmn
def build(num_classes, in_channels, width=4):
    return gmn.build_network("cifar.resnet8", num_classes=num_classes, in_channels=in_channels,
                             options={"width": width, "shortcut": "B"})
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module that leaves the file `ran` when it is imported; the test is in it."""
    (tmp_path / "module_of_a_stranger.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("module_of_a_stranger", None)


@pytest.mark.parametrize(
    ("base", "section", "key"),
    [
        ("quickstart", "network", "name"),
        ("quickstart", "data", "name"),
        ("quickstart", "criterion", "score"),
        ("graph-mask-voting", "similarity", "name"),
    ],
)
def test_a_recipe_that_names_code_is_refused(stranger: Path, base: str, section: str, key: str) -> None:
    recipe = stranger / "my.yaml"
    recipe.write_text(f"base: {base}\n{section}:\n  {key}: {OWN}\n")
    expected = rf"{section}\.{key} wants to run code: got '{OWN}'; in .*my\.yaml:3; .*--allow-code"
    with pytest.raises(RecipeError, match=expected) as error:
        load_recipe(recipe)
    assert "\n" not in str(error.value)
    with allow_code():
        allowed: Any = load_recipe(recipe)
    assert getattr(getattr(allowed, section), key) == OWN
    assert load_recipe(recipe, [f"{section}.{key}={OWN}"]) == allowed  # the caller's own word
    assert not (stranger / "ran").exists()


def test_a_file_cannot_pass_for_the_caller(stranger: Path) -> None:
    (stranger / "--set network.name=x").write_text(f"base: quickstart\nnetwork: {{name: '{OWN}'}}\n")
    (stranger / "my.yaml").write_text("base: --set network.name=x\n")
    with pytest.raises(RecipeError, match="wants to run code"):
        load_recipe("my.yaml", ["network.options={width: 2}", "data.name=digits"])
    assert load_recipe("my.yaml", ["network={name: cifar.resnet8}"]).network.name == "cifar.resnet8"


def fields(kind: type[BaseModel], *around: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for name, field in kind.model_fields.items():
        yield f"{kind.__name__}.{name}", field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel) and part not in around:
                yield from fields(part, kind, *around)


def test_every_field_that_takes_a_function_is_marked() -> None:
    """By what its description says: a new field cannot be forgotten."""
    known = dict([*fields(Recipe), *fields(VoteRecipe)])
    says = {name for name, field in known.items() if re.search(r"(pkg\.mod|package\.module):", field.description or "")}
    marked = {name for name, field in known.items() if NAMES_CODE in field.metadata}
    assert says == marked == {"Data.name", "Network.name", "Criterion.score", "Similarity.name"}


def test_permission_ends_with_its_block() -> None:
    def allowed(name: str) -> bool:
        try:
            refuse_code(name, "network.name", "f")
        except GmnError:
            return False
        return True

    assert allowed("cifar.resnet8")
    with allow_code(only=["a:b"]):
        assert [allowed(name) for name in ("a:b", "a:c", ":", "os:")] == [True, False, False, False]
        with allow_code(only=["a:c"]):
            assert [allowed(name) for name in ("a:b", "a:c")] == [True, True]
        with allow_code(), allow_code(only=[]):
            assert allowed("x:y")
        assert not allowed("x:y")
    with allow_code(only=[]):
        assert not allowed("a:b")
    assert not allowed("a:b")


def test_a_saved_network_that_names_code(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gmn.build_network("cifar.resnet8", num_classes=3, in_channels=1, options={"width": 4, "shortcut": "B"})
    source = {"name": OWN, "num_classes": 3, "in_channels": 1, "options": {}}
    gmn.save_model(stranger / "saved", model, source, input_shape=(1, 8, 8))
    graph = gmn.to_graph(model.eval(), torch.zeros(1, 1, 8, 8))
    save_graph(stranger / "graph.safetensors", graph, source={"network": OWN, "num_classes": 3, "in_channels": 1})
    with pytest.raises(CheckpointError, match=r"network\.name wants to run code: got .*; in saved/model\.json"):
        gmn.load_model("saved")
    for name, key in (("saved", "network.name"), ("graph.safetensors", "source.network")):
        with pytest.raises(CheckpointError, match=f"{key} wants to run code"):
            find(name, Choices())
        assert call(monkeypatch, "inspect", name) == 2
    assert not (stranger / "ran").exists()
    with allow_code(only=["os:system"]), pytest.raises(CheckpointError):
        gmn.load_model("saved")
    with allow_code(only=[OWN]):
        assert isinstance(gmn.load_model("saved"), nn.Module)
    assert (stranger / "ran").exists()
    assert call(monkeypatch, "inspect", "graph.safetensors", "--allow-code") == 0
    assert call(monkeypatch, "inspect", "saved", "--allow-code") == 0
    assert call(monkeypatch, "inspect", "saved") == 2  # the permission was for that call
    assert find("graph.safetensors", Choices(network=OWN)).source.network == OWN  # the user says it himself
    assert call(monkeypatch, "export", OWN, "-o", "out", "--format", "safetensors", "--input", "1,8,8") == 0


def test_a_run_with_a_network_of_ones_own(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller says it: the run loads what it has saved; whoever goes on with the folder has to allow it."""
    own = [
        *TINY,
        "network.options={width: 4}",
        "report.baselines=[]",
        "data_models.fit.epochs=1",
        "meta_train.epochs=1",
    ]
    recipe = load_recipe("quickstart", [*own, f"network.name={OWN}"])
    assert isinstance(recipe, Recipe)
    pipeline.meta_train(recipe, stranger / "run")
    with pytest.raises(RecipeError, match=r"wants to run code: .* in .*recipe\.yaml:\d+"):
        pipeline.reopened_metanetwork(stranger / "run")
    with allow_code():
        assert pipeline.reopened_metanetwork(stranger / "run").recipe == recipe
    for command in ("curve", "export"):
        assert call(monkeypatch, command, "run", *(["-o", "out"] if command == "export" else [])) == 2
    assert call(monkeypatch, "export", "run", "-o", "out", "--format", "safetensors", "--allow-code") == 0
    assert call(monkeypatch, "cost", "run") == 0
    assert call(monkeypatch, "report", "run") == 0
    pipeline.meta_train(recipe, stranger / "run", resume=True)  # the same caller again
    content = json.loads((stranger / "run/models/base/model.json").read_text())
    save_json(
        stranger / "run/models/base/model.json", content | {"network": {**content["network"], "name": "os:abort"}}
    )
    with pytest.raises(CheckpointError, match="wants to run code: got 'os:abort'"):
        pipeline.meta_train(recipe, stranger / "run", resume=True)


def test_the_command_line_refuses_in_one_line(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (stranger / "my.yaml").write_text(f"base: quickstart\nnetwork:\n  name: {OWN}\n")
    for command in (("meta-train", "my.yaml"), ("prune", "my.yaml", "--meta", "nowhere")):
        assert call(monkeypatch, *command) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert said.err.startswith(
            "gmn: network.name wants to run code: got 'module_of_a_stranger:build'; in my.yaml:3"
        )
    assert not (stranger / "ran").exists()
    assert not (stranger / "runs").exists()
