"""Best and worst of several samples, with longer answers held back (DICE, arXiv 2406.09760, Section 3.2).

An answer counts score - alpha * length. Alpha is found for all rows at once, so that chosen answers are on average
as long as rejected ones. The paper speaks of a random search for the smallest mean absolute difference; its code, and
this, scans upwards for the smallest absolute value of the mean signed difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP = 0.001
END = 1.0

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Shaping:
    """The coefficient that was found, and the mean length gap (chosen minus rejected) that it leaves."""

    length_coef: float
    mean_length_gap: float


def best_and_worst(scores: Values, lengths: Values, length_coef: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Index of the best and of the worst sample of each row; of equals the first.

    Args:
        scores: scores (rows, samples); NaN where a sample is not usable, at least one in each row is.
        lengths: lengths (rows, samples).
        length_coef: what a unit of length costs.
    """
    shaped = scores - length_coef * lengths
    return np.nanargmax(shaped, axis=1), np.nanargmin(shaped, axis=1)


def mean_length_gap(scores: Values, lengths: Values, length_coef: float) -> float:
    """Mean of the best sample's length minus the worst's."""
    best, worst = best_and_worst(scores, lengths, length_coef)
    rows = np.arange(len(scores))
    return float((lengths[rows, best] - lengths[rows, worst]).mean())


def find_length_coef(scores: Values, lengths: Values) -> Shaping:
    """Scan from 0 in steps of 0.001, below 1, as DICE's code does.

    The scan ends where the absolute gap is above the smallest seen so far; that smallest one's coefficient is the
    answer.
    """
    best = Shaping(0.0, mean_length_gap(scores, lengths, 0.0))
    for coefficient in np.arange(STEP, END, STEP):
        gap = mean_length_gap(scores, lengths, float(coefficient))
        if abs(gap) > abs(best.mean_length_gap):
            break
        if abs(gap) < abs(best.mean_length_gap):
            best = Shaping(round(float(coefficient), 6), gap)
    return best


def matrix(rows: Sequence[Sequence[float]]) -> Values:
    """Rows of possibly different length as one array, NaN where a row has no more."""
    wide = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for index, row in enumerate(rows):
        wide[index, : len(row)] = row
    return wide
