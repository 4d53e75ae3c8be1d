"""Win rates and intervals on numbers that can be checked by hand."""

import numpy as np
import pytest

from rdpo.evaluation.compare import compare_rewards, summarize
from rdpo.evaluation.intervals import mean_interval


def test_win_rate_counts_ties_as_half():
    result = compare_rewards("r", 1.0, np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 3.0, 2.0]))
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.win_rate.mean == 0.625
    assert result.difference.mean == 0.25


def test_interval_of_constant_values_is_a_point():
    estimate = mean_interval(np.full(10, 2.0))
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
        "drawn_tokens": 5,
    }


def test_summary():
    summary = summarize([row(0.0, 1.0, 2.0), row(1.0, 3.0, None)], {"r": 1.0})
    assert summary["prompts"] == 2
    assert summary["rewards"][0]["win_rate"]["mean"] == 1.0
    assert summary["kl"]["mean"] == 2.0
    assert summary["length"]["trained"]["mean"] == 20
    assert summary["stop_rate"]["trained"]["mean"] == 0.0
    assert summarize([], {"r": 1.0}) == {"prompts": 0, "rewards": []}


def test_rewards_that_only_measure_have_no_optimised_verdict():
    summary = summarize([row(0.0, 1.0, 2.0)], {"r": 0.0})
    assert summary["optimised"] is None
    assert summary["rewards"][0]["wins"] == 1


def test_rows_of_one_prompt_count_as_one():
    draw = np.random.default_rng(0)
    gains = draw.normal(size=13)
    rows = [
        {**row(0.0, gain, 1.0), "prompt_id": f"{place}-{copy}", "prompt": [{"role": "user", "content": str(place)}]}
        for place, gain in enumerate(gains)
        for copy in range(4)
    ]
    once, four = summarize(rows[::4], {"r": 1.0}), summarize(rows, {"r": 1.0})
    assert (four["prompts"], four["rows"]) == (13, 52)
    for figure in ("difference", "win_rate"):
        ends = [(of["rewards"][0][figure]["low"], of["rewards"][0][figure]["high"]) for of in (once, four)]
        assert ends[1] == pytest.approx(ends[0], abs=0.03)


def test_eight_wins_of_eight_are_no_certainty():
    summary = summarize([row(0.0, 1.0, 2.0)] * 8, {"r": 1.0})
    assert summary["rewards"][0]["win_rate"]["low"] == pytest.approx(0.676, abs=0.001)


def test_a_log_ratio_of_other_answers_is_not_called_kl():
    old = [{name: value for name, value in row(0.0, 1.0, 2.0).items() if name != "drawn_tokens"}]
    assert summarize(old, {"r": 1.0})["kl"] is None
    summary = summarize([row(0.0, 1.0, 2.0), row(0.0, 1.0, None)], {"r": 1.0})
    assert summary["kl_answers"] == 1
