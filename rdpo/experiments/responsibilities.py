"""Which type each annotator is of: the E step of EM-DPO (arXiv 2405.15065), in float64 and in logarithms.

    gamma_uk = eta_k prod_j P_k(order of row j of annotator u) / the same summed over the types,   eta_k = mean gamma_uk

P_k is the likelihood of an order of answers under the policy of type k. The shares eta of an E step are the means of
the responsibilities gamma that the policies were trained with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Expectation:
    """The responsibilities (annotator, type) of an E step, and the log-likelihood of all orders in nats."""

    responsibilities: Floats
    log_likelihood: float


def first_responsibilities(annotators: int, types: int, seed: int) -> Floats:
    """Random responsibilities (annotator, type) to begin with, uniform over all mixtures of the types.

    Equal ones would stay equal for ever: all types would be trained alike.
    """
    return np.random.default_rng([seed, annotators, types]).dirichlet(np.ones(types), annotators)


def shares(responsibilities: Floats) -> Floats:
    """eta (type,): how large a part of the annotators each type has."""
    found: Floats = responsibilities.mean(0)
    return found


def expectation(row_logps: Floats, owners: Integers, eta: Floats, annotators: int) -> Expectation:
    """The E step.

    Args:
        row_logps: log P_k of the order of each row, (row, type).
        owners: the annotator of each row, (row,), numbered from 0.
        eta: the types' shares, (type,); a type without any is given nobody.
        annotators: how many there are.
    """
    joint = np.zeros((annotators, len(eta)))
    np.add.at(joint, owners, row_logps)
    with np.errstate(divide="ignore"):
        joint += np.log(eta)

    # Products of many rows would underflow; their logarithms are added with the largest taken out.
    evidence = np.logaddexp.reduce(joint, axis=1)
    return Expectation(np.exp(joint - evidence[:, None]), float(evidence.sum()))


def row_weights(responsibilities: Floats, owners: Integers) -> Floats:
    """What each row weighs in the M step of each type, (row, type): its annotator's gamma, over the mean of all rows.

    The M step's optimum does not depend on that constant. With it learning rate and clipping mean for each type what
    they mean in a training without weights, and equal responsibilities are weights of all ones.
    """
    weights: Floats = responsibilities[owners]
    means = weights.mean(0)
    normalised: Floats = np.divide(weights, means, out=np.zeros_like(weights), where=means > 0)
    return normalised


def doubt(responsibilities: Floats) -> float:
    """The mean entropy of the annotators' responsibilities, over its largest value: 0 is certainty, 1 none at all."""
    known = np.where(responsibilities > 0, responsibilities, 1.0)
    entropies = -(known * np.log(known)).sum(1)
    return float(entropies.mean()) / math.log(responsibilities.shape[1])
