"""Length-regularised shaping: the rule of DICE's code on fixtures that can be followed by hand."""

import math

import numpy as np
import pytest

from rdpo.preference.shaping import best_and_worst, find_length_coef, matrix, mean_length_gap


def test_best_and_worst_leave_out_samples_that_are_not_usable():
    scores = np.array([[1.0, math.nan, 3.0, 2.0], [5.0, 5.0, math.nan, 1.0]])
    best, worst = best_and_worst(scores, np.zeros_like(scores), 0.0)
    assert (best.tolist(), worst.tolist()) == ([2, 0], [0, 3])


def test_a_coefficient_turns_a_win_by_length_around():
    scores, lengths = np.array([[1.0, 2.0]]), np.array([[10.0, 110.0]])
    assert mean_length_gap(scores, lengths, 0.0) == 100.0
    assert mean_length_gap(scores, lengths, 0.02) == -100.0


def test_the_scan_stops_where_the_gap_grows_again():
    # Row one turns around above 0.0102, row two above 0.030: the gaps are 20, then -5, then -20.
    scores = np.array([[0.0, 0.255], [0.0, 0.45]])
    lengths = np.array([[0.0, 25.0], [0.0, 15.0]])
    found = find_length_coef(scores, lengths)
    assert mean_length_gap(scores, lengths, 0.0) == 20.0
    assert (found.length_coef, found.mean_length_gap) == (0.011, -5.0)


def test_without_a_gap_nothing_is_held_back():
    scores, lengths = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[5.0, 9.0], [5.0, 9.0]])
    assert find_length_coef(scores, lengths).length_coef == 0.0


def test_rows_of_different_length():
    wide = matrix([[1.0], [1.0, 2.0]])
    assert wide.shape == (2, 2)
    assert math.isnan(wide[0, 1])
    assert matrix([]).shape == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_found_gap_is_never_larger_than_the_one_without(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(10, 400, (50, 4)).astype(float)
    scores = 0.02 * lengths + generator.normal(size=lengths.shape)
    found = find_length_coef(scores, lengths)
    assert abs(found.mean_length_gap) < abs(mean_length_gap(scores, lengths, 0.0))
    assert found.length_coef > 0.01
