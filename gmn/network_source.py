"""How a network was built, kept beside its graph so that the file is enough to build it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from gmn.checkpoint import load_json
from gmn.errors import CheckpointError, GmnError
from gmn.networks import build_network
from gmn.surgery import resize, shapes

FETCHING = ("weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")
"""Options that only load weights: the weights are in the file, and a file must not make anyone read another."""


class Source(BaseModel):
    """How to build a network: what `build_network` takes, and the sizes that pruning has left it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    network: str
    num_classes: int = Field(ge=1)
    in_channels: int = Field(default=3, ge=1)
    options: dict[str, Any] = {}
    sizes: dict[str, list[int]] | None = None

    def build(self) -> nn.Module:
        """The network in eval mode, with weights that mean nothing; torch's random state is left as it was.

        Raises:
            GmnError: if it cannot be built, or the sizes are of another network.
        """
        options = {key: value for key, value in self.options.items() if key not in FETCHING}
        with torch.random.fork_rng(devices=[]):
            model = build_network(
                self.network, num_classes=self.num_classes, in_channels=self.in_channels, options=options
            )
        if self.sizes is None:
            return model.eval()
        try:
            return resize(model, self.sizes).eval()
        except (RuntimeError, TypeError, ArithmeticError) as error:
            got = str(error).split("\n")[0]
            raise CheckpointError("the network cannot be given its sizes", got=got, where=self.network) from error

    def to_json(self) -> dict[str, Any]:
        """The source as a graph file keeps it."""
        content = self.model_dump(exclude_none=True)
        return content | {"options": {k: v for k, v in self.options.items() if k not in FETCHING}}


def source_of_folder(folder: Path, model: nn.Module) -> Source:
    """The source of a network that `gmn.save_model` wrote, from its folder; CheckpointError if it is malformed."""
    network = load_json(folder / "model.json").get("network", {})
    renamed = {("network" if key == "name" else key): value for key, value in network.items()}
    return parse_source(renamed | {"sizes": shapes(model)}, str(folder))


def parse_source(content: dict[str, Any] | None, where: str, *, trusted: str | None = None) -> Source:
    """The source that a file states.

    Args:
        content: What `read_source` gives.
        where: The file, for errors.
        trusted: The function `package.module:function` that may be called, if the file names it.

    Raises:
        CheckpointError: if there is no source, it is malformed, or it names a function that is not trusted.
    """
    if content is None:
        hint = "say how it was built with --network"
        raise CheckpointError("the file does not say how its network is built", where=where, hint=hint)
    try:
        source = Source.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, ("source", *first["loc"])))
        raise CheckpointError(f"malformed {field}", expected=first["msg"], where=where) from None
    if ":" in source.network and source.network != trusted:  # a file of numbers must not run code of its choice
        raise CheckpointError(
            "the file names a function to call", got=source.network, where=where,
            hint=f"if you trust it, pass --network {source.network}",
        )  # fmt: skip
    return source


def rebuild(source: Source, where: str) -> nn.Module:
    """The network of a file; CheckpointError if it cannot be built."""
    try:
        return source.build()
    except GmnError as error:
        raise CheckpointError("the network of the file cannot be built", got=str(error), where=where) from error
