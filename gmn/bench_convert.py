"""What one process of `gmn bench convert` does: a network there and back, and what can be said about it.

python -m gmn.bench_convert ENTRY RESULT [MB]: ENTRY is a `suites.Entry` as JSON, MB a limit of memory. The file RESULT
is written anew at every stage, so that a process that is killed leaves what it had found.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmn.bench_checks import (
    FRESH,
    SEED,
    aggregated,
    differing,
    edited,
    equal,
    outputs,
    randomise,
    unmoved,
    versions,
)
from gmn.checkpoint import save_json
from gmn.convert import to_graph, to_model
from gmn.errors import one_line
from gmn.graph import NetworkGraph
from gmn.groups import couplings
from gmn.inspection import coverage
from gmn.memory import limit_memory, peak_memory
from gmn.records import Trace
from gmn.rules import rule_for
from gmn.suites import Entry
from gmn.trace import trace

AFTERWARDS = "couple"  # the stage that says nothing about the conversion


class Result:
    """What has been found so far; the file follows at every stage.

    Attributes:
        values: `ok`, `stage`, `seconds` by stage, and what `measure` adds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {"ok": False, "seconds": {}, "versions": versions()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and name it in the file while it lasts."""
        self.values["stage"] = name
        self.save()
        start = time.perf_counter()
        yield
        self.values["seconds"][name] = round(time.perf_counter() - start, 3)

    def fail(self, problem: BaseException) -> None:
        """Say why it ended here: one line, and the place in the code."""
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(problem.__traceback__)]
        mine = [frame for frame in frames if frame[0].parent.name in ("gmn", "converters")]
        path, line = (mine or frames)[-1]
        place = f"{path.parent.name}/{path.name}:{line}"
        self.values |= {"ok": False, "error": one_line(problem), "at": place}

    def save(self) -> None:
        """Write the file."""
        save_json(self.path, self.values | {"peak_mb": peak_memory()})  # killed in between, the old file is whole


def measure(entry: Entry, result: Result) -> None:
    """Build, convert, compare and edit; fills `result`. Whatever goes wrong is raised."""
    values = result.values
    torch.manual_seed(SEED)
    with result.stage("build"):
        model = randomise(entry.build())
        arguments, fresh = entry.example(model, SEED), entry.example(model, FRESH)
        values["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with result.stage("run"):
        expected = outputs(model, fresh)
    with result.stage("trace"):  # only to time it: to_graph traces for itself
        values |= _tracing(trace(model, arguments, lambda module: rule_for(module) is not None))
    with result.stage("convert"):
        graph = to_graph(model, arguments)
    values |= _counts(graph) | _coverage(model, graph)
    with result.stage("round trip"):
        copy = to_model(graph).eval()
        values["differing"] = differing(model, copy)
        values["same_outputs"] = equal(outputs(copy, fresh), expected)
        del copy  # large networks need the memory
    with result.stage("edit"):
        changed = to_model(edited(graph)).eval()
        values["unmoved"] = unmoved(changed, graph)
        values["edit_shows"] = not equal(outputs(changed, fresh), expected)
        del changed
    values["bit_exact"] = not values["differing"] and values["same_outputs"]
    values["ok"] = values["bit_exact"] and values["edit_shows"] and not values["unmoved"]
    values["error"] = _complaint(values)
    with result.stage(AFTERWARDS):
        values |= _frozen(graph)


def _tracing(record: Trace) -> dict[str, Any]:
    return {"traced_by": record.traced_by, "blind": record.blind, "ops": len(record.ops)}


def _counts(graph: NetworkGraph) -> dict[str, Any]:
    spec = graph.spec
    return {"nodes": spec.num_nodes, "edges": spec.num_edges, "blocks": len(spec.blocks)}


def _coverage(model: nn.Module, graph: NetworkGraph) -> dict[str, Any]:
    found = coverage(model, graph.spec)
    return {"share": found.share, "layer_share": found.layer_share, "carried": aggregated(graph.spec.carried)}


def _frozen(graph: NetworkGraph) -> dict[str, Any]:
    try:
        coupled = couplings(graph.spec)
    except Exception as problem:  # says something about pruning, nothing about the conversion
        return {"frozen": None, "frozen_error": one_line(problem)}
    return {"frozen": 1 - float(coupled.prunable.float().mean())}


def _complaint(values: dict[str, Any]) -> str:
    names = ", ".join((values["differing"] or values["unmoved"])[:3])
    if values["differing"]:
        return f"{len(values['differing'])} tensors differ after the round trip: {names}"
    if not values["same_outputs"]:
        return "the copy's outputs differ"
    if values["unmoved"]:
        return f"{len(values['unmoved'])} parameters of the graph do not follow an edit: {names}"
    return "" if values["edit_shows"] else "an edited graph gives the same outputs"


def main() -> None:
    """Measure the entry of the command line."""
    entry = Entry.from_json(json.loads(sys.argv[1]))
    result = Result(Path(sys.argv[2]))
    if len(sys.argv) > 3:
        limit_memory(float(sys.argv[3]))
    try:
        measure(entry, result)
    except Exception as problem:  # a network of others may raise anything: that is its row of the table
        result.fail(problem)
    result.save()


if __name__ == "__main__":
    main()
