"""Comparison files: arms of one job, each with changes of its own, with several seeds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rdpo.config.files import with_changes
from rdpo.config.section import Section, Table
from rdpo.errors import InputError, did_you_mean


class Vary(Section):
    """A setting that every arm is run with in several values."""

    key: str = Field(pattern=r"^[a-z_]+(\.[a-z_0-9]+)+$")
    """The setting, as in `--set`: `pairs.flip`."""
    values: list[float] = Field(min_length=2)
    """Its values, in order."""

    @field_validator("values")
    @classmethod
    def _check_values(cls, values: list[float]) -> list[float]:
        for place, value in enumerate(values):
            if value in values[:place]:
                raise ValueError(f"{short(value)} is given twice")
        return values


class Comparison(Section):
    """A comparison file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the comparison; its directory is `runs/NAME` unless `--run-dir` says otherwise."""
    job: str
    """The base job file, relative to this one."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds with which each arm is run."""
    baseline: str
    """The arm that the others are held against."""
    controls: list[str] = Field(default_factory=list)
    """Arms that should not beat the baseline, as one with `training.shuffle_rewards`: where one does, what the other
    arms gain is not shown to be their own doing, and the result says so."""
    until: Literal["training", "evaluation"] = "evaluation"
    """The last stage. `training` is enough where `pairs.heldout_fraction` holds out pairs to measure on."""
    vary: Vary | None = None
    """A setting (a `[vary]` table) in whose values each arm is run, held against the baseline with the same value."""
    all: Table = Field(default_factory=dict)
    """Changes to the base job that all arms have, as tables like those of a job."""
    arms: dict[str, Table] = Field(min_length=1)
    """Changes of each arm, by its name."""

    @model_validator(mode="after")
    def _check_names(self) -> Comparison:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline = {self.baseline!r} is no arm; the arms are {', '.join(self.arms)}")
        if unknown := [name for name in self.controls if name not in self.arms or name == self.baseline]:
            raise ValueError(
                f"controls: {unknown[0]!r} is no arm beside the baseline; the arms are {', '.join(self.arms)}"
            )
        wrong = [name for name in self.arms if not name.replace("-", "").replace("_", "").isalnum()]
        if wrong:
            raise ValueError(f"arm {wrong[0]!r}: a name has letters, digits, - and _")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is given twice")
        return self

    def of(self, part: Part) -> Comparison:
        """That part of the comparison, with the baseline in any case.

        Raises:
            InputError: there is no such arm, or no such value.
        """
        for arm in part.arms:
            if arm not in self.arms:
                meant = did_you_mean(arm, self.arms)
                raise InputError(f"--arm {arm}: no such arm{meant}; the arms are {', '.join(self.arms)}")
        changes: Table = {"until": part.until or self.until}
        if part.arms:
            kept = {*part.arms, self.baseline}
            changes["arms"] = {name: own for name, own in self.arms.items() if name in kept}
            changes["controls"] = [name for name in self.controls if name in kept]
        if part.values:
            changes["vary"] = _varying(self.vary, part.values)
        return self.model_copy(update=changes)

    @property
    def variants(self) -> list[Variant]:
        """The arms, each in every value of what varies."""
        values: list[float | None] = [*self.vary.values] if self.vary else [None]
        return [Variant(arm, value) for value, arm in product(values, self.arms)]

    @property
    def rivals(self) -> dict[str, str]:
        """Names of the variants, each with that of the baseline it is held against."""
        return {str(variant): str(Variant(self.baseline, variant.value)) for variant in self.variants}


@dataclass(frozen=True)
class Variant:
    """An arm with one value of the setting that varies, if one does."""

    arm: str
    value: float | None = None

    def __str__(self) -> str:
        return self.arm if self.value is None else f"{self.arm}@{short(self.value)}"

    def of(self, table: Table, comparison: Comparison) -> Table:
        """The base job's tables with its changes."""
        changed = merged(merged(table, comparison.all), comparison.arms[self.arm])
        return with_changes(changed, {comparison.vary.key: self.value}) if comparison.vary else changed


@dataclass(frozen=True)
class Part:
    """What of a comparison is wanted: all of it unless said."""

    arms: Collection[str] = ()
    """Only these and the baseline."""
    values: Collection[float] = ()
    """Only these of what varies."""
    until: Literal["training", "evaluation"] | None = None
    """Another last stage than the file's."""


def _varying(vary: Vary | None, values: Collection[float]) -> Vary | None:
    """What varies, in these of its values alone."""
    known = vary.values if vary else []
    for value in values:
        if value not in known:
            choices = f"the values are {', '.join(map(short, known))}" if known else "nothing varies"
            raise InputError(f"--value {short(value)}: {choices}")
    return vary and vary.model_copy(update={"values": [value for value in known if value in values]})


def short(value: float) -> str:
    """A number as the name of an arm has it: in few digits where they are the whole number, else in all."""
    text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    # No run may have a plus in its name; in an exponent it says nothing. Nor does the sign of zero.
    return text.replace("+", "") if value else "0"


def merged(table: Table, changes: Table) -> Table:
    """A table with the changes over it, section by section; the table itself stays as it is."""
    result = dict(table)
    for name, value in changes.items():
        known = result.get(name)
        result[name] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result
