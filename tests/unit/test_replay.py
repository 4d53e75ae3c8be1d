"""Experience replay: the counts of DICE's code, prompts in one half only, and the same draw in any order."""

from fractions import Fraction

import pyarrow as pa
import pytest

from rdpo.preference.replay import (
    GENERATED,
    HELD_OUT,
    LEFT_OVER,
    draw_mix,
    keyed,
    mix_counts,
    place,
    until,
    with_reasons,
)

FRESH = [(f"g{i}", f"prompt {i}") for i in range(10)]
READY = [(f"o{i}", f"prompt {i + 5}") for i in range(20)]


@pytest.mark.parametrize(
    ("generated", "offline", "share", "counts"),
    [
        (100, 60, 0.0, (100, 0)),
        (100, 60, 1.0, (0, 60)),
        (100, 60, 0.5, (30, 30)),
        (20, 60, 0.5, (20, 20)),
        (100, 61, 0.25, (45, 15)),
        (0, 60, 0.5, (0, 0)),
        # In binary floating point 100 (1 - 0.9) is below 10, and 3 (0.2 / 0.8) above 0.75.
        (1000, 100, 0.9, (10, 90)),
        (1000, 10, 0.7, (3, 7)),
        (1000, 1000, 0.99, (10, 990)),
    ],
)
def test_counts_are_those_of_the_code(generated, offline, share, counts):
    assert mix_counts(generated, offline, share) == counts


def kept(mix, generated):
    return {prompt for name, prompt in generated if mix.last is None or place(name, 0) <= mix.last}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_prompt_is_in_both_halves_and_every_ready_pair_is_accounted_for(share):
    mix = draw_mix(FRESH, READY, frozenset({"prompt 20"}), share, seed=0)
    used = {prompt for name, prompt in READY if name not in mix.reasons}
    fresh = kept(mix, FRESH)
    assert not used & fresh
    assert len(used) == mix.offline == len(READY) - len(mix.reasons)
    assert len(fresh) == mix.generated == {0.0: 10, 0.5: 10, 1.0: 0}[share]
    assert mix.offline == {0.0: 0, 0.5: 10, 1.0: 19}[share]
    assert mix.reasons["o15"] == HELD_OUT
    if share == 0.5:
        assert {mix.reasons[f"o{i}"] for i in range(5)} == {GENERATED}
        assert list(mix.reasons.values()).count(LEFT_OVER) == 4


def test_the_draw_does_not_depend_on_the_order_but_on_the_seed():
    first = draw_mix(FRESH, READY, frozenset(), 0.25, seed=0)
    assert draw_mix(FRESH[::-1], READY[::-1], frozenset(), 0.25, seed=0) == first
    few = READY[:8]
    drawn = {seed: draw_mix(FRESH, few, frozenset(), 0.5, seed=seed).last for seed in (0, 1)}
    assert drawn[0] != drawn[1]


def test_drawn_generated_pairs_are_found_again_from_the_last_place():
    mix = draw_mix(FRESH, READY[:8], frozenset(), 0.5, seed=0)
    table = pa.table({"prompt_id": [name for name, _ in FRESH]})
    assert until(table, mix.last, 0).num_rows == mix.generated == 4
    assert until(table, "", 0).num_rows == 0


def test_pairs_that_are_held_out_of_training_do_not_count_and_are_still_measured():
    table = pa.table({"prompt_id": ["a", "b", "b#1", "c"], "heldout": [False, True, None, False]})
    generated = keyed([table], {"a": "qa", "b": "qb", "c": "qc"})
    assert generated == [("a", "qa"), ("b#1", "qb"), ("c", "qc")]
    assert until(table, "", 0)["prompt_id"].to_pylist() == ["b"]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_share_is_kept_where_few_ready_pairs_are_left(share):
    generated = [(f"g{i}", f"question {i}") for i in range(100)]
    ready = [(f"o{i}", f"question {i}") for i in range(90, 150)]
    mix = draw_mix(generated, ready, frozenset(f"question {i}" for i in range(110, 150)), share, seed=0)
    assert mix.generated
    assert mix.offline == int(Fraction(repr(share)) * mix.generated / (1 - Fraction(repr(share))))
    assert len(kept(mix, generated)) == mix.generated


def test_ready_pairs_take_the_columns_of_the_generated_ones():
    schema = pa.schema([("prompt_id", pa.string()), ("chosen_scores", pa.struct([("judge", pa.float64())]))])
    batch = pa.table({"prompt_id": ["a", "b"], "chosen_scores": [{"given": 1.0}] * 2, "dropped": [None, "bad line"]})
    marked = with_reasons(batch, {"a": LEFT_OVER, "b": LEFT_OVER}, schema)
    assert marked["chosen_scores"].to_pylist() == [{"judge": None}] * 2
    assert marked["dropped"].to_pylist() == [LEFT_OVER, "bad line"]
