"""Options that several commands share, and lists given as text with commas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gmn.errors import GmnError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="cifar.resnet20, torchvision.X, timm.X, pkg.mod:function, the folder of a saved network, or a graph file.",
    ),
]
InputOption = Annotated[str | None, typer.Option("--input", help="Size of an input: 3,224,224. Default: the usual.")]
ClassesOption = Annotated[int | None, typer.Option("--classes", help="Default: 1000, 10 for cifar.*")]
LayoutOption = Annotated[
    str | None, typer.Option("--layout", help="generic (default), cnn, resnet56, resnet50, vgg19 or vit.")
]
BuilderOption = Annotated[
    list[str] | None, typer.Option("--set-option", help="For the builder: --set-option shortcut=B")
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="A state dict to fill the network with.")]
NetworkOption = Annotated[
    str | None, typer.Option("--network", help="For a graph file: the network, or the function it may call.")
]


EngineOption = Annotated[
    str, typer.Option("--engine", help="here, or ray: where tasks of a zoo, rows of a table, cells, trials are done.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Of a Ray cluster: auto, host:port. Default: one of this machine.")
]
CpusOption = Annotated[float | None, typer.Option("--cpus-per-task", help="Of the cluster. Default: 1")]
GpusOption = Annotated[float | None, typer.Option("--gpus-per-task", help="A share is fine. Default: 0")]


def _allow(context: typer.Context, allowed: bool) -> None:
    if allowed and not context.resilient_parsing:
        from gmn.permission import allow_code

        context.with_resource(allow_code())


AllowCodeOption = Annotated[
    bool, typer.Option("--allow-code", callback=_allow, help="Let files name functions (pkg.mod:function) to call.")
]


def numbers(option: str, text: str | None, *, least: int = 1) -> list[int]:
    """Whole numbers, `least` or above, out of a text with commas, in order; none of None.

    >>> numbers("--checkpoints", "5, 0", least=0)
    [0, 5]
    """
    parts = [part for part in words(text or "") if part]
    if (text is not None and not parts) or any(not part.isdecimal() or int(part) < least for part in parts):
        raise GmnError("not a list of numbers", expected="such as 1,3,10", got=repr(text), where=option)
    return sorted({int(part) for part in parts})


def words(text: str) -> list[str]:
    """The parts of a text with commas."""
    return [part.strip() for part in text.split(",")]
