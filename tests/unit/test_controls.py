"""Negative controls: rewards that belong to other pairs, and a comparison that says when a control wins."""

from functools import partial

import numpy as np
import pytest

from rdpo.config import Job
from rdpo.config.comparison import Comparison
from rdpo.evaluation.intervals import Estimate
from rdpo.experiments.arms import ArmResult, arm_results
from rdpo.experiments.controls import control_lines
from rdpo.experiments.heldout import HeldoutResult
from tests.support.pairs import pairs, trainer_of
from tests.support.plain_backend import PlainBackend

ARMS = {"name": "c", "job": "job.toml", "baseline": "dpo", "arms": {"dpo": {}, "rdpo": {}, "shuffled": {}}}
COMPARISON = Comparison.model_validate({**ARMS, "controls": ["shuffled"]})
TIED = Estimate(0.5, 0.4, 0.6)


def result(arm, wins):
    rest = {"reward": "r", "weight": 1.0, "prompts": 9, "seeds": 3, "start_mean": 0.0, "mean": 0.0, "kl": None}
    return ArmResult(arm, **rest, difference=TIED, wins_start=TIED, wins_baseline=wins, tokens=1.0)


def of_pairs(arm, against):
    return HeldoutResult(arm, 9, 3, TIED, against, TIED, against)


def test_every_pair_gets_the_gap_of_another_one():
    table = pairs(count=50)
    place = table.table.column_names.index("reward_gap")
    own = type(table)(table.table.set_column(place, "reward_gap", [[float(n) for n in range(50)]]), table.sizes)
    drawn = own.with_gaps_of_others(3)
    assert sorted(drawn.gaps) == own.gaps
    assert not [n for n in range(50) if drawn.gaps[n] == own.gaps[n]]
    assert drawn.gaps == own.with_gaps_of_others(3).gaps != own.with_gaps_of_others(4).gaps
    others = [name for name in own.table.column_names if name != "reward_gap"]
    assert drawn.table.select(others) == own.table.select(others)


@pytest.mark.usefixtures("process_group")
def test_the_first_loss_is_that_of_the_other_gaps(tiny_model, tmp_path):
    table = pairs()
    place = table.table.column_names.index("reward_gap")
    gaps = type(table)(table.table.set_column(place, "reward_gap", [[0.0, 1.0, 2.0, 5.0]]), table.sizes)
    trainer = partial(trainer_of, tiny_model, tmp_path, backend=PlainBackend)
    # With one pair in a step its gap is seen alone.
    plain = trainer(data=gaps).step(0, 9, [3])["loss"]
    shuffled = trainer(data=gaps, shuffle_rewards=True).step(0, 9, [3])["loss"]
    same = trainer(data=gaps.with_gaps_of_others(0)).step(0, 9, [3])["loss"]
    assert shuffled == same != plain


def test_a_control_that_wins_is_said_by_answers_and_by_pairs():
    won, more = Estimate(0.6, 0.52, 0.68), Estimate(0.05, 0.01, 0.09)
    lines = list(control_lines(COMPARISON, [result("rdpo", won), result("shuffled", won)], []))
    assert lines[0] == "the control shuffled beats dpo by r: win rate 0.60 (0.52 to 0.68)"
    assert "not shown to be their own doing" in lines[1]
    lines = list(control_lines(COMPARISON, [], [of_pairs("rdpo", more), of_pairs("shuffled", more)]))
    assert lines[0] == "the control shuffled beats dpo on held-out pairs: accuracy +0.050 (+0.010 to +0.090)"


def test_a_control_that_does_not_win_is_said_too_and_none_says_nothing():
    results = [result("rdpo", Estimate(0.7, 0.6, 0.8)), result("shuffled", TIED)]
    assert list(control_lines(COMPARISON, results, [])) == ["no control beats dpo: shuffled"]
    assert not list(control_lines(Comparison.model_validate(ARMS), results, []))


def test_in_a_hundred_comparisons_a_control_beats_the_baseline_rarely():
    """Arms that differ by chance alone: three seeds, sixty prompts, which are unlike each other."""
    generator, alarms, contained = np.random.default_rng(0), 0, 0
    for _ in range(100):
        base, evaluated = generator.normal(0, 1, 60), {}
        for arm in ("dpo", "shuffled"):
            for seed in range(3):
                scores = base + generator.normal(0, 0.2) + generator.normal(0, 1, 60)
                evaluated[arm, seed] = [_row(place, score) for place, score in enumerate(scores)]
        found = arm_results(evaluated, {"dpo": {"r": 1.0}, "shuffled": {"r": 1.0}}, {"dpo": "dpo", "shuffled": "dpo"})
        alarms += len(list(control_lines(COMPARISON, found, []))) > 1
        contained += found[1].wins_baseline.low <= 0.5 <= found[1].wins_baseline.high
    assert contained >= 90
    assert alarms <= 5


def _row(place, score):
    scores = {"start_scores": {"r": 0.0}, "trained_scores": {"r": score}}
    return {"prompt_id": f"p{place}", **scores, "trained_tokens": 1, "kl": None}


@pytest.mark.parametrize("controls", [["nobody"], ["dpo"]])
def test_a_control_is_an_arm_beside_the_baseline(controls):
    with pytest.raises(ValueError, match="is no arm beside the baseline"):
        Comparison.model_validate({**ARMS, "controls": controls})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"shuffle_rewards": True, "reward_as": "none"}}, "no reward enters the loss"),
        ({"training": {"shuffle_rewards": True, "loss": "apo_zero"}}, "no reward enters the loss"),
        (
            {
                "training": {"shuffle_rewards": True},
                "pairs": {"chosen": "best", "rejected": "worst", "others": "rest"},
            },
            "shuffle_rewards is for pairs",
        ),
    ],
)
def test_a_control_that_would_change_nothing_is_refused(job_table, changes, said):
    table = {**job_table, **{name: {**job_table.get(name, {}), **own} for name, own in changes.items()}}
    with pytest.raises(ValueError, match=said):
        Job.model_validate(table)
