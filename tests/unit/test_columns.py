"""Figures of pairs and of evaluated prompts that can be checked by hand."""

import numpy as np
import pyarrow as pa
import pytest

from rdpo.files.stage_folder import StageFolder
from rdpo.report.columns import PairColumns, PromptColumns, pair_columns, rank_correlation
from rdpo.report.samples import most_telling


def pair(number, chosen, rejected, dropped=None):
    answers = {side: [{"role": "assistant", "content": "x" * length}] for side, length in SIDES.items()}
    scores = {"chosen_scores": chosen, "rejected_scores": rejected}
    gap = chosen["a"] - rejected["a"] if chosen else None
    return {"prompt_id": f"{number:032x}", **answers, **scores, "reward_gap": gap, "dropped": dropped}


SIDES = {"chosen": 5, "rejected": 3}


def test_pairs_count_also_where_they_were_dropped(tmp_path):
    folder = StageFolder(str(tmp_path), "pairs")
    rows = [
        pair(0, {"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 1.0}),
        pair(1, {"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 1.0}),
        pair(2, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, "too small"),
        pair(3, None, None, "never scored"),
    ]
    for number, row in enumerate(rows):
        folder.write_parts(pa.Table.from_pylist([row]), "prompt_id")
        assert len(pair_columns(folder).kept_gaps) == min(number + 1, 2)
    found = pair_columns(folder)
    assert found.same_side()["a", "b"] == 0.5
    assert (found.kept_gaps.tolist(), found.dropped_gaps.tolist()) == ([1.0, 1.0], [1.0])
    assert (found.chosen_chars.tolist(), found.chosen_longer) == ([5.0, 5.0], 1.0)


def test_a_stage_without_rows_has_no_figures(tmp_path):
    found = pair_columns(StageFolder(str(tmp_path), "pairs"))
    assert found.chosen == {} and len(found.kept_gaps) == 0 and found.gap_follows_length is None


def test_a_reward_for_length_shows_where_answers_grew():
    start, trained = np.zeros(4), np.array([3.0, 2.0, -1.0, 0.0])
    tokens = {"start": np.full(4, 10.0), "trained": np.array([40.0, 30.0, 5.0, 10.0])}
    columns = PromptColumns(
        list("abcd"),
        {"start": {"r": start}, "trained": {"r": trained}},
        {"start": start, "trained": trained},
        tokens,
    )
    found = columns.by_length("r")
    assert (found.longer, found.longer_wins, found.others, found.others_wins) == (2, 1.0, 2, 0.25)
    assert found.correlation == pytest.approx(1.0)


def test_ranks_of_equal_values_are_shared():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert rank_correlation(np.array([0.0, 7, 7, 9]), np.array([1.0, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(np.ones(5), np.arange(5.0)) is None


def test_of_too_many_prompts_the_extremes_are_shown_and_others():
    gain = np.array([0.0, 0.1, 9.0, -9.0, 0.2, 8.0, -8.0, 0.3, 0.4, 0.5])
    assert most_telling(gain, 8) == [2, 3, 5, 6, 0, 1, 4, 7]
    assert sorted(most_telling(gain, 1000)) == list(range(10))
    assert most_telling(gain, 0) == []


def test_rewards_are_held_against_each_other_on_the_pairs_that_both_scored():
    nothing = np.zeros(0)
    chosen = {"rm": np.array([1.0, 1.0, 1.0]), "given": np.array([2.0, np.nan, 0.0])}
    rejected = {"rm": np.zeros(3), "given": np.array([1.0, np.nan, 1.0])}
    shares = PairColumns(chosen, rejected, nothing, nothing, nothing, nothing).same_side()
    assert shares["rm", "given"] == shares["given", "rm"] == 0.5
    assert shares["rm", "rm"] == shares["given", "given"] == 1.0
