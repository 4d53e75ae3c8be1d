"""The columns that a source has, and those that a job needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.records import SIDES


def needed_columns(job: Job) -> list[list[str]]:
    """The columns that the source must have, one of each list."""
    if job.synthesis.task is None:
        return [[job.prompts.column, "chosen"], ["chosen"], ["rejected"]]
    return [[job.prompts.column]]


def columns_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The columns that any of the rows has, in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def check_columns(source: str, rows: Sequence[dict[str, Any]], needed: Sequence[Sequence[str]]) -> None:
    """Look for the needed columns, one of each choice, in the rows near a source's beginning.

    Raises:
        InputError: none of them has it.
    """
    columns = columns_of(rows)
    for choice in needed:
        if not set(choice) & set(columns):
            raise _no_such_column(source, choice[0], columns)

    prompt = needed[0][0]
    if prompt not in columns and all(_is_plain_text(row.get("chosen")) for row in rows):
        raise InputError(
            f"prompts.column: {source} has no column `{prompt}`, and `chosen` is text; write the prompt in a column of "
            "its own, or both sides as lists of messages"
        )


def _is_plain_text(value: Any) -> bool:
    """Whether it is text that cannot be messages written as text."""
    return isinstance(value, str) and not value.lstrip().startswith("[")


def _no_such_column(source: str, column: str, columns: list[str]) -> InputError:
    has = f"{source} has no column `{column}`; it has {', '.join(map(repr, columns))}"
    if column in SIDES:
        return InputError(f"prompts.source: {has}; a preference data set needs it, a source of prompts synthesis.task")
    return InputError(f"prompts.column: {has}")
