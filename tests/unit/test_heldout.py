"""Held-out pairs: shares with ties as half, intervals, differences against the arm each is held against."""

import csv
import io

import pytest

from rdpo.experiments.heldout import heldout_results, table, to_csv

RIVALS = {"dpo@0": "dpo@0", "rdpo@0": "dpo@0", "dpo@0.4": "dpo@0.4", "rdpo@0.4": "dpo@0.4"}


def margins(*values):
    return {f"p{index}": value for index, value in enumerate(values)}


def results(measured):
    return {result.arm: result for result in heldout_results(measured, RIVALS)}


def test_each_arm_is_held_against_the_one_with_the_same_noise():
    found = results(
        {
            ("dpo@0", 0): margins(1.0, 1.0, 1.0, -1.0),
            ("rdpo@0", 0): margins(1.0, 1.0, 1.0, 1.0),
            ("dpo@0.4", 0): margins(-1.0, -1.0, 0.0, -1.0),
            ("rdpo@0.4", 0): margins(3.0, -1.0, -1.0, -1.0),
        }
    )
    assert [result.accuracy.mean for result in found.values()] == [0.75, 1.0, 0.125, 0.25]
    assert [result.against.mean for result in found.values()] == [0.0, 0.25, 0.0, 0.125]
    # Four of four: Wilson's interval.
    assert (found["rdpo@0"].accuracy.low, found["rdpo@0"].accuracy.high) == pytest.approx((0.5101, 1.0), abs=1e-4)
    assert found["rdpo@0.4"].margin.mean == 0.0
    assert found["rdpo@0.4"].margin_against.mean == 0.75
    # Differences 0, 0, 0, 2: Student's t with three degrees of freedom.
    against = found["rdpo@0"].margin_against
    assert (against.low, against.high) == pytest.approx((0.5 - 3.1824 * 0.5, 0.5 + 3.1824 * 0.5), abs=1e-3)


def test_a_pair_counts_with_its_mean_over_the_seeds_and_only_where_all_have_it():
    found = results({("dpo@0", 0): margins(1.0, -1.0, 5.0), ("dpo@0", 1): margins(-1.0, 1.0)})["dpo@0"]
    assert (found.pairs, found.seeds, found.accuracy.mean) == (2, 2, 0.5)
    assert found.accuracy.low < 0.25 and found.accuracy.high > 0.75


def test_pairs_of_one_prompt_count_as_one():
    values = [1.0, -1.0, 2.0, 3.0, -0.5]
    once = heldout_results({("dpo@0", 0): margins(*values)}, RIVALS)[0]
    four = {f"{name}#{copy}": value for name, value in margins(*values).items() for copy in range(4)}
    prompts = {pair: pair.partition("#")[0] for pair in four}
    copied = heldout_results({("dpo@0", 0): four}, RIVALS, prompts)[0]
    assert copied.pairs == 20
    assert (copied.margin.low, copied.margin.high) == pytest.approx((once.margin.low, once.margin.high))


def test_an_arm_that_was_selected_by_these_pairs_is_named():
    measured = {("dpo@0", 0): margins(1.0, -1.0), ("rdpo@0", 0): margins(1.0, 1.0)}
    found = heldout_results(measured, RIVALS, selected=["rdpo@0"])
    last = table(found, "dpo@0")[-1]
    assert last.startswith("selected by these pairs") and last.endswith(": rdpo@0")
    assert [line["selected_by_these_pairs"] for line in csv.DictReader(io.StringIO(to_csv(found)))] == ["False", "True"]


def test_nothing_measured_is_nothing_printed():
    assert heldout_results({}, RIVALS) == []
    assert heldout_results({("dpo@0", 0): {}}, RIVALS) == []
    assert table([], "dpo") == []


def test_table_and_csv_hold_every_arm():
    found = heldout_results({("dpo@0", 0): margins(1.0, -1.0), ("rdpo@0", 0): margins(1.0, 1.0)}, RIVALS)
    assert "held-out pairs, 2 pairs, 1 seeds; intervals 95%" in table(found, "dpo")
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [line["arm"] for line in lines] == ["dpo@0", "rdpo@0"]
    assert float(lines[1]["against"]) == pytest.approx(0.5)
    assert float(lines[1]["margin_against"]) == pytest.approx(1.0)


def test_an_arm_whose_rival_was_not_measured_is_left_out():
    assert heldout_results({("rdpo@0", 0): margins(1.0)}, RIVALS) == []
