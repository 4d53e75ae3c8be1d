"""Reward models on packed rows: each score is that of the model called with one conversation, read alone."""

import math

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rdpo.config import Job
from rdpo.preference.rewards.classifier import Classifier, ClassifierKind
from rdpo.preference.rewards.packed import Group, Row, rows_of
from tests.support.architectures import SMALL, small_model
from tests.support.classifiers import PROMPT, classifier
from tests.support.models import byte_tokenizer, save_model

ANSWERS = ["because", "I do not know, and nobody else does either.", "x", "because", "rain " * 9]
LONG = [{"role": "user", "content": "Tell me, in as few words as you can: " + "why is it so? " * 5}]


def test_a_group_is_what_conversations_share_and_what_each_has_beyond():
    group = Group.of([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]], [3, 2, 2])
    assert group == Group((1, 2), ((3, 4), (5,), (3,)), (3, 2, 2))
    # Each has a token of its own, where one begins with the whole of another too.
    assert Group.of([[1, 2], [1, 2, 3]], [1, 2]) == Group((1,), ((2,), (2, 3)), (1, 2))
    assert Group.of([[1, 2, 3]], [2]) == Group((1, 2), ((3,),), (2,))
    assert Group.of([[7]], [0]) == Group((), ((7,),), (0,))


def test_heads_and_positions_of_a_row_are_those_of_conversations_that_stand_alone():
    groups = [Group((1, 2), ((3, 4), (5,)), (3, 2)), Group((), ((6, 7), (8,)), (0, 0)), Group((9, 9), ((9,),), (1,))]
    row = Row.of(groups, "cpu")
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 0, 0, 1, 2]]
    # The last one's head stands in what it shares: it ends with padding.
    assert row.heads.tolist() == [3, 4, 5, 7, 9]


def test_rows_hold_so_many_tokens_and_every_group_once():
    groups = [Group((1,) * size, ((2,), (3,)), (size, size)) for size in (5, 50, 7, 9, 1)]
    rows = [*rows_of(groups, 25)]
    assert sorted(number for row in rows for number in row) == [0, 1, 2, 3, 4]
    assert rows[0] == [1]
    assert all(sum(groups[number].tokens for number in row) <= 25 for row in rows[1:])
    assert [*rows_of([], 25)] == []


def reward_model(folder, kind, monkeypatch, **changes):
    """A random decoder of a kind with a head of one output."""
    tokenizer = byte_tokenizer()
    monkeypatch.setitem(SMALL, "vocab_size", len(tokenizer))
    monkeypatch.setitem(SMALL, "max_position_embeddings", 512)
    config = small_model(kind).config
    config.num_labels = 1
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(5)
    return save_model(folder, AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), tokenizer)


def alone(actor, prompt, answer):
    """The score by transformers, of one conversation without padding, by the attention that it writes out."""
    model = AutoModelForSequenceClassification.from_pretrained(actor.folder, attn_implementation="eager").eval()
    ids = torch.tensor([actor.input_ids(prompt, answer)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, 0].item()


def opened(folder, **changes):
    actor = Classifier(classifier(folder, **changes), [f"a{number}" for number in range(len(ANSWERS))])
    actor.folder = folder
    return actor


def scored(actor, prompts):
    answers = {f"a{number}": answer for number, answer in enumerate(ANSWERS)}
    rows = [{"prompt_id": str(number), "prompt": prompt, **answers} for number, prompt in enumerate(prompts)]
    found = actor(pa.Table.from_pylist(rows)).to_pylist()
    return [[row[f"{name}_scores"]["rm"] for name in answers] for row in found]


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen3", "gemma2", "mistral"])
def test_packed_scores_are_those_of_one_conversation_alone(tmp_path, monkeypatch, kind):
    actor = opened(reward_model(tmp_path, kind, monkeypatch))
    assert actor.packed
    scores = scored(actor, [PROMPT, LONG])
    for prompt, row in zip((PROMPT, LONG), scores, strict=True):
        for answer, score in zip(ANSWERS, row, strict=True):
            assert score == pytest.approx(alone(actor, prompt, answer), abs=1e-5)
        assert len({round(score, 4) for score in row}) == len(set(ANSWERS))
    assert actor.score([LONG], [ANSWERS[1]]) == [pytest.approx(scores[1][1], abs=1e-5)]


def test_layouts_give_the_same_scores(tmp_path, monkeypatch):
    folder = reward_model(tmp_path, "llama", monkeypatch)
    packed, padded = opened(folder), opened(folder, layout="padded", batch_size=3)
    assert packed.packed and not padded.packed
    for one, other in zip(scored(packed, [PROMPT, LONG]), scored(padded, [PROMPT, LONG]), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_conversation_that_is_cut_on_the_left_is_scored_as_it_is_read(tmp_path, monkeypatch):
    actor = opened(reward_model(tmp_path, "llama", monkeypatch), max_length=60)
    for answer, score in zip(ANSWERS, scored(actor, [LONG])[0], strict=True):
        assert score == pytest.approx(alone(actor, LONG, answer), abs=1e-5)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_a_cap_on_attention_is_kept_in_either_layout(tmp_path, monkeypatch, layout):
    """transformers' default attention leaves it out without a word."""
    actor = opened(reward_model(tmp_path, "gemma2", monkeypatch), layout=layout)
    usual = AutoModelForSequenceClassification.from_pretrained(actor.folder, attn_implementation="sdpa").eval()
    ids = torch.tensor([actor.input_ids(LONG, ANSWERS[1])["input_ids"]])
    with torch.no_grad():
        without = usual(input_ids=ids).logits[0, 0].item()
    right = alone(actor, LONG, ANSWERS[1])
    assert abs(right - without) > 1e-3
    assert scored(actor, [LONG])[0][1] == pytest.approx(right, abs=1e-5)


def test_scores_without_the_cap_are_made_again_and_those_of_other_models_are_not(tmp_path, monkeypatch, job_table):
    found = {}
    for kind in ("gemma2", "llama"):
        reward = classifier(reward_model(tmp_path / kind, kind, monkeypatch))
        found[kind] = ClassifierKind(reward).settings(Job.model_validate(job_table))
    assert found["gemma2"]["attention"] == "capped"
    assert "attention" not in found["llama"]


def test_an_architecture_that_is_not_exact_in_packed_rows_reads_padded_ones(tmp_path, monkeypatch):
    actor = opened(reward_model(tmp_path, "phimoe", monkeypatch))
    assert actor.packed is None
    scores = scored(actor, [LONG])[0]
    assert all(map(math.isfinite, scores))
    for answer, score in zip(ANSWERS, scores, strict=True):
        assert score == pytest.approx(alone(actor, LONG, answer), abs=1e-5)


def test_a_row_that_the_template_refuses_has_no_score_and_its_neighbours_have_theirs(tmp_path, monkeypatch):
    actor = opened(reward_model(tmp_path, "llama", monkeypatch))
    refused = [{"role": "user", "content": "no"}]
    plain = actor.input_ids

    def input_ids(prompt, answer):
        if prompt == refused and answer == "x":
            raise ValueError("refused")
        return plain(prompt, answer)

    actor.input_ids = input_ids
    answers = {f"a{number}": answer for number, answer in enumerate(ANSWERS)}
    rows = [{"prompt_id": str(n), "prompt": one, **answers} for n, one in enumerate((LONG, refused, PROMPT))]
    first, second, third = actor(pa.Table.from_pylist(rows)).to_pylist()
    assert (first["dropped"], second["dropped"], third["dropped"]) == (None, "reward rm: refused", None)
    assert math.isnan(second["a2_scores"]["rm"])
    assert third["a1_scores"]["rm"] == pytest.approx(alone(actor, PROMPT, ANSWERS[1]), abs=1e-5)
