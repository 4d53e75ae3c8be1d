"""Held-out pairs: shares with ties as half, means over seeds, differences against the arm each is held against."""

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
    assert (found["rdpo@0"].accuracy.low, found["rdpo@0"].accuracy.high) == (1.0, 1.0)
    assert found["rdpo@0.4"].margin.mean == 0.0
    assert found["rdpo@0.4"].margin_against.mean == 0.75
    assert (found["rdpo@0"].margin_against.low, found["rdpo@0"].margin_against.high) == (0.0, 1.5)


def test_a_pair_counts_with_its_mean_over_the_seeds_and_only_where_all_have_it():
    found = results({("dpo@0", 0): margins(1.0, -1.0, 5.0), ("dpo@0", 1): margins(-1.0, 1.0)})["dpo@0"]
    assert (found.pairs, found.seeds, found.accuracy.mean) == (2, 2, 0.5)
    assert (found.accuracy.low, found.accuracy.high) == (0.5, 0.5)


def test_nothing_measured_is_nothing_told():
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
