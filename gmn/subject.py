"""The network that the user of a command means, and its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gmn.checkpoint import load_json, load_model
from gmn.convert import to_graph, to_model
from gmn.errors import CheckpointError, GmnError
from gmn.example import example_inputs, parse_size, stated_size
from gmn.graph import NetworkGraph
from gmn.graph_file import load_graph, read_source
from gmn.network_source import Source, parse_source, rebuild, source_of_folder
from gmn.networks import build_network, load_weights
from gmn.permission import allow_code
from gmn.recipe import read_value


@dataclass(frozen=True)
class Choices:
    """What the options of the command line say about a network; None where nothing was said."""

    input: str | None = None
    classes: int | None = None
    layout: str | None = None
    options: Sequence[str] = ()
    weights: Path | None = None
    network: str | None = None

    @property
    def size(self) -> tuple[int, ...] | None:
        """The size of an input."""
        if self.input is not None:
            return parse_size(self.input)
        pixels = self.arguments.get("img_size")  # timm's name for it
        return (3, pixels, pixels) if isinstance(pixels, int) else None

    @property
    def arguments(self) -> dict[str, Any]:
        """The builder's keyword arguments."""
        pairs = [option.partition("=") for option in self.options]
        for key, equals, _ in pairs:
            if not (key.isidentifier() and equals):
                raise GmnError("bad option of the network", expected="--set-option key=value", got=repr(key + equals))
        return {key: read_value(text, f"--set-option {key}") for key, _, text in pairs}

    def source(self, name: str) -> Source:
        """How to build the network of that name."""
        classes = self.classes if self.classes is not None else 10 if name.startswith("cifar.") else 1000
        channels = self.size[0] if self.input is not None and self.size else 3
        return Source.model_construct(
            network=name, num_classes=classes, in_channels=channels, options=self.arguments, sizes=None
        )

    def refuse(self, *names: str) -> None:
        """GmnError if one of these options was given."""
        for name in names:
            if getattr(self, name):
                flag = {"options": "--set-option"}.get(name, f"--{name}")
                raise GmnError(f"{flag} has no meaning here", hint="the file or the folder says it")


@dataclass(frozen=True)
class Subject:
    """A network, how it is built, and its graph."""

    model: nn.Module
    source: Source
    graph: NetworkGraph


@dataclass(frozen=True)
class Named:
    """A network that the user named, without a graph.

    Attributes:
        model: The network, in eval mode.
        network: How it is built, as `gmn.save_model` takes it.
        example: An input, one sample.
        facts: What else its folder says of it, such as accuracies.
    """

    model: nn.Module
    network: dict[str, Any]
    example: Any
    facts: dict[str, Any]


def named(name: str, choices: Choices) -> Named:
    """The network of a folder, or of that name; GmnError if there is none or it cannot be built."""
    folder = Path(name)
    if not folder.is_dir():
        source = choices.source(name)
        model = build(source, choices.weights)
        built = source.to_json()
        return Named(model, {"name": built.pop("network"), **built}, example_inputs(model, choices.size), {})
    choices.refuse("classes", "options", "weights")
    model, content, size = _saved(folder, choices)
    facts = {key: value for key, value in content.items() if key not in ("network", "format", "heads")}
    return Named(model, content["network"], example_inputs(model, size), facts)


def find(name: str, choices: Choices) -> Subject:
    """The network that the user means.

    Args:
        name: A graph file, the folder of a saved network, or a name for `build_network`.
        choices: The options.

    Raises:
        GmnError: if there is none, it cannot be built, or it has no graph.
    """
    path = Path(name)
    if is_file_name(name):
        choices.refuse("layout", "weights")
        return _of_graph_file(path, choices)
    choices.refuse("network")
    if path.is_dir():
        choices.refuse("classes", "options", "weights")
        return _of_folder(path, choices)
    source = choices.source(name)
    model = build(source, choices.weights)
    return Subject(model, source, _graph(model, choices, choices.size))


def is_file_name(name: str) -> bool:
    """Whether the user means a file, be it there or not."""
    return Path(name).is_file() or name.endswith(".safetensors")


def build(source: Source, weights: Path | None) -> nn.Module:
    """The network that the user asks for, options that fetch weights included."""
    model = build_network(
        source.network, num_classes=source.num_classes, in_channels=source.in_channels, options=source.options
    )
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def _graph(model: nn.Module, choices: Choices, size: Sequence[int] | None) -> NetworkGraph:
    """What has no rule is carried: to show that is what these commands are for."""
    return to_graph(model, example_inputs(model, size), layout=choices.layout or "generic", on_unknown="keep")


def _of_graph_file(path: Path, choices: Choices) -> Subject:
    stated = read_source(path)
    if choices.network and (stated is None or stated.get("network") != choices.network):
        source = choices.source(choices.network)
    else:
        choices.refuse("input", "classes", "options")
        with allow_code(only=[choices.network] if choices.network else []):
            source = parse_source(stated, str(path))
    graph = load_graph(path, rebuild(source, str(path), path.stat().st_size))
    return Subject(to_model(graph), source, graph)


def _of_folder(folder: Path, choices: Choices) -> Subject:
    model, _, size = _saved(folder, choices)
    return Subject(model, source_of_folder(folder, model), _graph(model, choices, size))


def _saved(folder: Path, choices: Choices) -> tuple[nn.Module, dict[str, Any], tuple[int, ...] | None]:
    """A saved network, what its model.json says, and the size of its input."""
    if not (folder / "model.json").is_file():
        inside = sorted(str(file.parent) for file in folder.glob("**/model.json"))
        hint = f"did you mean {inside[0]}?" if inside else None
        raise CheckpointError("no saved network here", expected="model.json", got=str(folder), hint=hint)
    content = load_json(folder / "model.json")
    return load_model(folder), content, choices.size or stated_size(content, str(folder / "model.json"))
