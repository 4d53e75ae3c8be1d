"""Layouts: every completion token has one state that predicts it, whatever stands around it."""

import pytest
import torch

from rdpo.modeling.layout import packed_batch, padded_batch
from rdpo.modeling.masking import counted_ids, masked, read_ids

PROMPTS = [[1, 2, 3], [4]]
ANSWERS = [[[5, 6], [7, 8, 9]], [[10], [11, 12]]]


def test_padded_rows_are_all_first_answers_then_all_second():
    batch = padded_batch(PROMPTS, ANSWERS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 0], [1, 2, 3, 10, 0], [4, 11, 12, 0, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 4, 4, 3]
    assert batch.labels.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.sequence.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert torch.equal(batch.input_ids.flatten()[batch.predict_at + 1], batch.labels)


def test_packed_row_holds_each_prompt_once():
    batch = packed_batch(PROMPTS, ANSWERS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6, 10, 4, 7, 8, 9, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 1, 2]]
    assert batch.predict_at.tolist() == [2, 3, 6, 7, 8, 2, 6, 10]
    assert batch.labels.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert [(span.start, span.end, span.answer_starts()) for span in batch.spans] == [(0, 6, [3, 5]), (6, 12, [7, 10])]


@pytest.mark.parametrize("make", [padded_batch, packed_batch])
def test_sequences_and_lengths_do_not_depend_on_the_layout(make):
    batch = make(PROMPTS, ANSWERS)
    assert batch.lengths.tolist() == [2, 3, 1, 2]
    assert torch.bincount(batch.sequence).tolist() == [2, 3, 1, 2]


@pytest.mark.parametrize("make", [padded_batch, packed_batch])
def test_masked_tokens_are_read_and_not_counted(make):
    first = [[*masked([5]), 6], [*masked([7, 8]), 9]]
    batch, whole = make(PROMPTS, [first, ANSWERS[1]]), make(PROMPTS, ANSWERS)
    assert torch.equal(batch.input_ids, whole.input_ids)
    assert batch.labels.tolist() == [6, 9, 10, 11, 12]
    assert batch.lengths.tolist() == [1, 1, 1, 2]
    assert batch.sequence.tolist() == [0, 1, 2, 3, 3]

    # A state that predicts a token that counts is the one that predicts it where all of them do.
    predicting = dict(zip(whole.labels.tolist(), whole.predict_at.tolist(), strict=True))
    assert batch.predict_at.tolist() == [predicting[label] for label in batch.labels.tolist()]


def test_a_masked_token_is_masked_once_and_read_as_it_was():
    ids = [0, 5, 7]
    assert masked(masked(ids)) == masked(ids)
    assert read_ids(masked(ids)) == ids
    assert counted_ids([*masked([0, 5]), 7]) == [7]
