"""The sections of a recipe: every key, what it means, and its bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from gmn.settings_fit import Fit, Positive, Section, check_milestones
from gmn.settings_network import CodeName, Data, DataModels, Kind, Network, PathLike
from gmn.settings_pattern import Removal
from gmn.settings_report import Baseline, distinct, labelled

DEVICES = r"auto|cpu|cuda(:\d+)?"
NAME = re.compile(r"(?!\.)[^/\\\[\]]{1,100}")


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
    bf16: bool = Field(default=False, description="blocks: edge states in bfloat16, half the memory; sums in float32")
    compile: bool = Field(default=False, description="blocks: fused by torch.compile; a minute before the first step")


class MetaTrain(Section):
    """The training of the metanetwork. One step reads batch_size * batches images, the "big batch"."""

    epochs: int = Field(ge=1, description="epochs; each leaves one checkpoint")
    steps_per_epoch: int = Field(ge=1, description="optimizer steps per epoch")
    batch_size: int = Field(ge=1, description="images per mini-batch")
    batches: int = Field(default=1, ge=1, description="mini-batches per step")
    models: int = Field(default=1, ge=1, description="data models per step, each with its share of the mini-batches")
    lr: float = Field(default=1e-3, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay")
    milestones: list[Positive] = Field(default_factory=list, description="epochs at which lr is multiplied by gamma")
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor at a milestone")
    pruner_reg: float = Field(default=10.0, ge=0, description="weight of the sparsity loss")
    eval_every: int = Field(
        default=0, ge=0, description="epochs between looks at the pruned networks; 0: only when all are trained"
    )
    patience: int = Field(
        default=0, ge=0, description="stop after so many looks without a better pruned network; 0: never"
    )
    finetune_images: int | None = Field(
        default=None,
        ge=0,
        description="images of fine-tuning before a look; null: finetune.after_meta in full, 0: none",
    )
    scale_invariant: bool = Field(
        default=True, description="divide by the mean of a group and differentiate it; the paper: false"
    )
    distill: float = Field(
        default=0.0, ge=0, le=1, description="weight of distillation from the data model; cross-entropy has the rest"
    )
    temperature: float = Field(default=4.0, gt=0, description="of distillation: what both outputs are divided by")
    bf16: bool = Field(default=False, description="forward pass of the new network in bfloat16")
    channels_last: bool = Field(
        default=False, description="images with their channels last: faster for CNNs that have no .view() of an image"
    )

    @model_validator(mode="after")
    def _milestones_in_reach(self) -> MetaTrain:
        if self.patience and not self.eval_every:
            raise ValueError("patience counts looks at the pruned networks: give eval_every too")
        if self.batches % self.models:
            raise ValueError(f"batches ({self.batches}) must be a multiple of models ({self.models})")
        check_milestones(self.milestones, self.epochs)
        return self


class Criterion(Section):
    """How important a channel is, or a weight."""

    score: CodeName = Field(
        default="norm",
        min_length=1,
        description="norm, bn-scale, taylor, fpgm, random, a registered name or package.module:function",
    )
    p: float = Field(default=2.0, gt=0, description="norm: power of |w| that is summed")
    reduce: Literal["mean", "first"] = Field(default="mean", description="over the members of a group")
    normalize: Literal["max", "mean", "none"] = Field(default="max", description="within a group")
    alpha: float = Field(default=4.0, ge=0, description="extra weight on what is small already; 0: off")
    images: int = Field(default=1000, ge=1, description="taylor: training images that gradients are taken on")
    seed: int | None = Field(default=None, ge=0, description="random: seed of the draw; null: the run's")

    @model_validator(mode="after")
    def _what_scores_read(self) -> Criterion:
        others = ("bn-scale", "fpgm", "random")  # scores of one's own may read anything
        for key, scores in (("p", ("taylor", *others)), ("images", ("norm", *others))):
            if self.score in scores and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no meaning with score {self.score}: leave it out")
        return self

    def seeded(self, seed: int) -> Criterion:
        """The criterion with a seed: its own, or the run's."""
        return self if self.seed is not None else self.model_copy(update={"seed": seed})


class Ranking(Section):
    """Which channels go first, and how many of a layer at most.

    Patterns are those of `fnmatch` (`*` and `?`) over the qualified names of the layers that make channels. Where
    single weights go, `ranking`, `limits` and `keep` are of each layer's weights, and nothing else has a meaning.
    """

    steps: int = Field(default=200, ge=1, description="steps in which all channels would go; fewer are coarser")
    ranking: Literal["global", "local"] = Field(
        default="global", description="all channels in one ranking, or the same share of every group"
    )
    max_ratio: float = Field(default=0.9, gt=0, lt=1, description="at most this share of a layer's channels goes")
    limits: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict, description="in place of max_ratio, by pattern; of several that match the lowest counts"
    )
    keep: list[str] = Field(default_factory=list, description="patterns of layers that lose no channel")
    round_to: int = Field(
        default=1, ge=1, description="what stays of a group is a multiple of it; groups with fewer channels are free"
    )
    per_flop: bool = Field(default=False, description="divide scores by the FLOPs that the channel costs")


class Prune(Ranking, Removal):
    """The removal of channels, or of single weights."""

    recalibrate: int = Field(
        default=0,
        ge=0,
        description="images to recompute BN statistics with, after pruning; 0: off",
    )
    reconstruct: int = Field(
        default=0,
        ge=0,
        description="images to fit each layer to the unpruned one's outputs with, in place of recalibrate; 0: off",
    )
    votes: PathLike | None = Field(
        default=None, description="a zoo of the same network, or its run: its tasks' votes multiply the scores"
    )
    votes_weight: float = Field(default=1.0, ge=0, description="1: what all tasks keep counts twice what none keeps")

    @model_validator(mode="after")
    def _what_weights_know(self) -> Prune:
        if self.of_channels:
            return self
        unknown = ["max_ratio", "round_to", "per_flop", "votes", "reconstruct"]
        unknown += ["ranking", "limits"] if self.n_of_m else []
        for key in unknown:
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                hint = "; limits: {'*': 0.95} are of weights" if key == "max_ratio" and not self.n_of_m else ""
                raise ValueError(f"{key} has no meaning with pattern {self.pattern}: leave it out{hint}")
        return self


class Finetune(Section):
    """The trainings around the pruning."""

    recalibrate_after_meta: int = Field(
        default=0, ge=0, description="images to recompute BN statistics with, after the metanetwork; 0: off"
    )
    after_meta: Fit | None = Field(default=None, description="between metanetwork and pruning; null: none")
    after_prune: Fit | None = Field(description="after pruning; null: none")


class Report(Section):
    """What the result is compared with, and how often."""

    baselines: Annotated[list[Baseline], AfterValidator(distinct)] = Field(
        default=["direct", "same-schedule"], description="rows without metanetwork"
    )
    speed_ups: Annotated[list[Annotated[float, Field(gt=1)]], AfterValidator(distinct)] = Field(
        default_factory=list, description="what the rows are pruned to beside prune.speed_up"
    )
    metanetworks: Annotated[dict[str, PathLike], AfterValidator(labelled)] = Field(
        default_factory=dict, description="more rows by label: a run folder or a saved metanetwork each"
    )
    sparse_reg: float = Field(default=0.03, ge=0, description="weight of the sparsity loss in the row `sparse`")
    seeds: int = Field(default=1, ge=1, description="fine-tuning seeds per row")
    latency_batch: int = Field(default=32, ge=1, description="images per batch when measuring time")


class Common(Section):
    """What recipes of every method have."""

    name: str = Field(min_length=1, description="title of the run; default: the file's stem")
    seed: int = Field(default=0, ge=0, description="seed of everything random")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    checkpoint_every: float = Field(
        default=60.0, gt=0, description="seconds between two checkpoints of a training that is under way"
    )
    data: Data = Field(description="the images")
    network: Network = Field(description="the network to make smaller")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not NAME.fullmatch(value) or not value.isprintable():  # it names a folder in runs/, and titles
            raise ValueError(
                f"100 printable characters at most, none of / \\ [ ], no dot in front; got {value[:100]!r}"
            )
        return value

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

    @property
    def targets(self) -> Sequence[float | None]:
        """The speed-ups that the rows are pruned to, the smallest first; [None] where single weights go."""
        return [None] if self.prune.speed_up is None else sorted({self.prune.speed_up, *self.report.speed_ups})

    @property
    def kinds(self) -> dict[str, Recipe]:
        """The recipe for each other kind of networks (`data_models.also`): with its images, training and weight."""
        return {label: self._for(kind) for label, kind in self.data_models.also.items()}

    def _for(self, kind: Kind) -> Recipe:
        weight = self.meta_train.model_copy(update={"pruner_reg": kind.pruner_reg})
        rows = self.report.model_copy(update={"speed_ups": []})  # they are of the recipe's own network
        own = {"data": kind.data, "network": kind.network, "data_models": kind.data_models}
        return self.model_copy(update={**own, "meta_train": weight, "report": rows})

    @model_validator(mode="after")
    def _something_to_learn_on(self) -> Recipe:
        kinds = self.kinds
        for found in self._wrong():
            raise ValueError(found)
        for label, kind in kinds.items():
            for found in kind._wrong():
                raise ValueError(f"data_models.also, {label}: {found}")
        most = sum(own.data_models.train for own in (self, *kinds.values()))
        if self.meta_train.models > most:
            raise ValueError(f"meta_train.models: there are {most} data models to learn on (data_models.train)")
        if kinds and self.prune.votes:
            raise ValueError("prune.votes are of one network: they do not go with data_models.also")
        return self

    def _wrong(self) -> Iterator[str]:
        """What does not go together in the networks to learn on."""
        models, initial = self.data_models, self.data_models.initial_speed_up
        if models.fit is None and not self.network.may_be_trained:
            yield (
                "nothing trains the network: give trained weights in network.weights, or a training in data_models.fit"
            )
        if models.train + models.val > 1 and not (models.fit or models.initial_fit or ":" in self.network.name):
            yield "several data models without a training are all the same: give data_models.fit, or train 1"
        if models.fit and models.fit.distill:
            yield "data_models.fit trains the unpruned network itself: nothing to distil from"
        if initial != 1 and self.prune.votes:
            yield "prune.votes are of the whole network: they do not go with data_models.initial_speed_up"
        if not self.prune.of_channels and (initial != 1 or self.report.speed_ups):
            name = "report.speed_ups" if initial == 1 else "data_models.initial_speed_up"
            hint = f"leave it out with prune.pattern {self.prune.pattern}, or set it to {'[]' if initial == 1 else '1'}"
            yield f"{name} removes channels: {hint}"
        least = self.targets[0]
        if least is not None and initial != "auto" and initial >= least:
            name = "prune.speed_up" if least == self.prune.speed_up else "report.speed_ups"
            yield (
                f"{name} ({least:g}) counts from before the initial pruning"
                f" and must be above data_models.initial_speed_up ({initial:g})"
            )

    @model_validator(mode="after")
    def _fits_have_what_they_need(self) -> Recipe:
        sparse = [row for row in self.report.baselines if row.endswith("sparse")]
        if sparse and self.finetune.after_meta is None:
            raise ValueError(f"{sparse[0]} of report.baselines trains sparsely in finetune.after_meta: give it")
        if self.meta_train.finetune_images and not (self.finetune.after_meta or self.finetune.after_prune):
            raise ValueError("meta_train.finetune_images: no fine-tuning to be brief with: leave it out, or give 0")
        library = [row for row in self.report.baselines if row.startswith("torch-pruning")]
        if library and not self.prune.of_channels:
            raise ValueError(
                f"{library[0]} of report.baselines removes channels: not with pattern {self.prune.pattern}"
            )
        return self
