"""How a network was built, kept beside its graph so that the file is enough to build it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from gmn.checkpoint import load_json
from gmn.errors import CheckpointError, GmnError, one_line
from gmn.networks import build_network, without_fetching
from gmn.permission import refuse_code
from gmn.room import Room
from gmn.surgery import resize, shapes


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
        own = {"num_classes": self.num_classes, "in_channels": self.in_channels}
        with torch.random.fork_rng(devices=[]):
            model = build_network(self.network, **own, options=without_fetching(self.options))
        if self.sizes is None:
            return model.eval()
        try:
            return resize(model, self.sizes).eval()
        except (RuntimeError, TypeError, ArithmeticError) as error:
            raise CheckpointError(
                "the network cannot be given its sizes", got=one_line(error), where=self.network
            ) from error

    def to_json(self) -> dict[str, Any]:
        """The source as a graph file keeps it."""
        content = self.model_dump(exclude_none=True)
        return content | {"options": without_fetching(self.options)}


def source_of_folder(folder: Path, model: nn.Module) -> Source:
    """The source of a network that `gmn.save_model` wrote, from its folder; CheckpointError if it is malformed."""
    network = load_json(folder / "model.json").get("network", {})
    renamed = {("network" if key == "name" else key): value for key, value in network.items()}
    return parse_source(renamed | {"sizes": shapes(model)}, str(folder))


def parse_source(content: dict[str, Any] | None, where: str) -> Source:
    """The source that a file states.

    Args:
        content: What `read_source` gives.
        where: The file, for errors.

    Raises:
        CheckpointError: if there is no source, it is malformed, or it names a function that nobody allowed.
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
    refuse_code(source.network, "source.network", where, CheckpointError)
    return source


def rebuild(source: Source, where: str, size: int) -> nn.Module:
    """The network of a file of so many bytes; CheckpointError if it cannot be built, or is far larger."""
    try:
        with Room(size, where):
            return source.build()
    except CheckpointError:
        raise
    except GmnError as error:
        raise CheckpointError("the network of the file cannot be built", got=str(error), where=where) from error
