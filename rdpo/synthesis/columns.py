"""The columns that a source has, and those that are needed of it, each by the setting of the job that asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.records import SIDES

PROMPTS = "prompts.source"
"""The setting that names the source of the prompts; other sections have sources of their own."""


class Needed(NamedTuple):
    """A column that a source must have, under one of these names; the setting that asks for it."""

    names: tuple[str, ...]
    setting: str
    why: str = ""


@dataclass(frozen=True)
class Reading:
    """How a source is read: the setting that names it, and the columns that it must have.

    `place` is what the rows of a data set of the hub are known by, where that is not its name.
    """

    setting: str
    needed: tuple[Needed, ...]
    place: str | None = None

    @classmethod
    def of_prompts(cls, job: Job, number: int | None = None, place: str | None = None) -> Reading:
        """The job's own source; or the one of several that has this number."""
        if number is None:
            return cls(PROMPTS, needed_columns(job))
        setting = f"prompts.sources.{number}"
        return cls(setting, needed_columns(job, setting, f"{setting}.column"), place)


def needed_columns(job: Job, source: str = PROMPTS, column: str = "prompts.column") -> tuple[Needed, ...]:
    """The columns that a source of prompts must have: the prompt, or of ready pairs both answers too.

    Args:
        job: the job; its `prompts` are those of this source alone.
        source: the setting that names the source.
        column: the setting that names its column with the prompt.
    """
    if job.synthesis.task is None:
        why = "a preference data set needs it, a source of prompts synthesis.task"
        return pair_columns(job.prompts.column, column, source, why)
    return (Needed((job.prompts.column,), column),)


def pair_columns(
    column: str, setting: str, source: str, why: str = "a preference data set needs it"
) -> tuple[Needed, ...]:
    """The columns of a preference data set: a prompt, unless both sides begin with it, and both sides.

    Args:
        column: where the prompt stands, if it has a column of its own.
        setting: the setting that names this column.
        source: the setting that names the source.
        why: why both sides are needed, for the message.
    """
    return (Needed((column, SIDES[0]), setting), *(Needed((side,), source, why) for side in SIDES))


def columns_of(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """The columns that any of the rows has, in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def check_columns(source: str, rows: Sequence[Mapping[str, object]], needed: Sequence[Needed]) -> None:
    """Look for the needed columns, each under one of its names, in the rows near a source's beginning.

    Raises:
        InputError: none of the rows has it.
    """
    columns = columns_of(rows)
    for one in needed:
        if not set(one.names) & set(columns):
            why = f"; {one.why}" if one.why else ""
            has = ", ".join(map(repr, columns))
            raise InputError(f"{one.setting}: {source} has no column `{one.names[0]}`; it has {has}{why}")

    prompt = needed[0]
    if prompt.names[0] not in columns and all(_is_plain_text(row.get(SIDES[0])) for row in rows):
        raise InputError(
            f"{prompt.setting}: {source} has no column `{prompt.names[0]}`, and `chosen` is text; write the prompt in "
            "a column of its own, or both sides as lists of messages"
        )


def _is_plain_text(value: object) -> bool:
    """Whether it is text that cannot be messages written as text."""
    return isinstance(value, str) and not value.lstrip().startswith("[")
