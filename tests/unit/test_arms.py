"""Arms of a comparison: the same prompts, means over seeds, intervals over prompts, wins against start and baseline."""

import csv
import io

import pytest

from rdpo.experiments.arms import arm_results, coverage, table, to_csv

PROMPTS = [f"p{index}" for index in range(20)]


def rows(lift, prompts=PROMPTS):
    return [
        {
            "prompt_id": name,
            "start_scores": {"main": float(index % 3), "other": 0.0},
            "trained_scores": {"main": index % 3 + lift, "other": 0.0},
            "trained_tokens": 10,
            "kl": None if index == 0 else 2.0,
        }
        for index, name in enumerate(prompts)
    ]


WEIGHTS = {arm: {"other": 0.0, "main": 1.0} for arm in ("dpo", "rdpo", "none", "a")}


def results(evaluated, baseline="dpo"):
    return {(result.reward, result.arm): result for result in arm_results(evaluated, WEIGHTS, held_against(baseline))}


def held_against(baseline):
    return dict.fromkeys(("dpo", "rdpo", "none", "a"), baseline)


def test_each_arm_against_start_and_baseline():
    found = results({("dpo", 0): rows(0.5), ("rdpo", 0): rows(1.5), ("none", 0): rows(0.0)})
    assert next(iter(found)) == ("main", "dpo")
    best = found["main", "rdpo"]
    assert (best.difference.mean, best.difference.low, best.difference.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (best.wins_start.mean, best.wins_baseline.mean) == (1.0, 1.0)
    assert found["main", "dpo"].wins_baseline.mean == 0.5
    assert found["main", "none"].wins_start.mean == 0.5
    assert found["main", "none"].wins_baseline.mean == 0.0
    assert (best.kl, best.tokens) == (2.0, 10.0)
    assert found["other", "rdpo"].weight == 0.0


def test_seeds_are_averaged_prompt_by_prompt_before_the_bootstrap():
    opposite = results({("a", 0): rows(1.0), ("a", 1): rows(-1.0)}, "a")["main", "a"]
    assert (opposite.difference.mean, opposite.difference.low, opposite.difference.high) == (0.0, 0.0, 0.0)
    assert (opposite.seeds, opposite.wins_start.mean) == (2, 0.5)


def test_only_prompts_that_every_arm_answered_count():
    everything = rows(0.0)
    everything[-1] |= {"kl": 100.0, "trained_tokens": 100}
    found = results({("dpo", 0): everything, ("rdpo", 0): rows(9.0, PROMPTS[:5])})
    assert {(result.prompts, result.kl, result.tokens) for result in found.values()} == {(5, 2.0, 10.0)}
    assert arm_results({("dpo", 0): rows(0.0), ("rdpo", 0): []}, WEIGHTS, held_against("dpo")) == []


def test_how_many_were_evaluated_stands_beside_how_many_are_shared():
    whole, part = PROMPTS, PROMPTS[:5]
    said = "held-out prompts: 20 evaluated in each of 2 runs, 20 in all of them"
    assert coverage("prompts", {("dpo", 0): whole, ("rdpo", 0): whole}) == ["", said]
    assert "5 to 20 evaluated in each of 2 runs, 5 in all" in coverage("pairs", {("a", 0): whole, ("a", 1): part})[1]
    assert "0 in all of them; nothing can be compared" in coverage("pairs", {("a", 0): ["x"], ("a", 1): ["y"]})[1]
    assert coverage("pairs", {}) == []


def test_a_reward_that_some_arms_optimise_is_named_with_them():
    weights = {"dpo": {"main": 1.0, "other": 0.0}, "rdpo": {"main": 1.0, "other": 0.5}}
    found = arm_results({("dpo", 0): rows(0.5), ("rdpo", 0): rows(1.5)}, weights, held_against("dpo"))
    assert "other (optimised by rdpo), 20 prompts, 1 seeds" in table(found, "dpo")
    assert "main (optimised), 20 prompts, 1 seeds" in table(found, "dpo")


def test_table_and_csv_hold_every_arm_and_reward():
    found = arm_results({("dpo", 0): rows(0.5), ("rdpo", 0): rows(1.5)}, WEIGHTS, held_against("dpo"))
    text = "\n".join(table(found, "dpo"))
    assert "main (optimised), 20 prompts, 1 seeds" in text
    assert "other (independent)" in text
    assert "+1.500 (+1.500 to +1.500)" in text
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [(line["arm"], line["reward"]) for line in lines][:2] == [("dpo", "main"), ("rdpo", "main")]
    assert float(lines[1]["wins_baseline"]) == 1.0
    assert table([], "dpo") == []
