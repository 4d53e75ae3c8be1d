"""What a judge judges by, one criterion at a time: a list in the job, or each prompt's own in a column."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rdpo.config import JudgeReward
from rdpo.preference.scores import finite_or_nan
from rdpo.records import Row, extra_of

KNOWN = {"name", "text", "weight"}
"""What a criterion of a column may say."""


@dataclass(frozen=True)
class Criteria:
    """Texts and weights by name; the weights sum to more than 0."""

    texts: Mapping[str, str]
    weights: Mapping[str, float]

    def mean(self, scores: Mapping[str, float]) -> float:
        """The weighted mean of their scores."""
        return sum(weight * scores[name] for name, weight in self.weights.items()) / sum(self.weights.values())


def criteria_of(reward: JudgeReward, row: Row) -> Criteria | None:
    """What a row is judged by; None: the rubric alone.

    Criteria of a column are known by their numbers, from 1 on: names that differ from prompt to prompt would make a
    column each in the tables of scores.

    Raises:
        ValueError: the column is empty, or not what it should be.
    """
    if reward.criteria:
        texts = {criterion.name: criterion.text for criterion in reward.criteria}
        return Criteria(texts, {criterion.name: criterion.weight for criterion in reward.criteria})
    if reward.criteria_column is None:
        return None
    try:
        return _read(extra_of(row).get(reward.criteria_column))
    except ValueError as error:
        raise ValueError(f"criteria_column `{reward.criteria_column}` {error}") from None


def _read(value: object) -> Criteria:
    """The criteria that a column holds: a list of texts or of tables with `text` and `weight`, or one text."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty")
    if isinstance(value, str):
        # A table of text alone, as CSV is, holds a list as JSON.
        value = _list_in(value) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, list) or not value:
        raise ValueError("is no list of criteria")

    texts: dict[str, str] = {}
    weights: dict[str, float] = {}
    for number, one in enumerate(value, 1):
        texts[str(number)], weights[str(number)] = _text_and_weight(one, number)
    if sum(weights.values()) <= 0:
        raise ValueError(f"has weights that sum to {sum(weights.values()):g}; they must sum to more than 0")
    return Criteria(texts, weights)


def _list_in(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("begins as a list and is not JSON") from None


def _text_and_weight(one: object, number: int) -> tuple[str, float]:
    if isinstance(one, str):
        one = {"text": one}
    if not isinstance(one, dict):
        raise ValueError(f"has a criterion {number} that is neither text nor a table")
    # A table of rows has every key in all of them, null where one does not say it.
    said = {name: value for name, value in one.items() if value is not None}
    if unknown := sorted(said.keys() - KNOWN):
        raise ValueError(f"has an unknown key `{unknown[0]}` in criterion {number}; there are text, weight and name")
    text, weight = said.get("text"), finite_or_nan(said.get("weight", 1.0))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"has no text in criterion {number}")
    if math.isnan(weight):
        raise ValueError(f"has a weight in criterion {number} that is no finite number")
    return text, weight
