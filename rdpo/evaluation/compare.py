"""Start model against trained model on the same held-out prompts, with intervals.

Every interval is at 95%, over prompts; that of a difference is paired (see `rdpo.evaluation.intervals`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from rdpo.evaluation.intervals import Estimate, Values, groups_of, mean_interval, share_interval, wins
from rdpo.evaluation.length_controlled import length_controlled
from rdpo.records import Row

Pick = Callable[[Row], float]
"""Takes a number out of an evaluated row."""
MODELS = ("start", "trained")
"""The two models that are compared, in the names of their columns."""
DRAWN = "drawn"
"""The column of the trained model's answer that KL is measured on."""
KL_ANSWERS = "kl_answers"
"""In the summary of an evaluation: on how many answers its KL was measured, drawn for that at temperature 1. Runs of
versions that took the log-ratio of the compared answers, however they were drawn, do not have it."""

LOG_RATIO = "log-ratio of the compared answers"
"""What those versions called KL."""


@dataclass(frozen=True)
class RewardComparison:
    """One reward's verdict over n rows; a tie counts as half a win."""

    reward: str
    weight: float
    start_mean: float
    trained_mean: float
    difference: Estimate
    win_rate: Estimate
    wins: int
    ties: int
    losses: int
    length_controlled: Estimate | None = None


def compare_rewards(
    name: str,
    weight: float,
    start: Values,
    trained: Values,
    groups: Sequence[Hashable] | None = None,
    growth: Values | None = None,
) -> RewardComparison:
    """Compare paired scores of the two models under one reward.

    Args:
        name: the reward's.
        weight: its weight in the optimised score.
        start: scores of the start model's answers (n,).
        trained: those of the trained model's.
        groups: the prompt of each row; by default every row has its own.
        growth: by how many tokens the trained model's answer is longer (n,), for the win rate at equal length.
    """
    won = wins(trained, start)
    return RewardComparison(
        reward=name,
        weight=weight,
        start_mean=float(start.mean()),
        trained_mean=float(trained.mean()),
        difference=mean_interval(trained - start, groups),
        win_rate=share_interval(won, groups),
        wins=int((won == 1).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won == 0).sum()),
        length_controlled=None if growth is None else length_controlled(won, growth, groups),
    )


def summarize(rows: list[Row], weights: dict[str, float]) -> dict[str, Any]:
    """The evaluation of a run: each reward's comparison, the combined score's, KL, lengths, stop rates.

    Args:
        rows: evaluated rows with `start`, `trained`, their `_scores`, `_score`, `_tokens`,
            `_finish_reason`, and `kl`.
        weights: weight of each reward by name; 0 for those that were only measured.
    """
    if not rows:
        return {"prompts": 0, "rewards": []}
    groups = groups_of(rows)

    def column(pick: Pick) -> Values:
        return np.array([pick(row) for row in rows], dtype=float)

    growth = column(_tokens(MODELS[1])) - column(_tokens(MODELS[0]))

    def compared(name: str, weight: float, score_of: Callable[[str], Pick]) -> dict[str, Any]:
        start, trained = (column(score_of(model)) for model in MODELS)
        return asdict(compare_rewards(name, weight, start, trained, groups, growth))

    rewards = [compared(name, weight, partial(_score_by, name)) for name, weight in weights.items()]
    # Without any weight nothing was optimised, and the weighted score is 0 everywhere.
    optimised = compared("optimised", 1.0, _weighted_score) if any(weights.values()) else None
    return {
        "prompts": len(set(groups)),
        "rows": len(rows),
        "optimised": optimised,
        "rewards": rewards,
        **divergence(rows),
        "length": {model: asdict(mean_interval(column(_tokens(model)), groups)) for model in MODELS},
        "stop_rate": {model: asdict(share_interval(column(_stopped(model)), groups)) for model in MODELS},
    }


def measures_kl(row: Row) -> bool:
    """Whether the row's `kl` is that of an answer drawn for it; in rows of earlier versions it is of another one."""
    return row.get("kl") is not None and row.get(f"{DRAWN}_tokens") is not None


def divergence(rows: Sequence[Row]) -> dict[str, Any]:
    """KL of the trained model from its start in nats per answer, with its interval, and on how many answers."""
    drawn = [row for row in rows if measures_kl(row)]
    if not drawn:
        return {"kl": None}
    estimate = mean_interval(np.array([row["kl"] for row in drawn]), groups_of(drawn))
    return {"kl": asdict(estimate), KL_ANSWERS: len(drawn)}


def _score_by(reward: str, model: str) -> Pick:
    return lambda row: row[f"{model}_scores"][reward]


def _weighted_score(model: str) -> Pick:
    return lambda row: row[f"{model}_score"]


def _tokens(model: str) -> Pick:
    return lambda row: row[f"{model}_tokens"]


def _stopped(model: str) -> Pick:
    return lambda row: float(row[f"{model}_finish_reason"] == "stop")
