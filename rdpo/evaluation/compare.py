"""Start model against trained model on the same held-out prompts, with intervals.

Every interval is a 95% percentile interval of a paired bootstrap over prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpo.records import Row

RESAMPLES = 10_000
DRAWN_AT_ONCE = 10_000_000
"""Values, so that memory does not grow with their number."""
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RewardComparison:
    """One reward's verdict over n prompts; a tie counts as half a win."""

    reward: str
    weight: float
    start_mean: float
    trained_mean: float
    difference: Estimate
    win_rate: Estimate
    wins: int
    ties: int
    losses: int


def bootstrap(values: Values, seed: int) -> Estimate:
    """Mean of values (n,) with its paired-bootstrap interval."""
    generator, count = np.random.default_rng(seed), len(values)
    at_once = max(1, DRAWN_AT_ONCE // count)
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    means = [values[generator.integers(0, count, (size, count))].mean(axis=1) for size in sizes]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def compare_rewards(name: str, weight: float, start: Values, trained: Values, seed: int) -> RewardComparison:
    """Compare paired scores (n,) of the two models under one reward."""
    wins = np.where(trained > start, 1.0, np.where(trained == start, 0.5, 0.0))
    return RewardComparison(
        reward=name,
        weight=weight,
        start_mean=float(start.mean()),
        trained_mean=float(trained.mean()),
        difference=bootstrap(trained - start, seed),
        win_rate=bootstrap(wins, seed),
        wins=int((wins == 1).sum()),
        ties=int((wins == 0.5).sum()),
        losses=int((wins == 0).sum()),
    )


def summarize(rows: list[Row], weights: dict[str, float], seed: int) -> dict[str, Any]:
    """The evaluation of a run: each reward's comparison, the combined score's, KL, lengths, stop rates.

    Args:
        rows: evaluated rows with `start`, `trained`, their `_scores`, `_score`, `_tokens`,
            `_finish_reason`, and `kl`.
        weights: weight of each reward by name; 0 for those that were only measured.
        seed: seed of the bootstrap.
    """
    if not rows:
        return {"prompts": 0, "rewards": []}

    def column(pick: Callable[[Row], float]) -> Values:
        return np.array([pick(row) for row in rows], dtype=float)

    comparisons = [
        compare_rewards(
            name,
            weight,
            column(lambda row, name=name: row["start_scores"][name]),  # type: ignore[misc]
            column(lambda row, name=name: row["trained_scores"][name]),  # type: ignore[misc]
            seed,
        )
        for name, weight in weights.items()
    ]
    start, trained = (column(lambda row, side=side: row[f"{side}_score"]) for side in ("start", "trained"))  # type: ignore[misc]
    optimised = compare_rewards("optimised", 1.0, start, trained, seed) if any(weights.values()) else None
    kl = np.array([row["kl"] for row in rows if row.get("kl") is not None], dtype=float)
    return {
        "prompts": len(rows),
        "optimised": asdict(optimised) if optimised else None,
        "rewards": [asdict(comparison) for comparison in comparisons],
        "kl": asdict(bootstrap(kl, seed)) if len(kl) else None,
        "length": {side: asdict(bootstrap(column(_tokens(side)), seed)) for side in ("start", "trained")},
        "stop_rate": {side: asdict(bootstrap(column(_stopped(side)), seed)) for side in ("start", "trained")},
    }


def _tokens(side: str) -> Callable[[Row], float]:
    return lambda row: row[f"{side}_tokens"]


def _stopped(side: str) -> Callable[[Row], float]:
    return lambda row: float(row[f"{side}_finish_reason"] == "stop")


def with_interval(estimate: Estimate, form: str) -> str:
    """A mean with its interval as text."""
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
