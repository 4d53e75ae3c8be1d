"""Win rates and intervals on numbers that can be checked by hand."""

import numpy as np
import pytest

from rdpo.evaluation.compare import bootstrap, compare_rewards, summarize


def test_win_rate_counts_ties_as_half():
    result = compare_rewards("r", 1.0, np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 3.0, 2.0]), seed=0)
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.win_rate.mean == 0.625
    assert result.difference.mean == 0.25


def test_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        estimate = bootstrap(draw.normal(0.3, 1.0, 60), seed=trial)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 88 <= hits <= 100


def test_interval_of_constant_values_is_a_point():
    estimate = bootstrap(np.full(10, 2.0), seed=1)
    assert (estimate.low, estimate.mean, estimate.high) == (2.0, 2.0, 2.0)


def row(start, trained, kl):
    return {
        "start_scores": {"r": start},
        "trained_scores": {"r": trained},
        "start_score": start,
        "trained_score": trained,
        "start_tokens": 10,
        "trained_tokens": 20,
        "start_finish_reason": "stop",
        "trained_finish_reason": "length",
        "kl": kl,
    }


def test_summary():
    summary = summarize([row(0.0, 1.0, 2.0), row(1.0, 3.0, None)], {"r": 1.0}, seed=0)
    assert summary["prompts"] == 2
    assert summary["rewards"][0]["win_rate"]["mean"] == 1.0
    assert summary["kl"]["mean"] == 2.0
    assert summary["length"]["trained"]["mean"] == 20
    assert summary["stop_rate"]["trained"]["mean"] == 0.0
    assert summarize([], {"r": 1.0}, seed=0) == {"prompts": 0, "rewards": []}


def test_rewards_that_only_measure_have_no_optimised_verdict():
    summary = summarize([row(0.0, 1.0, 2.0)], {"r": 0.0}, seed=0)
    assert summary["optimised"] is None
    assert summary["rewards"][0]["wins"] == 1


def test_bootstrap_is_paired_and_seeded():
    values = np.array([0.1, 0.9, 0.4])
    assert bootstrap(values, 5) == bootstrap(values, 5)
    assert bootstrap(values, 5).mean == pytest.approx(values.mean())
