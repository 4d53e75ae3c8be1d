"""Scores in the rows: `NAME_scores` by reward for each answer column NAME, and their weighted sum `NAME_score`.

A score that is put together of parts (a judge's criteria, a model's outputs) has these beside it, as `REWARD.PART`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from rdpo.records import Row, alive, drop, table_of

REASON_CHARS = 300
PART = "."
"""Between a reward's name and that of a part of its score; no reward has it in its name."""


@dataclass(frozen=True)
class Composed:
    """A score with the parts that it is put together of."""

    score: float
    parts: Mapping[str, float]

    def named(self, reward: str) -> dict[str, float]:
        """All of it, as it stands in a row."""
        return {reward: self.score, **{f"{reward}{PART}{name}": value for name, value in self.parts.items()}}


Score = float | Composed


def finite_or_nan(value: object) -> float:
    """A number out of JSON, which may be of any size; NaN where it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def record_scores(rows: list[Row], answer: str, reward: str, scores: Sequence[Score]) -> list[Row]:
    """Rows with one reward's scores of one answer; a score that is no finite number drops the row."""
    recorded = []
    for row, score in zip(rows, scores, strict=True):
        found = score.named(reward) if isinstance(score, Composed) else {reward: score}
        if alive(row) and not math.isfinite(found[reward]):
            row = drop(row, f"reward {reward}: score of {answer} is not a finite number")
        row[f"{answer}_scores"] = {**(row.get(f"{answer}_scores") or {}), **found}
        recorded.append(row)
    return recorded


async def with_scores(row: Row, answers: Sequence[str], reward: str, scores: Awaitable[Sequence[Score]]) -> Row:
    """The row with one reward's scores of its answers; where that cannot be asked for them, it is dropped."""
    found: Sequence[Score]
    try:
        found = await scores
    except ValueError as error:
        row, found = drop(row, f"reward {reward}: {error}"[:REASON_CHARS]), [math.nan] * len(answers)
    for answer, score in zip(answers, found, strict=True):
        [row] = record_scores([row], answer, reward, [score])
    return row


def combine_table(table: pa.Table, weights: dict[str, float], answers: list[str]) -> pa.Table:
    """Add `NAME_score`, the weighted sum of an answer's scores; 0 where nothing scored it."""
    rows = table.to_pylist()
    for row in rows:
        for answer in answers:
            scores = row.setdefault(f"{answer}_scores", None) or {}
            row[f"{answer}_score"] = sum(weight * scores.get(name, 0.0) for name, weight in weights.items() if weight)
    return table_of(rows)
