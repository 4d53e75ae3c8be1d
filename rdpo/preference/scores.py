"""Scores in the rows: `NAME_scores` by reward for each answer column NAME, and their weighted sum `NAME_score`."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence

import pyarrow as pa

from rdpo.records import Row, alive, drop, table_of

REASON_CHARS = 300


def record_scores(rows: list[Row], answer: str, reward: str, scores: list[float]) -> list[Row]:
    """Rows with one reward's scores of one answer; a score that is no finite number drops the row."""
    recorded = []
    for row, score in zip(rows, scores, strict=True):
        if alive(row) and not math.isfinite(score):
            row = drop(row, f"reward {reward}: score of {answer} is not a finite number")
        row[f"{answer}_scores"] = {**(row.get(f"{answer}_scores") or {}), reward: score}
        recorded.append(row)
    return recorded


async def with_scores(row: Row, answers: Sequence[str], reward: str, scores: Awaitable[Sequence[float]]) -> Row:
    """The row with one reward's scores of its answers; where that cannot be asked for them, it is dropped."""
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
