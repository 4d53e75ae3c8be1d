"""The win rate at equal length: against another implementation, by its coverage, and where lengths decide alone."""

import numpy as np
import pytest

from rdpo.evaluation.compare import compare_rewards
from rdpo.evaluation.length_controlled import PENALTY, length_controlled


def drawn(generator, count, advantage, by_length, ties=0.0):
    """Wins whose logit is an advantage and so much for length, in the spread of the growth."""
    growth = generator.normal(20, 40, count).round()
    logits = advantage + by_length * np.tanh(growth / growth.std())
    won = (generator.random(count) < 1 / (1 + np.exp(-logits))).astype(float)
    return np.where(generator.random(count) < ties, 0.5, won), growth


@pytest.mark.parametrize(("advantage", "by_length", "ties"), [(0.5, 1.5, 0.0), (-0.7, 0.4, 0.2), (0.0, -2.0, 0.1)])
def test_scikit_learn_fits_the_same(advantage, by_length, ties):
    """Its rows with a weight: a tie is half a win and half a loss. AlpacaEval's model without its difficulties."""
    linear = pytest.importorskip("sklearn.linear_model")
    won, growth = drawn(np.random.default_rng(1), 400, advantage, by_length, ties)
    features = np.stack([np.ones(400), np.tanh(growth / growth.std())], axis=1)
    fit = linear.LogisticRegression(C=1 / PENALTY, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(np.concatenate([features] * 2), [1] * 400 + [0] * 400, np.concatenate([won, 1 - won]))
    expected = 1 / (1 + np.exp(-fit.coef_[0, 0]))
    assert length_controlled(won, growth).mean == pytest.approx(expected, abs=1e-4)


def test_what_only_length_wins_is_no_win():
    generator = np.random.default_rng(2)
    growth = generator.normal(20, 30, 500)
    won = (growth + generator.normal(0, 20, 500) > 0).astype(float)
    assert won.mean() > 0.65
    found = length_controlled(won, growth)
    assert found.low < 0.5 < found.high


def test_without_growth_it_is_the_win_rate():
    won = np.array([1.0] * 60 + [0.0] * 30 + [0.5] * 10)
    assert length_controlled(won, np.zeros(100)).mean == pytest.approx(won.mean(), abs=1e-3)


@pytest.mark.parametrize("direction", [1, -1])
def test_it_does_not_reach_beyond_the_lengths_that_were_seen(direction):
    """Wins that follow the growth: the line through them would give anything at a growth that nobody had."""
    growth = direction * np.concatenate([np.arange(1.0, 84.0), -np.arange(17.0)])
    won = np.array([1.0, 0.0] * 50)
    assert length_controlled(won, growth) is None
    growth[:3] = 0
    assert length_controlled(won, growth) is not None


def test_wins_alone_are_no_certainty_and_few_prompts_say_nothing():
    found = length_controlled(np.ones(12), np.arange(12.0) - 4)
    assert found.low < 0.9 < found.mean <= found.high <= 1
    assert length_controlled(np.ones(7), np.arange(7.0)) is None


@pytest.mark.parametrize(("prompts", "rows"), [(64, 1), (60, 4)])
def test_its_interval_covers(prompts, rows):
    """In 400 draws; with several rows to a prompt, which are alike, too."""
    generator, covered, fitted = np.random.default_rng(3), 0, 0
    truth = 1 / (1 + np.exp(-0.4))
    for _ in range(400):
        won, growth = drawn(generator, prompts, 0.4, 1.0)
        groups = np.repeat(np.arange(prompts), rows)
        found = length_controlled(np.repeat(won, rows), np.repeat(growth, rows), list(groups))
        if found is not None:
            fitted += 1
            covered += found.low <= truth <= found.high
    assert fitted > 360
    assert covered / fitted > 0.92


def test_a_comparison_has_it_where_lengths_are_known():
    generator = np.random.default_rng(4)
    start, trained, growth = generator.normal(0, 1, 50), generator.normal(0.5, 1, 50), generator.normal(0, 5, 50)
    assert compare_rewards("r", 1.0, start, trained).length_controlled is None
    found = compare_rewards("r", 1.0, start, trained, growth=growth)
    assert found.length_controlled.mean == pytest.approx(found.win_rate.mean, abs=0.05)
