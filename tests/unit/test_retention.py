"""Conversations that the training is not about: what can be used, and what their perplexity has become."""

import math

import pytest

from rdpo.config import Job, Retention
from rdpo.evaluation.retention import answer_of, summary, table, texts
from tests.support.jobs import write_jsonl


def test_perplexity_grows_by_the_nats_lost_per_token():
    rows = [{"kl": -0.2 * tokens, "kl_length": tokens} for tokens in (5, 10, 40)]
    told = summary(rows, seed=0)
    assert told["texts"] == 3
    factor = told["perplexity_factor"]
    assert [factor[end] for end in ("mean", "low", "high")] == pytest.approx([math.exp(0.2)] * 3)


def test_a_text_without_an_answer_is_dropped_and_one_with_another_answer_is_another():
    row = {"prompt_id": "p", "prompt": [], "extra": '{"good": " yes ", "bad": 3}'}
    assert answer_of(row, "good")["answer"] == "yes"
    assert answer_of(row, "good")["prompt_id"] != "p"
    assert answer_of(row, "bad")["dropped"] == "bad: no text"


@pytest.mark.ray
def test_every_line_is_accounted_for(job_table, tmp_path, ray_cluster):
    lines = [
        {"prompt": "q", "answer": "a"},
        {"prompt": "q", "answer": "b"},
        {"prompt": "q", "answer": "a"},
        {"prompt": ""},
    ]
    write_jsonl(tmp_path / "texts.jsonl", lines)
    source = Retention(source=str(tmp_path / "texts.jsonl"))
    rows = texts(Job.model_validate(job_table), source)
    assert len({row["prompt_id"] for row in rows}) == 4
    assert sorted(str(row.get("dropped")) for row in rows) == [
        "None",
        "None",
        "duplicate of an earlier text",
        "prompt: empty",
    ]


def test_arms_are_told_by_their_means_over_the_seeds():
    told = {
        ("a", seed): {"texts": 2, "perplexity_factor": dict.fromkeys(("mean", "low", "high"), f)}
        for seed, f in ((0, 1.0), (1, 1.5))
    }
    assert table(told)[-1] == "a  1.250 (1.250 to 1.250)"
    assert table({}) == []
