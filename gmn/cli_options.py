"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="cifar.resnet20, torchvision.X, timm.X, pkg.mod:function, the folder of a saved network, or a graph file.",
    ),
]
InputOption = Annotated[str | None, typer.Option("--input", help="Size of an input: 3,224,224. Default: the usual.")]
ClassesOption = Annotated[int | None, typer.Option("--classes", help="Default: 1000, 10 for cifar.*")]
LayoutOption = Annotated[str | None, typer.Option("--layout", help="Which features nodes have. Default: generic")]
BuilderOption = Annotated[list[str] | None, typer.Option("--set-option", help="For the builder: --set-option depth=6")]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="A state dict to fill the network with.")]
NetworkOption = Annotated[
    str | None, typer.Option("--network", help="For a graph file: the network, or the function it may call.")
]
