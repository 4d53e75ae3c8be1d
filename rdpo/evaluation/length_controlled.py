"""The win rate that is left when both answers are equally long (length-controlled AlpacaEval, arXiv 2404.04475).

The probability of a win is logistic in the model's advantage and in how much longer its answer is,

    P(win) = sigmoid(theta + phi tanh(d / s)),    d = growth in length,  s = standard deviation of d,

fitted to all prompts; the length-controlled win rate is sigmoid(theta), what the fit says at d = 0. AlpacaEval has a
third term, the difficulty of each of its instructions, fitted over the models of its leaderboard; with two models on
prompts of one's own there is nothing to fit it to, and it is left out.

Nor is there what keeps AlpacaEval's phi in bounds, a baseline whose answers were made longer and shorter on purpose. So
the fit must not reach beyond what was seen: where nearly all answers grew, or nearly all shrank, there is no value. On
AlpacaEval's own annotations the values that are left are half a point from the published win rates, those that the
rule takes away 5 to 13 points (`jobs/bench/alpaca_eval.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from rdpo.evaluation.intervals import Estimate, Values, student

PENALTY = 1e-2
"""Of the squares of both coefficients: so weak that it only counts where wins can be told apart by length alone, and
the likelihood would grow without end."""
ROUNDS = 100
CLOSE = 1e-10
FEWEST = 8
"""Prompts below which two coefficients say nothing."""
SEEN = 0.2
"""The least share of answers that are as long or longer, and of those that are as long or shorter."""


def length_controlled(
    won: Values, growth: Values, groups: Sequence[Hashable] | None = None, seen: float = SEEN
) -> Estimate | None:
    """The win rate at equal length, with its 95% interval over prompts.

    None of fewer than eight prompts, and where nearly all answers are on one side of equal length.

    Args:
        won: 1 for a win of the trained model, half for a tie (n,).
        growth: by how much its answer is longer, in tokens (n,).
        groups: the prompt of each row; by default every row has its own.
        seen: the least share of answers on either side.
    """
    names = list(groups) if groups is not None else list(range(len(won)))
    places: dict[Hashable, int] = {}
    of_row = np.array([places.setdefault(name, len(places)) for name in names])
    if len(places) < FEWEST or min((growth <= 0).mean(), (growth >= 0).mean()) < seen:
        return None

    spread = float(growth.std())
    longer = np.tanh(growth / spread) if spread else np.zeros_like(growth)
    design = np.stack([np.ones_like(longer), longer], axis=1)
    theta, variance = _fitted(design, won, of_row)

    half = student(len(places) - 1) * math.sqrt(variance)
    return Estimate(_sigmoid(theta), _sigmoid(theta - half), _sigmoid(theta + half))


def _fitted(design: Values, won: Values, groups: NDArray[np.intp]) -> tuple[float, float]:
    """The advantage theta, and its variance, which heeds that rows of one prompt are alike.

    It is not below that of the model itself: where all prompts are won, they differ in nothing, and are no certainty.
    """
    weights = np.zeros(design.shape[1])
    for _ in range(ROUNDS):
        gradient, hessian = _derivatives(design, won, weights)
        step = np.linalg.solve(hessian, gradient)
        weights += step
        if np.abs(step).max() < CLOSE:
            break

    # The sandwich: the curvature on both sides of what the prompts' own gradients spread over.
    _, hessian = _derivatives(design, won, weights)
    residuals = design * (won - _sigmoids(design @ weights))[:, None]
    by_prompt = np.zeros((int(groups.max()) + 1, design.shape[1]))
    np.add.at(by_prompt, groups, residuals)
    count = len(by_prompt)
    inverse = np.linalg.inv(hessian)
    covariance = inverse @ (by_prompt.T @ by_prompt) @ inverse * count / (count - 1)
    return float(weights[0]), float(max(covariance[0, 0], inverse[0, 0]))


def _derivatives(design: Values, won: Values, weights: Values) -> tuple[Values, Values]:
    """Gradient of the penalised log-likelihood, and minus its Hessian."""
    likely = _sigmoids(design @ weights)
    gradient = design.T @ (won - likely) - PENALTY * weights
    hessian = (design * (likely * (1 - likely))[:, None]).T @ design + PENALTY * np.eye(len(weights))
    return gradient, hessian


def _sigmoids(logits: Values) -> Values:
    values: Values = 0.5 * (1 + np.tanh(0.5 * logits))
    return values


def _sigmoid(logit: float) -> float:
    return float(_sigmoids(np.array(logit)))
