"""The sections of a vote recipe: a zoo of pruned tasks, the vote of the nearest, and what it is compared with."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from gmn.settings import CodeName, Common, Fit, PathLike, Positive, Section
from gmn.settings_report import distinct


class FilterPruning(Section):
    """Iterative filter pruning (IFP) on a task; the numbers of the MVP paper are the defaults."""

    head_iterations: int = Field(default=0, ge=0, description="K: first, steps that train the new head alone")
    iterations: int = Field(default=1000, ge=1, description="J: steps of SGD between which units are dropped")
    interval: int = Field(default=50, ge=1, description="h: steps between two rounds of dropping")
    final_iterations: int = Field(default=20, ge=0, description="steps after the last round")
    only_inside: bool = Field(
        default=False, description="channels of residual streams stay, as AHNP has it; false: they go like all others"
    )
    score: Literal["activation", "taylor"] = Field(default="activation", description="what makes a unit matter")
    score_images: int = Field(default=1000, ge=1, description="training images that the scores are computed from")
    lr: float = Field(default=0.005, gt=0, description="learning rate")
    decay: bool = Field(default=False, description="after the last round, lr falls by half a cosine")
    batch_size: int = Field(default=128, ge=1, description="images per step")
    bf16: bool = Field(default=False, description="forward pass in bfloat16")

    @model_validator(mode="after")
    def _one_round_at_least(self) -> FilterPruning:
        if self.interval > self.iterations:
            raise ValueError(f"interval ({self.interval}) is more than iterations ({self.iterations}): nothing goes")
        return self

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.head_iterations + self.iterations + self.final_iterations

    def within(self, steps: int) -> FilterPruning:
        """The same schedule in so many steps: every part in proportion, as many rounds as fit.

        >>> FilterPruning(iterations=800, interval=50, final_iterations=200).within(100).interval
        5
        """
        share = steps / self.total
        head = min(round(self.head_iterations * share), steps - 1)
        iterations = max(1, min(round(self.iterations * share), steps - head))
        parts = {"head_iterations": head, "iterations": iterations, "final_iterations": steps - head - iterations}
        return self.model_copy(update={**parts, "interval": max(1, int(self.interval * share))})


class HeadPruning(Section):
    """Automatic head and node pruning (AHNP) on a task; the numbers of the MVP paper where it has them."""

    only_inside: ClassVar[bool] = True  # no channel of the residual stream ever goes
    iterations: int = Field(default=1000, ge=1, description="J: steps with scores, until all layers are at their ratio")
    final_iterations: int = Field(
        default=100, ge=0, description="K: last steps, without scores; what is left of J is added"
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="units whose score falls below go; scores start at 1")
    penalty: float = Field(default=1e-2, ge=0, description="weight of the L1 norm of the scores")
    lr: float = Field(default=5e-5, gt=0, description="learning rate of the weights")
    score_lr: float = Field(default=0.05, gt=0, description="learning rate of the scores")
    batch_size: int = Field(default=128, ge=1, description="images per step")
    bf16: bool = Field(default=False, description="forward pass in bfloat16")

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.iterations + self.final_iterations

    def within(self, steps: int) -> HeadPruning:
        """The same schedule in so many steps, both parts in proportion.

        >>> HeadPruning(iterations=800, final_iterations=200).within(100).iterations
        80
        """
        iterations = min(steps, max(1, round(self.iterations * steps / self.total)))
        return self.model_copy(update={"iterations": iterations, "final_iterations": steps - iterations})


class SimSiam(Section):
    """Self-supervised pre-training: two views of an image must look alike (Chen and He, 2021)."""

    epochs: int = Field(ge=1, description="passes over the training images, whose labels are not read")
    lr: float = Field(default=0.03, gt=0, description="learning rate at the start; it falls by half a cosine")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay")
    batch_size: int = Field(default=256, ge=2, description="images per step")
    projection: int = Field(default=512, ge=1, description="size of the projector's layers and output")
    bottleneck: int = Field(default=128, ge=1, description="size of the predictor's hidden layer")
    min_scale: float = Field(default=0.2, gt=0, le=1, description="smallest share of the image's area that a crop has")
    flip: bool = Field(default=True, description="mirror half of the views left to right")
    jitter: float = Field(default=0.4, ge=0, lt=1, description="largest change of brightness and contrast; 0: off")
    grey: float = Field(default=0.2, ge=0, le=1, description="share of the views without colour")
    bf16: bool = Field(default=False, description="forward pass in bfloat16")


class Pretrain(Section):
    """The training of the one network that all tasks share: supervised or self-supervised."""

    fit: Fit | None = Field(default=None, description="ordinary training on all classes")
    simsiam: SimSiam | None = Field(default=None, description="self-supervised training")

    @model_validator(mode="after")
    def _one_of_both(self) -> Pretrain:
        if (self.fit is None) == (self.simsiam is None):
            raise ValueError("give one of fit and simsiam")
        return self


class Reptile(Section):
    """The baseline of one pruned meta-initialisation for all tasks (IHT-based Reptile; Tian et al. 2020)."""

    rounds: int = Field(default=100, ge=1, description="tasks that are visited, one after the other")
    iterations: int = Field(default=10, ge=1, description="steps of SGD on each")
    step: float = Field(default=0.5, gt=0, le=1, description="how far the initialisation moves towards a task's end")
    lr: float = Field(default=0.01, gt=0, description="learning rate on a task")
    batch_size: int = Field(default=128, ge=1, description="images per step")
    bf16: bool = Field(default=False, description="forward pass in bfloat16")


class ZooTasks(Section):
    """The tasks of the zoo, and how the network is pruned for each."""

    tasks: int = Field(default=60, ge=1, description="tasks that vote")
    targets: int = Field(default=12, ge=1, description="other tasks, held out, to prune for in the end")
    classes: list[Positive] = Field(default=[5], min_length=1, description="classes of a task; several take turns")
    pruner: Literal["filters", "heads"] = Field(default="filters", description="IFP for CNNs, AHNP for transformers")
    filters: FilterPruning = Field(default_factory=FilterPruning, description="numbers of IFP")
    heads: HeadPruning = Field(default_factory=HeadPruning, description="numbers of AHNP")

    @property
    def pruning(self) -> FilterPruning | HeadPruning:
        """The pruner's numbers."""
        return self.heads if self.pruner == "heads" else self.filters


class Similarity(Section):
    """How the nearest tasks are found."""

    name: CodeName = Field(
        default="leep", description="leep, wordnet, shared_classes, shared_parents, prototypes or pkg.mod:Class"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the similarity")
    images: int = Field(default=500, ge=1, description="training images of the target that leep reads")
    parents: dict[str, str] = Field(
        default_factory=dict, description="parent class of each class name; default: what the data say"
    )


class Vote(Section):
    """The vote, and the fine-tuning of what it chose."""

    neighbours: int = Field(default=3, ge=1, description="N: tasks that vote")
    tau: float = Field(default=0.025, gt=0, description="temperature; small: the majority decides")
    ties: Literal["random", "nearest"] = Field(
        default="random", description="units with as many votes: by chance, as in the paper, or the nearest task's"
    )
    fit: Fit = Field(description="fine-tuning after the vote; every short baseline has as many steps")


Row = Literal["nearest", "short", "long", "random", "reptile"]


class VoteReport(Section):
    """What the vote is compared with, and how often."""

    baselines: Annotated[list[Row], AfterValidator(distinct)] = Field(
        default=["nearest", "short", "long", "random", "reptile"], description="rows beside the vote"
    )
    long: int = Field(default=10, ge=1, description="the long baseline has so many times the vote's steps")
    seeds: int = Field(default=1, ge=1, description="repetitions per row and target")


class VoteRecipe(Common):
    """Everything that decides a run of meta-vote pruning: data, network, zoo, vote, report."""

    method: Literal["vote"] = Field(description="pruning method")
    pretrain: Pretrain | None = Field(default=None, description="training of the network; null: network.weights")
    rewrite: PathLike | None = Field(
        default=None, description="a metanetwork that rewrites the network before all else: a run folder or a file"
    )
    ratio: float = Field(default=0.9, gt=0, lt=1, description="share of each layer's units that goes")
    zoo: ZooTasks = Field(default_factory=ZooTasks, description="the tasks that vote")
    similarity: Similarity = Field(default_factory=Similarity, description="how the nearest are found")
    vote: Vote = Field(description="the vote and the fine-tuning after it")
    reptile: Reptile = Field(default_factory=Reptile, description="numbers of the baseline of that name")
    target: list[str] | None = Field(
        default=None, min_length=2, description="for gmn prune: the task's classes by name; null: all of the data set"
    )
    report: VoteReport = Field(default_factory=VoteReport, description="comparisons and repetitions")

    @model_validator(mode="after")
    def _something_trains(self) -> VoteRecipe:
        if self.pretrain is None and not self.network.may_be_trained:
            raise ValueError(
                "nothing trains the network: give trained weights in network.weights, or a training in pretrain"
            )
        return self

    @model_validator(mode="after")
    def _nobody_teaches(self) -> VoteRecipe:
        if any(fit and fit.distill for fit in (self.vote.fit, self.pretrain and self.pretrain.fit)):
            raise ValueError("nothing to distil from: no unpruned network is trained for a task; set distill: 0")
        return self

    @model_validator(mode="after")
    def _counts_steps(self) -> VoteRecipe:
        if self.vote.fit.iterations is None:
            raise ValueError("vote.fit counts steps, to compare with baselines of as many: give vote.fit.iterations")
        return self

    @model_validator(mode="after")
    def _equal_steps(self) -> VoteRecipe:
        size, own = self.zoo.pruning.batch_size, self.vote.fit.batch_size
        if size != own and {"short", "long"} & {*self.report.baselines}:
            raise ValueError(
                f"rows are compared by steps, which must be of as many images: vote.fit.batch_size is {own}, "
                f"zoo.{self.zoo.pruner}.batch_size {size}"
            )
        return self

    @model_validator(mode="after")
    def _enough_neighbours(self) -> VoteRecipe:
        if self.vote.neighbours > self.zoo.tasks:
            raise ValueError(f"vote.neighbours ({self.vote.neighbours}) are more than zoo.tasks ({self.zoo.tasks})")
        return self
