"""Intervals against independent programs, at the edges, and by simulation: how often they hold the truth."""

import math
from itertools import product

import numpy as np
import pytest

from rdpo.evaluation.intervals import groups_of, mean_interval, share_interval, student, with_interval

WITHIN = (0.93, 0.97)
WIDEST = 0.98
"""With three seeds that differ little the interval is a little wider than it needs to be."""


def test_one_row_a_prompt_is_students_t_interval():
    values = np.array([0.3, 1.2, -0.4, 2.0, 0.9])
    estimate = mean_interval(values)
    half = 2.776445 * values.std(ddof=1) / math.sqrt(5)
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-5)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.70620), (2, 4.30265), (7, 2.36462), (50, 2.00856), (1e9, 1.9600)]
)
def test_quantiles_of_students_t(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, abs=4e-4)


def test_equal_groups_are_the_interval_of_their_means_and_copies_of_rows_tell_nothing_new():
    draw = np.random.default_rng(0)
    means = draw.normal(size=13)
    rows, groups = np.repeat(means, 4), np.repeat(np.arange(13), 4)
    one, copied = mean_interval(means), mean_interval(rows, groups.tolist())
    assert (copied.low, copied.high) == pytest.approx((one.low, one.high))
    assert mean_interval(rows).high - mean_interval(rows).low < 0.6 * (one.high - one.low)


def test_one_prompt_alone_tells_nothing_of_others():
    for values in ([0.4], [0.1, 0.9, 0.3]):
        estimate = mean_interval(np.array(values), ["same"] * len(values))
        assert estimate.mean == pytest.approx(np.mean(values))
        assert math.isnan(estimate.low) and math.isnan(estimate.high)
    assert with_interval(estimate, ".3f") == "0.433 (no interval)"


@pytest.mark.parametrize(
    ("wins", "of", "low", "high"), [(8, 8, 0.6756, 1.0), (7, 8, 0.5291, 0.9776), (0, 20, 0.0, 0.1611)]
)
def test_a_share_of_independent_rows_is_wilsons_interval(wins, of, low, high):
    estimate = share_interval(np.array([1.0] * wins + [0.0] * (of - wins)))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_what_does_not_vary_is_no_certainty(value, seeds):
    estimate = share_interval(np.full((seeds, 16), value), [place // 2 for place in range(16)])
    assert estimate.mean == value
    assert 0 <= estimate.low <= value <= estimate.high <= 1
    assert estimate.high - estimate.low == pytest.approx(3.8415 / (8 + 3.8415), abs=1e-4)


def test_seeds_that_disagree_widen_the_interval():
    prompts = np.random.default_rng(1).normal(size=200)
    same, apart = np.tile(prompts, (3, 1)), prompts + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = mean_interval(same), mean_interval(apart)
    assert narrow.mean == pytest.approx(wide.mean)
    # Three means of sd 1: t with two degrees of freedom, 4.30 / sqrt(3).
    assert wide.high - wide.mean > 2.3
    assert narrow.high - narrow.low == pytest.approx(mean_interval(prompts).high - mean_interval(prompts).low, rel=0.03)


def test_rows_are_grouped_by_their_prompt_else_by_their_id():
    prompt = [{"role": "user", "content": "why?"}]
    groups = groups_of([{"prompt": prompt, "prompt_id": "a"}, {"prompt": prompt, "prompt_id": "b"}])
    assert groups[0] == groups[1]
    assert groups_of([{"prompt_id": "a"}, {}]) == ["a", 1]


def drawn(draw, seeds, prompts, rows, sd):
    """Values (seeds, prompts * rows) with mean 0 from effects of seeds, prompts and rows, and the rows' prompts."""
    of_seed, of_prompt, noise = sd
    effects = of_seed * draw.normal(size=(seeds, 1)) + np.repeat(of_prompt * draw.normal(size=(1, prompts)), rows, 1)
    values = effects + noise * draw.normal(size=(seeds, prompts * rows))
    return values, np.repeat(np.arange(prompts), rows).tolist()


def coverage(trials, seeds, prompts, rows, sd, seed=0):
    """How often the interval holds the mean, 0."""
    draw, hits = np.random.default_rng(seed), 0
    for _ in range(trials):
        estimate = mean_interval(*drawn(draw, seeds, prompts, rows, sd))
        hits += estimate.low <= 0 <= estimate.high
    return hits / trials


def share_coverage(trials, prompts, rows, rate, alike, seed=0):
    """How often the interval of a win rate holds it; with probability `alike` a row does as its prompt's first."""
    draw, hits = np.random.default_rng(seed), 0
    groups = np.repeat(np.arange(prompts), rows).tolist()
    for _ in range(trials):
        own = draw.random((prompts, rows)) < rate
        follows = draw.random((prompts, rows)) < alike
        values = np.where(follows, own[:, :1], own).astype(float).ravel()
        estimate = share_interval(values, groups)
        hits += estimate.low <= rate <= estimate.high
    return hits / trials


def bounds(trials, most=WITHIN[1]):
    """Where a coverage within the bounds shows up in so many trials, but once in a thousand times."""
    slack = 3.1 * math.sqrt(0.05 * 0.95 / trials)
    return WITHIN[0] - slack, most + slack


@pytest.mark.parametrize(
    ("seeds", "prompts", "rows", "sd"),
    [
        (1, 40, 1, (0, 1, 0)),
        (1, 13, 4, (0, 1, 0.3)),
        (1, 40, 4, (0, 1, 1)),
        (3, 60, 1, (0.1, 1, 0.3)),
        (3, 60, 1, (0.3, 1, 1)),
        (3, 60, 1, (0.3, 0, 1)),
        (3, 30, 4, (0.2, 1, 1)),
    ],
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(seeds, prompts, rows, sd):
    trials = 1500
    low, high = bounds(trials)
    assert low <= coverage(trials, seeds, prompts, rows, sd) <= high


@pytest.mark.parametrize(("rows", "rate", "alike"), [(1, 0.5, 0), (1, 0.9, 0), (4, 0.7, 0.6)])
def test_win_rates_hold_the_truth_about_as_often_as_they_say(rows, rate, alike):
    trials = 1500
    low, high = bounds(trials)
    assert low <= share_coverage(trials, 52, rows, rate, alike) <= high


@pytest.mark.long
def test_coverage_table():
    """The printed 95% intervals, by simulation: `pytest -m long -s tests/unit/test_intervals.py`."""
    trials, found = 4000, []
    print("\nseeds prompts rows   sd: seed prompt noise   coverage")
    for seeds, prompts, rows in product((1, 3), (20, 100), (1, 4)):
        for sd in product((0,) if seeds == 1 else (0, 0.1, 0.2, 0.3), (0, 1), (0.3, 1)):
            covered = coverage(trials, seeds, prompts, rows, sd)
            print(f"{seeds:>5}{prompts:>8}{rows:>5}{sd[0]:>11}{sd[1]:>7}{sd[2]:>6}   {covered:.3f}")
            found.append(covered)
    print("\nprompts rows  rate alike   coverage of the win rate")
    for prompts, rows, rate, alike in product((52, 200), (1, 4), (0.5, 0.7, 0.9), (0.6,)):
        covered = share_coverage(trials, prompts, rows, rate, alike if rows > 1 else 0)
        print(f"{prompts:>7}{rows:>5}{rate:>6}{alike:>6}   {covered:.3f}")
        found.append(covered)
    low, high = bounds(trials, WIDEST)
    assert all(low <= covered <= high for covered in found)
