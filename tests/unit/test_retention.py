"""Conversations that the training is not about: what can be used, and what their perplexity has become."""

import math

import pytest

from rdpo.config import Job, Retention
from rdpo.evaluation.retention import answer_of, summary, table, texts
from tests.support.jobs import write_jsonl


def test_perplexity_grows_by_the_nats_lost_per_token():
    rows = [{"kl": -0.2 * tokens, "kl_length": tokens} for tokens in (5, 10, 40)]
    found = summary(rows)
    assert found["texts"] == 3
    factor = found["perplexity_factor"]
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


def measured(*factors, tokens=10):
    return [
        {"prompt_id": f"p{place}", "kl": -math.log(factor) * tokens, "kl_length": tokens}
        for place, factor in enumerate(factors)
    ]


def test_arms_are_summarised_by_geometric_means_over_texts_and_seeds():
    assert table({("a", 0): measured(1.0, 1.0), ("a", 1): measured(1.5, 1.5)})[-1].startswith("a  1.225 (")
    # Texts that gain and lose the same: one seed's interval holds 1 widely, and so does that of two.
    seeds = {("a", seed): measured(2.0, 0.5, 2.0, 0.5) for seed in (0, 1)}
    single = summary(measured(2.0, 0.5, 2.0, 0.5))["perplexity_factor"]
    low, high = (float(end) for end in table(seeds)[-1].split("(")[1].rstrip(")").split(" to "))
    assert (low, high) == pytest.approx((single["low"], single["high"]), rel=0.02)
    assert table({}) == []


def test_only_texts_that_every_run_measured_count():
    lines = table({("a", 0): measured(1.0, 1.0, 9.0), ("b", 0): measured(2.0, 2.0)})
    assert lines[1] == "other texts, 2"
    assert [line.split()[1] for line in lines[-2:]] == ["1.000", "2.000"]
