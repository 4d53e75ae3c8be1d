"""Answers that come with the prompts: a ready preference data set in place of synthesis.

In: rows of prompts whose `extra` holds `chosen` and `rejected` (text, or messages that end with the
assistant's), perhaps `score_chosen` and `score_rejected`. Out: the columns that synthesis would give,
and the scores as a reward named `given`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.config import Job
from rdpo.records import SIDES, Messages, Row, alive, digest, drop, extra_of, prompt_id, table_of

if TYPE_CHECKING:
    import ray.data

REWARD = "given"


def with_prompt(raw: dict[str, Any], column: str) -> dict[str, Any]:
    """The raw row with its prompt: its own, or what stands before the last message of `chosen`."""
    chosen = raw.get("chosen")
    if raw.get(column) is None and isinstance(chosen, list) and len(chosen) > 1:
        return {**raw, column: chosen[:-1]}
    return raw


def pair_id(messages: Messages, raw: dict[str, Any]) -> str:
    """Identity of a pair: a hash of the prompt and both answers, since a prompt may have several pairs."""
    return digest(prompt_id(messages), [str(raw.get(side)) for side in SIDES])


def given_answers(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Add both answers to the rows of prompts, or drop them with a reason."""
    return rows.map_batches(_answers_table, batch_format="pyarrow")


def _answers_table(table: pa.Table) -> pa.Table:
    return table_of([answered(row) for row in table.to_pylist()])


def answered(row: Row) -> Row:
    """One row with the columns of both answers."""
    given = extra_of(row)
    row = {**row, "dropped": None}
    for side in SIDES:
        text, reason = _answer(given.get(side))
        row |= {side: text, f"{side}_finish_reason": "stop", f"{side}_tokens": 0, f"{side}_scores": None}
        row = drop(row, f"{side}: {reason}") if reason else row
    return _scored(row, given)


def _answer(value: Any) -> tuple[str, str | None]:
    """The assistant's words of one side; with the reason if there are none."""
    if isinstance(value, list) and value:
        last = value[-1]
        if not isinstance(last, dict) or last.get("role") != "assistant":
            return "", "its last message is not the assistant's"
        value = last.get("content")
    if not isinstance(value, str):
        return "", "neither text nor a list of messages"
    return value.strip(), None if value.strip() else "empty"


def _scored(row: Row, given: dict[str, Any]) -> Row:
    """The row with the data set's own scores, if it has both."""
    scores = [given.get(f"score_{side}") for side in SIDES]
    if any(score is None for score in scores):
        return row
    for side, score in zip(SIDES, scores, strict=True):
        number = float(score) if isinstance(score, int | float) else math.nan
        if not math.isfinite(number) and alive(row):
            row = drop(row, f"score_{side} is not a finite number")
        row[f"{side}_scores"] = {REWARD: number}
    return row
