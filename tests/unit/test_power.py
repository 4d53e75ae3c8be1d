"""Power: as many held-out prompts as are said to do show the effect, in drawn evaluations with our own intervals."""

import numpy as np
import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.evaluation.intervals import share_interval
from rdpo.planning.power import power, power_lines, prompts_needed, smallest_seen


@pytest.mark.parametrize(("win_rate", "needed"), [(0.6, 194), (0.55, 783), (0.7, 47)])
def test_prompts_needed_are_those_of_the_textbook(win_rate, needed):
    assert prompts_needed(win_rate) == pytest.approx(needed, abs=1)


@pytest.mark.parametrize("win_rate", [0.57, 0.65, 0.8])
def test_the_intervals_of_an_evaluation_show_the_effect_as_often_as_was_said(win_rate):
    generator, prompts = np.random.default_rng(0), prompts_needed(win_rate)
    draws = 1000
    seen = 0
    for _ in range(draws):
        found = share_interval((generator.random(prompts) < win_rate).astype(float))
        seen += found.low > 0.5
    assert seen / draws == pytest.approx(power(win_rate, prompts), abs=0.05)
    assert power(win_rate, prompts) >= 0.8 > power(win_rate, prompts - 1)


def test_the_smallest_effect_that_is_seen():
    smallest = smallest_seen(64)
    assert power(smallest, 64) == pytest.approx(0.8, abs=1e-3)
    assert prompts_needed(smallest) == pytest.approx(64, abs=1)
    assert smallest_seen(1) is None


def test_a_plan_says_what_the_job_can_show(job_table):
    def lines(limit):
        table = {**job_table, "evaluation": {**job_table.get("evaluation", {}), "limit": limit}}
        return "\n".join(power_lines(Job.model_validate(table), 0.1))

    assert "0.6 is seen with 80% power from 194" in lines(64)
    assert "too few" in lines(64)
    assert "too few" not in lines(194)
    assert "show no win rate" in lines(2)


@pytest.mark.parametrize("effect", [0.0, 0.5, -0.1, float("nan")])
def test_an_effect_that_is_none_is_refused(job_table, effect):
    with pytest.raises(InputError, match="--power"):
        list(power_lines(Job.model_validate(job_table), effect))
