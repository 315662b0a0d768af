"""The sections of a recipe: every key, what it means, and its bounds."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

PathLike = Annotated[Path, Strict(False)]  # a string is fine, although the models are strict
Positive = Annotated[int, Field(ge=1)]
DEVICES = r"auto|cpu|cuda(:\d+)?"


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Augment(Section):
    """Random changes of the training images."""

    crop: int = Field(default=0, ge=0, description="pixels of padding before a random crop; 0: off")
    flip: bool = Field(default=False, description="mirror half of the images left to right")


class Data(Section):
    """The images that the networks learn from.

    Relative paths count from the directory that gmn is started in, not from the recipe's.
    """

    name: str = Field(min_length=1, description="digits, cifar10, parquet, imagefolder, pkg.mod:fn, ...")
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
    def _mean_with_std(self) -> Data:
        if len(self.mean or []) != len(self.std or []):
            raise ValueError("mean and std must come together, one number per channel each")
        if any(value <= 0 for value in self.std or []):
            raise ValueError("std must be above 0 in every channel")
        return self


class Network(Section):
    """The network to make smaller."""

    name: str = Field(min_length=1, description="cifar.resnet20, torchvision.X, timm.X or pkg.mod:fn")
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


class Fit(Section):
    """An ordinary training or fine-tuning."""

    epochs: int = Field(ge=1, description="passes over the training images")
    iterations: int | None = Field(default=None, ge=1, description="steps in all, in place of epochs")
    lr: float = Field(gt=0, description="learning rate at the start")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="what takes the steps")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay")
    schedule: Literal["multistep", "cosine"] = Field(default="multistep", description="how lr falls")
    milestones: list[Positive] = Field(
        default_factory=list, description="epochs at which multistep multiplies lr by gamma"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor at a milestone")
    batch_size: int = Field(default=128, ge=1, description="images per step")
    images_per_epoch: int | None = Field(default=None, ge=1, description="shorter epochs; null: all images")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")
    bf16: bool = Field(default=False, description="forward pass in bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _iterations_or_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("iterations") is not None:
            if values.get("epochs", 1) != 1 or values.get("milestones") or values.get("images_per_epoch"):
                raise ValueError(
                    "iterations stand in place of epochs, milestones and images_per_epoch: give one or the other"
                )
            return {**values, "epochs": 1}
        return values

    @model_validator(mode="after")
    def _milestones_in_reach(self) -> Fit:
        check_milestones(self.milestones, self.epochs)
        return self


class DataModels(Section):
    """The networks that the metanetwork learns on."""

    train: int = Field(default=1, ge=1, description="networks to learn on")
    val: int = Field(default=0, ge=0, description="held-out networks that choose the checkpoint; 0: the train ones")
    fit: Fit | None = Field(default=None, description="their training; null: network.weights as they are")
    initial_speed_up: float = Field(default=1.0, ge=1, description="pruning before all else; 1: none")
    initial_fit: Fit | None = Field(default=None, description="fine-tuning after the initial pruning")


class Graph(Section):
    """How a network becomes a graph; null takes the layout's own choice."""

    layout: Literal["generic", "cnn", "resnet56", "resnet50", "vgg19", "vit"] = Field(
        default="generic", description="which parameters go into which node and edge features"
    )
    kernels: Literal["padded", "per-size"] | None = Field(
        default=None, description="pad kernels to the largest, or one encoder per size"
    )
    on_unknown: Literal["error", "keep"] = Field(
        default="keep", description="layers without a rule: carry them through and never prune around them, or refuse"
    )
    identities: Literal["dense", "diagonal"] | None = Field(
        default=None, description="residual connections: edges between all channels, or only i to i"
    )


class MetaNetwork(Section):
    """The graph network that rewrites weights."""

    layers: int = Field(default=4, ge=1, description="message-passing layers")
    hidden: int = Field(default=32, ge=2, multiple_of=2, description="size of node and edge states, even")
    node_ratio: float = Field(default=0.05, gt=0, description="alpha: scale of the change to node features")
    edge_ratio: float = Field(default=0.05, gt=0, description="beta: scale of the change to edge features")
    zero_init: bool = Field(default=True, description="start as the identity")
    backend: Literal["blocks", "pyg"] = Field(default="blocks", description="dense blocks, or torch-geometric")
    max_chunk_mb: float | None = Field(
        default=None, gt=0, description="blocks: largest piece of the edges worked on at a time; null: by device"
    )
    keep_mb: float = Field(default=128.0, ge=0, description="blocks: room for edge states that need no second pass")
    compile: bool = Field(default=False, description="blocks: fused by torch.compile; a minute before the first step")


class MetaTrain(Section):
    """The training of the metanetwork. One step reads batch_size * batches images, the "big batch"."""

    epochs: int = Field(ge=1, description="epochs; each leaves one checkpoint")
    steps_per_epoch: int = Field(ge=1, description="optimizer steps per epoch")
    batch_size: int = Field(ge=1, description="images per mini-batch")
    batches: int = Field(default=1, ge=1, description="mini-batches per step")
    lr: float = Field(default=1e-3, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay")
    milestones: list[Positive] = Field(default_factory=list, description="epochs at which lr is multiplied by gamma")
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor at a milestone")
    pruner_reg: float = Field(default=10.0, ge=0, description="weight of the sparsity loss")
    scale_invariant: bool = Field(
        default=True, description="divide by the mean of a group and differentiate it; the paper: false"
    )
    bf16: bool = Field(default=False, description="forward pass of the new network in bfloat16")
    channels_last: bool = Field(
        default=False, description="images with their channels last: faster for CNNs that have no .view() of an image"
    )

    @model_validator(mode="after")
    def _milestones_in_reach(self) -> MetaTrain:
        check_milestones(self.milestones, self.epochs)
        return self


class Criterion(Section):
    """How important a channel is."""

    p: float = Field(default=2.0, gt=0, description="power of |w| that is summed")
    reduce: Literal["mean", "first"] = Field(default="mean", description="over the members of a group")
    normalize: Literal["max", "mean", "none"] = Field(default="max", description="within a group")
    alpha: float = Field(default=4.0, ge=0, description="extra weight on what is small already; 0: off")


class Prune(Section):
    """The removal of channels."""

    speed_up: float = Field(default=2.0, gt=1, description="FLOPs before / FLOPs after")
    steps: int = Field(default=200, ge=1, description="steps in which all channels would go; fewer are coarser")
    max_ratio: float = Field(default=0.9, gt=0, lt=1, description="at most this share of a layer's channels goes")
    recalibrate: int = Field(
        default=0,
        ge=0,
        description="images to recompute BN statistics with, after pruning; 0: off",
    )
    votes: PathLike | None = Field(
        default=None, description="a zoo of the same network, or its run: its tasks' votes multiply the scores"
    )
    votes_weight: float = Field(default=1.0, ge=0, description="1: what all tasks keep counts twice what none keeps")


class Finetune(Section):
    """The trainings around the pruning."""

    after_meta: Fit | None = Field(default=None, description="between metanetwork and pruning; null: none")
    after_prune: Fit = Field(description="after pruning")


class Report(Section):
    """What the result is compared with, and how often."""

    baselines: list[Literal["direct", "same-schedule"]] = Field(
        default=["direct", "same-schedule"], description="rows without metanetwork"
    )
    seeds: int = Field(default=1, ge=1, description="fine-tuning seeds per row")
    latency_batch: int = Field(default=32, ge=1, description="images per batch when measuring time")


class Common(Section):
    """What recipes of every method have."""

    name: str = Field(min_length=1, description="title of the run; default: the file's stem")
    seed: int = Field(default=0, ge=0, description="seed of everything random")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    data: Data = Field(description="the images")
    network: Network = Field(description="the network to make smaller")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(DEVICES, value):
            raise ValueError(f"expected auto, cpu, cuda or cuda:N; got {value!r}")
        return value


class Recipe(Common):
    """Everything that decides a run with a metanetwork: data, network, metanetwork, pruning, report."""

    method: Literal["metanetwork"] = Field(default="metanetwork", description="pruning method")
    data_models: DataModels = Field(default_factory=DataModels, description="networks to learn on")
    graph: Graph = Field(default_factory=Graph, description="how a network becomes a graph")
    metanetwork: MetaNetwork = Field(default_factory=MetaNetwork, description="what rewrites weights")
    meta_train: MetaTrain = Field(description="the training of the metanetwork")
    criterion: Criterion = Field(default_factory=Criterion, description="importance of a channel")
    prune: Prune = Field(default_factory=Prune, description="the removal of channels")
    finetune: Finetune = Field(description="the trainings around the pruning")
    report: Report = Field(default_factory=Report, description="comparisons and repetitions")

    @model_validator(mode="after")
    def _something_trains(self) -> Recipe:
        if self.data_models.fit is None and not self.network.may_be_trained:
            raise ValueError(
                "nothing trains the network: give trained weights in network.weights, or a training in data_models.fit"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        models = self.data_models
        if models.train + models.val > 1 and not (models.fit or models.initial_fit or ":" in self.network.name):
            raise ValueError(
                "several data models without a training are all the same: give data_models.fit, or train 1"
            )
        if models.initial_speed_up > 1 and self.prune.votes:
            raise ValueError("prune.votes are of the whole network: they do not go with data_models.initial_speed_up")
        if models.initial_speed_up >= self.prune.speed_up:
            raise ValueError(
                f"prune.speed_up ({self.prune.speed_up:g}) counts from before the initial pruning"
                f" and must be above data_models.initial_speed_up ({models.initial_speed_up:g})"
            )
        return self


def check_milestones(milestones: list[int], epochs: int) -> None:
    """Raise ValueError unless milestones increase and lie below epochs.

    >>> check_milestones([10, 13], 15)
    """
    increasing = all(a < b for a, b in itertools.pairwise(milestones))
    if not increasing or any(milestone >= epochs for milestone in milestones):
        raise ValueError(f"milestones must increase and lie below epochs ({epochs}); got {milestones}")
