"""What calls for a second look, and what does not."""

import numpy as np

from rdpo.files.manifest import Manifest
from rdpo.report.alerts import alerts
from rdpo.report.columns import PairColumns


def evaluated(**differences):
    """An evaluation in which rewards moved by so much; the first is optimised."""
    rewards = [
        {"reward": name, "weight": float(not place), "difference": {"low": moved - 0.1, "high": moved + 0.1}}
        for place, (name, moved) in enumerate(differences.items())
    ]
    same = {"start": {"mean": 1.0}, "trained": {"mean": 1.0}}
    return {"prompts": 30, "rewards": rewards, "length": same, "stop_rate": same}


def alerts_of(pairs=None, **summaries):
    return alerts({stage: Manifest(stage, "k", {}, {}, summary=of) for stage, of in summaries.items()}, pairs)


def test_a_reward_that_is_not_optimised_and_falls_is_an_alert():
    assert alerts_of(evaluation=evaluated(optimised=1.0, other=1.0)) == []
    (alert,) = alerts_of(evaluation=evaluated(optimised=1.0, other=-1.0))
    assert "optimised rose while other, not optimised, fell" in alert


def test_a_few_prompts_prove_nothing():
    (alert,) = alerts_of(evaluation={**evaluated(optimised=1.0), "prompts": 4})
    assert alert.startswith("Only 4 held-out prompts were compared")


def test_a_gap_that_follows_length_is_an_alert():
    lengths = np.arange(9.0)
    pairs = PairColumns({}, {}, lengths, np.zeros(0), lengths, np.zeros(9))
    (alert,) = alerts_of(pairs)
    assert "The longer the chosen answer" in alert


def test_falling_log_probs_are_an_alert():
    steps = [{"logps/chosen": value, "rewards/accuracies": 1.0} for value in (-30.0, -41.0)]
    (alert,) = alerts_of(training={"steps": 20, "first": steps[0], "last": steps[1]})
    assert "sft_coef" in alert


def test_of_a_few_steps_that_is_what_is_said():
    step = {"logps/chosen": -30.0, "rewards/accuracies": 0.0}
    (alert,) = alerts_of(training={"steps": 2, "first": step, "last": step})
    assert alert.startswith("Optimizer steps of training: 2, which are few; where little has moved, lower")


def test_a_few_steps_that_tear_the_model_are_still_said_to():
    steps = [{"logps/chosen": value, "rewards/accuracies": 1.0} for value in (-30.0, -90.0)]
    few, fall = alerts_of(training={"steps": 2, "first": steps[0], "last": steps[1]})
    assert "which are few" in few
    assert "sft_coef" in fall


def test_a_reward_that_falls_is_said_of_a_few_prompts_too():
    few, gamed = alerts_of(evaluation={**evaluated(optimised=1.0, other=-1.0), "prompts": 4})
    assert few.startswith("Only 4")
    assert "not optimised, fell" in gamed


def test_a_stage_made_from_what_is_no_longer_there_is_an_alert():
    pairs = Manifest("pairs", "k", {}, {}, digest="new")
    assert alerts({"pairs": pairs, "reference": Manifest("reference", "k", {}, {"pairs": "new"})}, None) == []
    (alert,) = alerts({"pairs": pairs, "reference": Manifest("reference", "k", {}, {"pairs": "old"})}, None)
    assert alert.startswith("reference was made from other pairs")
