"""The sections of a matrix recipe: networks, and the metanetworks that prune each of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gmn.names import nearest
from gmn.settings import Recipe, Report
from gmn.settings_fit import Section
from gmn.settings_network import check_label

OWN = "own"
"""Instead of columns, and the name of the one there is then: each network with what its own entry learnt."""
RESERVED = (OWN, "network", "base", "none", *get_args(get_args(Report.model_fields["baselines"].annotation)[0]))
"""Names of the table's other columns."""


class MatrixRecipe(Section):
    """Everything that decides a transfer matrix (GMN, tables 4 and 5): the recipes that it is made of."""

    method: Literal["matrix"] = Field(description="every network with every metanetwork")
    name: str = Field(min_length=1, description="title of the run; default: the file's stem")
    common: dict[str, Any] = Field(
        default_factory=dict, description="keys of every entry: over its `base`, under its own; written out when loaded"
    )
    entries: dict[str, Recipe] = Field(
        min_length=1,
        description="by label: a metanetwork recipe, its path or name, or a mapping of keys over its `base`",
    )
    rows: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="entries whose network is pruned; null: all"
    )
    columns: list[str] | Literal["own"] | None = Field(
        default=None,
        description="entries whose metanetwork is used; null: all; own: each network with its own entry's alone; "
        "[]: only the baselines of the rows",
    )

    @property
    def networks(self) -> list[str]:
        """The labels of the rows."""
        return self.rows or list(self.entries)

    @property
    def metanetworks(self) -> list[str]:
        """The labels of the entries that learn a metanetwork."""
        if isinstance(self.columns, list):
            return self.columns
        return list(self.entries) if self.columns is None else self.networks

    def titles(self, row: str) -> dict[str, str]:
        """By label of the entries whose metanetworks prune a network, the names of their columns."""
        return {row: OWN} if self.columns == OWN else {label: label for label in self.metanetworks}

    @property
    def used(self) -> list[str]:
        """The labels of the entries that are a row or a column, in the recipe's order."""
        return [label for label in self.entries if label in {*self.networks, *self.metanetworks}]

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(row, column) of every network with the metanetwork of another entry."""
        return [(row, column) for row in self.networks for column in self.titles(row) if row != column]

    @field_validator("entries", mode="before")  # ahead of what is wrong in the entries
    @classmethod
    def _labels_name_folders(cls, entries: object) -> object:
        for label in entries if isinstance(entries, dict) else ():
            check_label(str(label))
            if label in RESERVED:
                raise ValueError(f"the label {label!r} is the name of another column; give another")
        return entries

    @field_validator("columns", mode="before")
    @classmethod
    def _labels_or_own(cls, value: object) -> object:
        if not (value is None or value == OWN or isinstance(value, list)):
            raise ValueError(f"expected a list of entries, {OWN} or null; got {value!r}")
        return value

    @field_validator("rows", "columns")
    @classmethod
    def _labels_of_entries(cls, labels: list[str] | str | None, info: ValidationInfo) -> list[str] | str | None:
        known = info.data.get("entries")
        if not isinstance(labels, list):
            return labels
        for number, label in enumerate(labels):
            if known and label not in known:
                hint = nearest(label, known)
                raise ValueError(f"no entry {label!r}, only {', '.join(known)}{f'; {hint}' if hint else ''}")
            if label in labels[:number]:
                raise ValueError(f"the label {label!r} comes twice")
        return labels

    @model_validator(mode="after")
    def _something_to_compare(self) -> MatrixRecipe:
        for label in self.networks:
            report = self.entries[label].report
            if taken := {*self.entries, *RESERVED} & report.metanetworks.keys():
                raise ValueError(f"report.metanetworks of {label} has the name of another column: {min(taken)}")
            if label not in self.metanetworks and not report.baselines and not report.metanetworks:
                raise ValueError(f"nothing to compare in the row {label}, which is no column: give report.baselines")
            if report.speed_ups:
                raise ValueError(f"a matrix has one speed-up: leave report.speed_ups out of {label}")
        return self
