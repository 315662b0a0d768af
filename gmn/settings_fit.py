"""What every section of a recipe is, and the section of an ordinary training."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
    accumulate: int = Field(
        default=1, ge=1, description="parts that a batch goes through the network in, to save memory; norms see a part"
    )
    images_per_epoch: int | None = Field(default=None, ge=1, description="shorter epochs; null: all images")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")
    bf16: bool = Field(default=False, description="forward pass in bfloat16")
    channels_last: bool = Field(
        default=False, description="channels last in memory; not where a .view() reads an image"
    )
    compile: bool = Field(default=False, description="forward pass by torch.compile; a minute before the first step")
    warmup: float = Field(
        default=0.0, ge=0, description="epochs (or share of the iterations) in which lr first rises; 0: off"
    )
    clip: float = Field(default=0.0, ge=0, description="largest norm of the gradient; 0: off")
    mixup: float = Field(
        default=0.0, ge=0, description="alpha of mixup; 0: off; beside cutmix, batches take one or the other"
    )
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix; 0: off")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the averaged weights, which are kept; 0: off")
    distill: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="weight of distillation from the unpruned network; cross-entropy has the rest",
    )
    temperature: float = Field(default=4.0, gt=0, description="of distillation: what both outputs are divided by")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

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
        if self.milestones and self.schedule == "cosine":
            raise ValueError("schedule cosine has no milestones: leave them out ([]), or take multistep")
        if self.warmup >= self.epochs:
            whole = "1, all iterations," if self.iterations else f"epochs ({self.epochs})"
            raise ValueError(f"warmup must be below {whole}; got {self.warmup:g}")
        return self

    @model_validator(mode="after")
    def _equal_parts(self) -> Fit:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        return self

    @model_validator(mode="after")
    def _pairs_to_mix(self) -> Fit:
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair images: batch_size must be even; got {self.batch_size}")
        return self


def check_milestones(milestones: list[int], epochs: int) -> None:
    """Raise ValueError unless milestones increase and lie below epochs.

    >>> check_milestones([10, 13], 15)
    """
    increasing = all(a < b for a, b in itertools.pairwise(milestones))
    if not increasing or any(milestone >= epochs for milestone in milestones):
        hint = "set both, such as milestones: []"
        raise ValueError(f"milestones must increase and lie below epochs ({epochs}); got {milestones}; {hint}")
