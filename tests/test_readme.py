"""The README's Python example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_runs(capsys) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    printed = capsys.readouterr().out
    assert "nodes in" in printed
    assert names["pruned"].report["speed_up"] >= 2.0  # type: ignore[attr-defined]
    same, model = names["same"], names["model"]
    assert isinstance(same, torch.nn.Module)
    assert isinstance(model, torch.nn.Module)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())
