"""95% intervals of means whose rows are not all independent: rows of one prompt, prompts of several seeds.

Rows of one prompt are alike, so the unit is the prompt, whatever number of rows it has. The variance of one run is the
cluster-robust one with the bias correction and the degrees of freedom of Bell and McCaffrey (Survey Methodology 28,
2002), here for a mean of clusters of unequal size; for one row a prompt it is Student's t.

Runs with several seeds on the same prompts have two sources of chance, prompts and seeds: y = mean + seed + prompt +
noise. Three seeds say little about how much seeds differ, so that a bootstrap of them, or an approximation by degrees
of freedom, covers too rarely. The half width is the narrower of two that cover: the quantile of the generalized pivot
(Weerahandi, Journal of the American Statistical Association 88, 1993), and Howe's combination of t intervals (Journal
of the American Statistical Association 69, 1974), not below the interval of the seeds' means. The first is too wide
where prompts differ, the second where they do not; how often they cover is what `tests/unit/test_intervals.py` prints.

The interval of a share is Wilson's with the variance of these (Dean and Pagano, Journal of Survey Statistics and
Methodology 3, 2015), so that it stays within 0 and 1 and 8 wins of 8 do not make a certainty.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rdpo.records import ID_COLUMN, Row, prompt_id

Values = NDArray[np.float64]
LEVEL = 0.95
NORMAL = 1.959964
"""Quantile of the normal distribution for a two-sided interval of `LEVEL`."""
DRAWS = 20_000


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95% interval; both are NaN where one prompt alone tells nothing of others."""

    mean: float
    low: float
    high: float


def groups_of(rows: Sequence[Row]) -> list[Hashable]:
    """What tells rows of one prompt from those of others: their messages, else the row's id, else its place."""
    return [
        prompt_id(row["prompt"]) if row.get("prompt") else row.get(ID_COLUMN, place) for place, row in enumerate(rows)
    ]


def mean_interval(values: Values, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values with its interval.

    Args:
        values: (n,) of one run, or (seeds, n) of several on the same rows, each row in its column.
        groups: the prompt of each row; by default every row has its own.
    """
    mean, half = _mean_and_half_width(_Clusters.of(values, groups))
    return Estimate(mean, mean - half, mean + half)


def share_interval(values: Values, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values between 0 and 1 (a win 1, a tie 0.5) with its interval; arguments as `mean_interval`."""
    clusters = _Clusters.of(values, groups)
    mean, half = _mean_and_half_width(clusters)
    flat, count = clusters.values.ravel(), len(clusters.weights)
    if np.ptp(flat) == 0:
        # Nothing varies, so only what was never seen can move the mean: at most so much of the prompts.
        unseen = NORMAL**2 / (count + NORMAL**2)
        return Estimate(mean, mean * (1 - unseen), mean * (1 - unseen) + unseen)

    # What is asked of independent rows is the normal quantile, as Wilson's interval has it, not Student's.
    independent = clusters.rows * len(clusters.values)
    correction = (NORMAL / student(independent - 1)) ** 2 * (independent - 1) / independent
    spread = mean * (1 - mean)
    ratio = NORMAL**2 / count if math.isnan(half) or not spread else correction * half**2 / spread
    return _wilson(mean, ratio)


def wins(ours: Values, theirs: Values) -> Values:
    """1 where ours is above theirs, half for a tie."""
    won: Values = (ours > theirs) + 0.5 * (ours == theirs)
    return won


def _wilson(mean: float, ratio: float) -> Estimate:
    """All shares p with (mean - p)^2 <= ratio * p * (1 - p)."""
    middle = (mean + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio * mean * (1 - mean) + ratio**2 / 4) / (1 + ratio)
    return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True)
class _Clusters:
    """Means of each prompt's rows (seeds, prompts), the share of rows of each prompt, means of all rows (seeds,)."""

    values: Values
    weights: Values
    by_seed: Values
    rows: int

    @classmethod
    def of(cls, values: Values, groups: Sequence[Hashable] | None) -> _Clusters:
        table = np.atleast_2d(np.asarray(values, dtype=float))
        rows = table.shape[1]
        if groups is None:
            return cls(table, np.full(rows, 1 / rows), table.mean(axis=1), rows)

        places: dict[Hashable, int] = {}
        of_row = np.array([places.setdefault(group, len(places)) for group in groups])
        sizes = np.bincount(of_row)
        sums = np.array([np.bincount(of_row, run) for run in table])
        return cls(sums / sizes, sizes / rows, table.mean(axis=1), rows)


def _mean_and_half_width(clusters: _Clusters) -> tuple[float, float]:
    weights, by_seed = clusters.weights, clusters.by_seed
    mean = float(by_seed.mean())
    if len(weights) < 2:
        return mean, math.nan

    # What differs from prompt to prompt, whatever the seed.
    by_prompt = clusters.values.mean(axis=0)
    scale, freedom = _correction(weights)
    prompts = float(scale * np.square(weights * (by_prompt - mean)).sum())
    seeds = len(by_seed)
    if seeds == 1:
        return mean, student(freedom) * math.sqrt(prompts)

    # What is left of a value once its prompt and its seed are accounted for.
    residual = clusters.values - by_seed[:, None] - by_prompt + mean
    noise = float(scale * np.square(weights * residual).sum()) / (seeds * (seeds - 1))
    return mean, _two_way(prompts, float(by_seed.var(ddof=1)) / seeds, noise, freedom, seeds - 1)


def _two_way(prompts: float, seeds: float, noise: float, prompts_freedom: float, seeds_freedom: float) -> float:
    """Half width from three squared standard errors of the mean, by what is averaged: prompts, seeds, and the noise.

    Both of the first hold the noise too, so that the variance of the mean is expected at prompts + seeds - noise.
    """
    freedoms = (prompts_freedom, seeds_freedom, prompts_freedom * seeds_freedom)
    t_prompts, t_seeds, t_noise = map(student, freedoms)
    pivots = _pivots(*freedoms)
    drawn = np.maximum(prompts * pivots[0] + seeds * pivots[1] - noise * pivots[2], 0)
    generalized = float(np.quantile(np.sqrt(drawn) * pivots[3], LEVEL))

    # The variance between seeds beyond what noise alone would show; an estimate of it can turn out negative.
    excess = max(seeds - noise, 0.0)
    combined = math.sqrt(max(t_seeds**2 * excess + t_prompts**2 * prompts, t_seeds**2 * seeds))
    # Where all means turn out equal, the noise that was seen is still there.
    return min(generalized, combined) or t_noise * math.sqrt(noise)


@lru_cache(maxsize=64)
def _pivots(*freedoms: float) -> list[Values]:
    """Draws of freedom / chi-square for each variance, and of |z|; always the same."""
    # One seed for all: the same figures must have the same interval in every report.
    generator = np.random.default_rng(0)
    ratios = [freedom / generator.chisquare(freedom, DRAWS) for freedom in freedoms]
    return [*ratios, np.abs(generator.standard_normal(DRAWS))]


def _correction(weights: Values) -> tuple[float, float]:
    """What makes the sum of squared weighted deviations an unbiased variance, and its degrees of freedom.

    For k equal weights these are k / (k - 1) and k - 1. In general, with independent cluster means of one variance,
    the sum is the quadratic form of A = (I - w1') D (I - 1w') with D = diag(w^2), and the degrees of freedom are
    tr(A)^2 / tr(A^2) (Satterthwaite).
    """
    # Written out for the traces, since A itself has prompts x prompts entries.
    squares = weights**2
    total = squares.sum()
    trace = float((squares * (1 - 2 * weights + total)).sum())
    cross = float(weights @ squares)

    of_square = (
        (squares**2).sum()
        + 2 * cross**2
        + 2 * total * (squares @ squares)
        + total**4
        - 4 * (squares**2 @ weights)
        + 2 * total * (squares @ squares)
        - 4 * total * cross * total
    )

    return total / trace, trace**2 / float(of_square)


def student(freedom: float) -> float:
    """Student's t that a two-sided interval of `LEVEL` has with these degrees of freedom, at least one."""
    from scipy.special import stdtrit

    return float(stdtrit(max(freedom, 1.0), (1 + LEVEL) / 2))


def with_interval(estimate: Estimate, form: str) -> str:
    """A mean with its interval as text."""
    if math.isnan(estimate.low):
        return f"{estimate.mean:{form}} (no interval)"
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
