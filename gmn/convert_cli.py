"""What `gmn inspect` and `gmn convert` do: show the graph of a network, and keep it in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from gmn.checkpoint import write_atomic
from gmn.consoles import wide_console
from gmn.convert import to_model
from gmn.errors import CheckpointError, GmnError
from gmn.graph_copies import same_bits
from gmn.graph_file import load_graph, read_source, save_graph
from gmn.inspection import coverage
from gmn.inspection_report import percent, report
from gmn.network_source import parse_source, rebuild
from gmn.permission import allow_code
from gmn.subject import Choices, Subject, find, is_file_name


def inspect(name: str, choices: Choices, *, draw: Path | None = None, groups: bool = True) -> None:
    """Print a network's modules, coupled channels and coverage; draw its graph if asked to.

    Raises:
        GmnError: see `find`.
    """
    subject = find(name, choices)
    if draw is not None:
        from gmn import drawing  # matplotlib takes a second to import

        drawing.draw(subject.graph, draw)
    wide_console().print(report(subject.model, subject.graph, groups=groups))
    if draw is not None:
        print(f"drawn: {draw}")


def convert(name: str, output: Path, choices: Choices, *, overwrite: bool = False) -> None:
    """Network to graph file, or graph file to a state dict; the output appears only if it reads back alike.

    Raises:
        GmnError: see `find`; also if the output exists, or does not read back to the last bit.
    """
    if output.suffix != ".safetensors":
        raise GmnError("bad name for the output", expected="a name that ends in .safetensors", got=str(output))
    if output.exists() and not overwrite:
        raise GmnError("the output exists", got=str(output), hint="replace it with --overwrite")
    subject = find(name, choices)
    (_write_weights if is_file_name(name) else _write_graph)(subject, output)


def _write_graph(subject: Subject, output: Path) -> None:
    def write(temporary: Path) -> None:
        save_graph(temporary, subject.graph, source=subject.source.to_json())
        with allow_code(only=[subject.source.network]):
            source = parse_source(read_source(temporary), str(output))
        again = to_model(load_graph(temporary, rebuild(source, str(output), temporary.stat().st_size)))
        check_same(tensors_of(subject.model), tensors_of(again))

    write_atomic(output, write)
    spec, covered = subject.graph.spec, coverage(subject.model, subject.graph.spec)
    print(f"graph of {subject.source.network}: {spec.num_nodes:,} nodes, {spec.num_edges:,} edges")
    print(f"parameters in the graph: {covered.in_graph:,} of {covered.total:,} ({percent(covered.share)})")
    print(f"wrote {output}: {output.stat().st_size:,} bytes")
    print("round trip: bit-exact")


def _write_weights(subject: Subject, output: Path) -> None:
    state = tensors_of(subject.model)

    def write(temporary: Path) -> None:
        ready = {name: value.contiguous().clone() for name, value in state.items()}  # tied: under each of its names
        safetensors.torch.save_file(ready, temporary, metadata={"format": "pt"})
        check_same(state, safetensors.torch.load_file(temporary))

    write_atomic(output, write)
    print(f"wrote {output}: state dict of {subject.source.network}, {len(state):,} tensors")
    print("round trip: bit-exact")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; what is no tensor in it belongs to the network's code."""
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def check_same(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """CheckpointError if two state dicts are not the same to the last bit."""
    for name in [*expected, *got]:
        if name not in expected or name not in got or not same_bits(expected[name], got[name]):
            raise CheckpointError("the round trip is not bit-exact", where=name)
