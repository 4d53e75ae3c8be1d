"""Arms of a comparison: the same prompts, intervals over prompts and seeds, wins against start and baseline."""

import csv
import io
from itertools import product

import numpy as np
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
            "drawn_tokens": 7,
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
    assert (best.kl.mean, best.tokens) == (2.0, 10.0)
    assert found["other", "rdpo"].weight == 0.0


def test_seeds_that_disagree_are_seen_in_the_interval():
    opposite = results({("a", 0): rows(1.0), ("a", 1): rows(-1.0)}, "a")["main", "a"]
    assert opposite.difference.mean == 0.0
    # Two seeds, t with one degree of freedom.
    assert opposite.difference.high > 10
    assert (opposite.seeds, opposite.wins_start.mean) == (2, 0.5)


def test_an_arm_against_itself_is_a_tie_and_wins_everywhere_are_no_certainty():
    found = results({("dpo", 0): rows(0.5), ("rdpo", 0): rows(1.5)})
    itself, best = found["main", "dpo"].wins_baseline, found["main", "rdpo"].wins_baseline
    assert (itself.low, itself.high) == (0.5, 0.5)
    assert (best.low, best.high) == pytest.approx((20 / (20 + 1.96**2), 1.0), abs=1e-4)


def test_identical_arms_with_three_seeds_are_called_different_in_one_case_of_twenty():
    draw, trials, called = np.random.default_rng(0), 150, 0
    for _ in range(trials):
        prompts = draw.normal(size=60)
        evaluated = {}
        for arm, seed in product(("dpo", "rdpo"), range(3)):
            scores = prompts + 0.3 * draw.normal() + draw.normal(size=60)
            evaluated[arm, seed] = [
                {**row, "trained_scores": {"main": score, "other": 0.0}, "start_scores": {"main": 0.0, "other": 0.0}}
                for row, score in zip(rows(0.0, [f"p{place}" for place in range(60)]), scores, strict=True)
            ]
        wins = results(evaluated)["main", "rdpo"].wins_baseline
        called += not wins.low <= 0.5 <= wins.high
    assert called / trials <= 0.07 + 0.04


def test_kl_of_a_version_that_did_not_draw_for_it_is_not_shown():
    old = [{name: value for name, value in row.items() if name != "drawn_tokens"} for row in rows(0.5)]
    found = arm_results({("dpo", 0): old}, WEIGHTS, held_against("dpo"))
    assert found[0].kl is None
    assert table(found, "dpo")[3].split()[-2:] == ["-", "10"]
    assert "nan" in to_csv(found)


def test_only_prompts_that_every_arm_answered_count():
    everything = rows(0.0)
    everything[-1] |= {"kl": 100.0, "trained_tokens": 100}
    found = results({("dpo", 0): everything, ("rdpo", 0): rows(9.0, PROMPTS[:5])})
    assert {(result.prompts, result.kl.mean, result.tokens) for result in found.values()} == {(5, 2.0, 10.0)}
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
