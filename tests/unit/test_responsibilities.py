"""The E step of EM-DPO against values worked out by hand, and where products of probabilities would be 0."""

import math

import numpy as np
import pytest

from rdpo.experiments.responsibilities import (
    doubt,
    expectation,
    first_responsibilities,
    row_weights,
    shares,
)


def log_order(*rewards):
    """log of Plackett and Luce's probability of answers with these implicit rewards, the first of them preferred."""
    return sum(z - math.log(sum(map(math.exp, rewards[rank:]))) for rank, z in enumerate(rewards))


def test_pairs_of_one_row_each_by_hand():
    """sigma(1) under one type and sigma(-1) under the other: 0.7310586 and 0.2689414, shares 1/4 and 3/4."""
    logps = np.array([[math.log(0.7310585786300049), math.log(0.2689414213699951)]])
    found = expectation(logps, np.array([0]), np.array([0.25, 0.75]), 1)
    # 0.25 * 0.7310586 = 0.1827646 of 0.1827646 + 0.75 * 0.2689414 = 0.3844707
    assert found.responsibilities[0] == pytest.approx([0.47536688, 0.52463312], abs=1e-8)
    assert found.log_likelihood == pytest.approx(math.log(0.38447071), abs=1e-7)


def test_groups_of_three_by_hand():
    """Rewards 2, 1, 0 under one type and 0, 1, 2 under the other: e^2/(e^2+e+1) e/(e+1), and its opposite."""
    e = math.e
    one = e**2 / (e**2 + e + 1) * e / (e + 1)
    other = 1 / (1 + e + e**2) * e / (e + e**2)
    assert (one, other) == pytest.approx((0.66524096 * 0.73105858, 0.09003057 * 0.26894142), abs=1e-8)
    logps = np.array([[log_order(2.0, 1.0, 0.0), log_order(0.0, 1.0, 2.0)]])
    found = expectation(logps, np.array([0]), np.array([0.5, 0.5]), 1)
    assert found.responsibilities[0] == pytest.approx([one / (one + other), other / (one + other)], rel=1e-12)


def test_several_rows_of_an_annotator_are_multiplied():
    likely = np.array([[0.5, 0.25], [0.8, 0.1], [0.2, 0.9]])
    found = expectation(np.log(likely), np.array([1, 0, 1]), np.array([0.6, 0.4]), 2)
    first, second = (0.6 * 0.8, 0.4 * 0.1), (0.6 * 0.5 * 0.2, 0.4 * 0.25 * 0.9)
    assert found.responsibilities[0] == pytest.approx(np.array(first) / sum(first), rel=1e-12)
    assert found.responsibilities[1] == pytest.approx(np.array(second) / sum(second), rel=1e-12)
    assert found.log_likelihood == pytest.approx(math.log(sum(first)) + math.log(sum(second)), rel=1e-12)


def test_many_rows_do_not_underflow():
    """The product of 10,000 probabilities of e^-50 is 0 in float64; what tells the types apart is half a nat in all."""
    rows = 10_000
    logps = np.full((rows, 2), -50.0)
    logps[0, 0] += 0.5
    found = expectation(logps, np.zeros(rows, int), np.array([0.5, 0.5]), 1)
    expected = 1 / (1 + math.exp(-0.5))
    assert found.responsibilities[0] == pytest.approx([expected, 1 - expected], rel=1e-9)
    assert found.log_likelihood == pytest.approx(-50.0 * rows + math.log(0.5 * math.exp(0.5) + 0.5), rel=1e-12)


def test_opposed_types_explain_pairs_no_better_than_a_coin():
    """0.5 sigma(z) + 0.5 sigma(-z) is 0.5 whatever z: pairs of annotators with one row each tell two types nothing."""
    rewards = np.linspace(-8, 8, 33)
    logps = -np.logaddexp(0, np.stack([-rewards, rewards], 1))
    found = expectation(logps, np.arange(33), np.array([0.5, 0.5]), 33)
    assert found.log_likelihood == pytest.approx(33 * math.log(0.5), rel=1e-12)


def test_a_type_that_nobody_is_of_stays_empty():
    found = expectation(np.log([[0.5, 0.9]]), np.array([0]), np.array([1.0, 0.0]), 1)
    assert found.responsibilities.tolist() == [[1.0, 0.0]]
    assert row_weights(found.responsibilities, np.array([0])).tolist() == [[1.0, 0.0]]


def test_weights_have_the_mean_one_and_equal_responsibilities_are_no_weights():
    owners = np.array([0, 0, 1, 2])
    weights = row_weights(first_responsibilities(3, 2, seed=5), owners)
    assert weights.mean(0) == pytest.approx([1.0, 1.0], rel=1e-12)
    assert np.array_equal(weights[0], weights[1])
    assert np.array_equal(row_weights(np.full((3, 4), 0.25), owners), np.ones((4, 4)))


def test_the_start_belongs_to_the_seed():
    start = first_responsibilities(20, 3, seed=1)
    assert start.sum(1) == pytest.approx(np.ones(20))
    assert np.array_equal(start, first_responsibilities(20, 3, seed=1))
    assert not np.array_equal(start, first_responsibilities(20, 3, seed=2))
    assert shares(start).sum() == pytest.approx(1.0)
    assert start.std() > 0.1


def test_doubt_goes_from_certainty_to_none():
    assert doubt(np.array([[1.0, 0.0], [0.0, 1.0]])) == 0.0
    assert doubt(np.full((4, 3), 1 / 3)) == pytest.approx(1.0)
    assert 0 < doubt(np.array([[0.9, 0.1]])) < 1
