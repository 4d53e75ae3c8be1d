"""Answers that come with the prompts: a ready preference data set in place of synthesis.

In: rows of prompts whose `extra` holds the text of both answers, `chosen` and `rejected` (see
`rdpo.synthesis.conversation`), perhaps `score_chosen` and `score_rejected`. Out: the columns that synthesis would
give, and the scores as a reward named `given`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.config import Job
from rdpo.records import SIDES, Messages, Row, alive, digest, drop, extra_of, prompt_id, table_of

if TYPE_CHECKING:
    import ray.data

REWARD = "given"
REASONING, WHOLE = "_reasoning", "_messages"
"""Behind a side's name: the reasoning before its answer, and JSON of its messages where they are more than a text."""
READS_TEXT = frozenset({"function"})
"""Kinds of rewards that are given a text with the calls, and the row with the messages."""


def pair_id(messages: Messages, answers: dict[str, str]) -> str:
    """Identity of a pair: a hash of the prompt and both answers, since a prompt may have several pairs.

    With reasoning before the answers (`chosen_reasoning`, `rejected_reasoning`) it is a hash of that too, and so it is
    of whole messages.
    """
    beside = [f"{side}{end}" for end in (REASONING, WHOLE) for side in SIDES]
    names = [*SIDES, *(name for name in beside if name in answers)]
    return digest(prompt_id(messages), [answers[name] for name in names])


def given_answers(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Add both answers to the rows of prompts, or drop them with a reason."""
    arguments: dict[str, Any] = {"reasoning": job.synthesis.reasoning != "off"}
    arguments["readers"] = [reward.name for reward in job.rewards if reward.kind not in READS_TEXT]
    return rows.map_batches(_answers_table, fn_kwargs=arguments, batch_format="pyarrow")


def _answers_table(table: pa.Table, reasoning: bool, readers: Sequence[str]) -> pa.Table:
    return table_of([answered(row, reasoning, readers) for row in table.to_pylist()])


def answered(row: Row, reasoning: bool = False, readers: Sequence[str] = ()) -> Row:
    """One row with the columns of both answers, and of the reasoning before them where it was told apart.

    `readers` are rewards that would read an answer with calls as a text with braces; such rows are dropped.
    """
    given = extra_of(row)
    row = {**row, "dropped": None}
    for side in SIDES:
        row |= {side: given[side], f"{side}_finish_reason": "stop", f"{side}_tokens": 0, f"{side}_scores": None}
        if reasoning:
            row[f"{side}{REASONING}"] = given[f"{side}{REASONING}"]
        row |= {name: given[name] for name in (f"{side}{WHOLE}",) if name in given}
        if readers and f"{side}{WHOLE}" in given:
            reason = f"{side} calls tools or is of several messages, which the reward {readers[0]} cannot read"
            row = drop(row, f"{reason}; remove the reward, or give one of kind function")
    return _scored(row, given)


def _scored(row: Row, given: Row) -> Row:
    """The row with the data set's own scores, if it has both."""
    scores = [given.get(f"score_{side}") for side in SIDES]
    # In a CSV file what is missing is an empty text.
    if any(score is None or score == "" for score in scores):
        return row
    for side, score in zip(SIDES, scores, strict=True):
        number = _number(score)
        if not math.isfinite(number) and alive(row):
            row = drop(row, f"score_{side} is not a finite number")
        row[f"{side}_scores"] = {REWARD: number}
    return row


def _number(score: object) -> float:
    """A score as a number, also out of a file in which all is text; NaN if it is none."""
    if isinstance(score, bool) or not isinstance(score, int | float | str):
        return math.nan
    try:
        return float(score)
    except ValueError:
        return math.nan
