"""What goes from a network, and how much of it: channels, single weights, or weights in groups of M."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from gmn.settings_fit import Section


class Removal(Section):
    """What goes, and how much of it; each pattern has one target, or says itself how much."""

    pattern: str = Field(
        default="channels", description='channels; unstructured: single weights; N:M: N of M weights stay, as "2:4"'
    )
    speed_up: float | None = Field(
        default=None, gt=1, description="of channels: FLOPs before / FLOPs after; null: 2, other patterns have none"
    )
    sparsity: float | None = Field(
        default=None, gt=0, lt=1, description="of unstructured: share of the prunable weights that goes; null: 0.8"
    )

    @property
    def of_channels(self) -> bool:
        """Whether whole channels go; otherwise single weights become zero."""
        return self.pattern == "channels"

    @property
    def measure(self) -> str:
        """What tells how small a network is."""
        return "speed-up" if self.of_channels else "parameters left"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M, where N of M weights stay.

        >>> Removal(pattern="2:4").n_of_m
        (2, 4)
        """
        first, colon, second = self.pattern.partition(":")
        return (int(first), int(second)) if colon else None

    @property
    def goal(self) -> str:
        """The target in a few words.

        >>> Removal().goal, Removal(pattern="unstructured").goal, Removal(pattern="2:4").goal
        ('2x', '80% zeros', '2:4')
        """
        if self.speed_up is not None:
            return f"{self.speed_up:g}x"
        return self.pattern if self.sparsity is None else f"{100 * self.sparsity:g}% zeros"

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", value)
        if not (found and int(found[1]) < int(found[2])) and value not in ("channels", "unstructured"):
            raise ValueError(f"expected channels, unstructured, or N:M with N below M, such as 2:4; got {value!r}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _usual_target(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for pattern, key, usual in (("channels", "speed_up", 2.0), ("unstructured", "sparsity", 0.8)):
                if values.get("pattern", "channels") == pattern and values.get(key) is None:
                    return {**values, key: usual}
        return values

    @model_validator(mode="after")
    def _one_target(self) -> Removal:
        if self.speed_up is not None and not self.of_channels:
            raise ValueError(f"pattern {self.pattern} takes no FLOPs away: leave speed_up out, or give null")
        if self.sparsity is not None and self.pattern != "unstructured":
            says = "has speed_up for its target" if self.of_channels else "says itself how much goes"
            raise ValueError(f"pattern {self.pattern} {says}: leave sparsity out, or give null")
        return self
