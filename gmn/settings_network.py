"""The sections of a recipe that say what there is: images, a network, and the networks that a metanetwork learns on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator, model_validator

from gmn.permission import NAMES_CODE
from gmn.settings_fit import Fit, Section

PathLike = Annotated[Path, Strict(False)]  # a string is fine, although the models are strict
CodeName = Annotated[str, NAMES_CODE]


def check_label(label: str) -> None:
    """ValueError if what has this name in a recipe cannot have a folder of that name in a run."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", label):
        raise ValueError(f"a label is letters, digits, - and _, as it names a folder; got {label!r}")


class Augment(Section):
    """Random changes of the training images."""

    crop: int = Field(default=0, ge=0, description="pixels of padding before a random crop; 0: off")
    flip: bool = Field(default=False, description="mirror half of the images left to right")


class Data(Section):
    """The images that the networks learn from.

    Relative paths count from the directory that gmn is started in, not from the recipe's.
    """

    name: CodeName = Field(min_length=1, description="digits, cifar10, parquet, imagefolder, pkg.mod:fn, ...")
    root: PathLike | None = Field(default=None, description="folder that holds the data")
    download: bool = Field(default=False, description="fetch the data when it is missing")
    train: str | None = Field(default=None, description="parquet files of the training images, a glob")
    test: str | None = Field(default=None, description="parquet files of the test images, a glob")
    image: str = Field(default="img", description="parquet column of the image")
    label: str = Field(default="label", description="parquet column of the class")
    parent: str | None = Field(default=None, description="parquet column of the parent class, for similarities")
    validation: float = Field(
        default=0.1, gt=0, lt=1, description="share of the training images held out to choose with"
    )
    validation_from: Literal["train", "test"] = Field(
        default="train", description="train: that share of the training images; test: every other test image"
    )
    mean: list[float] | None = Field(default=None, description="per channel, subtracted; null: the data set's own")
    std: list[float] | None = Field(default=None, description="per channel, divided by; null: the data set's own")
    limit: int | None = Field(default=None, ge=1, description="use at most so many images of each split")
    size: int | None = Field(default=None, ge=1, description="scale images to so many pixels a side")
    augment: Augment = Field(default_factory=Augment, description="random changes of the training images")

    @model_validator(mode="after")
    def _files_are_parquet(self) -> Data:
        if (self.train or self.test) and self.name != "parquet" and ":" not in self.name:
            raise ValueError(f"train and test name parquet files, and name is {self.name}: give name: parquet, or null")
        return self

    @model_validator(mode="after")
    def _mean_with_std(self) -> Data:
        if len(self.mean or []) != len(self.std or []):
            raise ValueError("mean and std must come together, one number per channel each")
        if any(value <= 0 for value in self.std or []):
            raise ValueError("std must be above 0 in every channel")
        return self


class Network(Section):
    """The network to make smaller."""

    name: CodeName = Field(min_length=1, description="cifar.resnet20, torchvision.X, timm.X or pkg.mod:fn")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the builder")
    weights: PathLike | None = Field(default=None, description="state dict to start from")

    @property
    def may_be_trained(self) -> bool:
        """Whether the network can arrive with trained weights, from a file or from its builder.

        >>> Network(name="timm.resnet18", options={"pretrained": True}).may_be_trained
        True
        """
        from_options = self.options.get("weights") or self.options.get("pretrained")
        return bool(self.weights or from_options or ":" in self.name)


class DataModels(Section):
    """The networks that the metanetwork learns on.

    Attributes:
        also: Of other kinds. Keys that are left out there are those of the recipe; they are written out when loaded.
    """

    train: int = Field(default=1, ge=1, description="networks to learn on")
    val: int = Field(default=0, ge=0, description="held-out networks that choose the checkpoint; 0: the train ones")
    fit: Fit | None = Field(default=None, description="their training; null: network.weights as they are")
    initial_speed_up: float | Literal["auto"] = Field(
        default=1.0,
        description="pruning before all else; 1: none; auto: the largest that costs no validation accuracy",
        json_schema_extra={"anyOf": [{"type": "number", "minimum": 1}, {"const": "auto"}]},  # see _number_or_auto
    )
    initial_tolerance: float = Field(
        default=0.0, ge=0, description="points (percent) of validation accuracy that auto may cost"
    )
    initial_fit: Fit | None = Field(default=None, description="fine-tuning after the initial pruning")
    also: dict[str, Kind] = Field(
        default_factory=dict, description="by label: networks of another kind, to learn on in the same metanetwork"
    )

    @field_validator("initial_speed_up", mode="plain")
    @classmethod
    def _number_or_auto(cls, value: Any) -> float | Literal["auto"]:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value != "auto" and not (number and 1 <= value < math.inf):
            raise ValueError(f"expected a number of at least 1, or auto; got {value!r}")
        return float(value) if number else "auto"

    @field_validator("also")
    @classmethod
    def _labels_name_folders(cls, also: dict[str, Kind]) -> dict[str, Kind]:
        for label, kind in also.items():
            check_label(label)
            if kind.data_models.also:
                raise ValueError(f"{label} cannot have kinds of its own: give them beside it")
        return also

    @model_validator(mode="after")
    def _tolerance_of_auto(self) -> DataModels:
        if self.initial_tolerance and self.initial_speed_up != "auto":
            raise ValueError("initial_tolerance goes with initial_speed_up: auto")
        return self


class Kind(Section):
    """Another kind of network for a metanetwork to learn on; all else is as in the recipe.

    So the layers that `prune.keep` and `prune.limits` name must be in it too.
    """

    data: Data = Field(description="the images")
    network: Network = Field(description="the network")
    data_models: DataModels = Field(description="how many to learn on, and their training")
    pruner_reg: float = Field(ge=0, description="weight of the sparsity loss on this kind")


DataModels.model_rebuild()
