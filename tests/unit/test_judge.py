"""A judge's scores from its engine's replies, with an engine that answers by rule."""

import asyncio
import json
import math

import pyarrow as pa
import pytest

from rdpo.config import Job, JudgeReward
from rdpo.preference.ratings import json_rating
from rdpo.preference.rewards import judge as judge_module
from rdpo.preference.rewards.judge import Judge
from rdpo.synthesis.engine import ContextError, Generation
from tests.support.crash_counts import NoCrashCounts


class Engine:
    """Prefers what stands first, and what is longer; writes a rating that depends on the seed."""

    def __init__(self, folder, settings, seed):
        self.asked = []

    async def generate(
        self, prompt_ids, sampling, seed, stop_ids, logprobs=0, logprob_token_ids=(), structured_outputs=None
    ):
        if structured_outputs:
            allowed = structured_outputs.json["properties"]["rating"]["enum"]
            return Generation(json.dumps({"reason": "5 flaws", "rating": allowed[seed % len(allowed)]}), "stop", 3)
        if len(prompt_ids) > 300:
            raise ContextError("conversation fills engine.max_model_len")
        self.asked.append((bytes(token - 2 for token in prompt_ids if token > 1), seed))
        chances = (math.log(0.8), math.log(0.2))
        return Generation(
            f"It has 9 flaws. Overall: {-(seed % 3)}", "stop", 3, dict(zip(logprob_token_ids, chances, strict=False))
        )

    def shutdown(self):
        pass


@pytest.fixture
def judged(job_table, monkeypatch):
    monkeypatch.setattr(judge_module, "Engine", Engine)

    def judge_row(row, answers, **settings):
        reward = JudgeReward.model_validate({"kind": "judge", "name": "j", **settings})
        judge = Judge(reward, answers, Job.model_validate(job_table), NoCrashCounts)
        table = pa.Table.from_pylist([{"prompt_id": "p", "prompt": [{"role": "user", "content": "q"}], **row}])

        async def blocks():
            return [block async for block in judge(table)]

        return asyncio.run(blocks())[0].to_pylist()[0], judge.engine.asked

    return judge_row


def test_a_pair_is_shown_in_both_orders_so_that_a_love_of_the_first_place_cancels(judged):
    rubric = "{{ prompt }} {{ first }} {{ second }}"
    row, asked = judged({"a": "x", "b": "y"}, ["a", "b"], rubric=rubric, pairwise=True, ratings=["A", "B"])
    assert row["a_scores"]["j"] == pytest.approx(0.5)
    assert row["b_scores"]["j"] == pytest.approx(0.5)
    assert len(asked) == 2


def test_written_votes_are_averaged_and_drawn_with_seeds_of_their_own(judged):
    settings = {"rubric": "{{ answer }}", "score": "written", "ratings": ["-5", "5"], "votes": 4}
    row, asked = judged({"a": "x"}, ["a"], **settings)
    seeds = [seed for _, seed in asked]
    assert len(set(seeds)) == 4
    assert row["a_scores"]["j"] == pytest.approx(-sum(seed % 3 for seed in seeds) / 4)


def test_a_question_that_does_not_fit_drops_its_row_with_the_reason(judged):
    row, _ = judged({"a": "x" * 400}, ["a"], rubric="{{ answer }}", ratings=["1", "5"])
    assert row["dropped"] == "reward j: conversation fills engine.max_model_len"
    row, _ = judged({"a": "x"}, ["a"], rubric="{{ answer }}", score="written", ratings=["1", "2"])
    assert row["dropped"] == "reward j: score of a is not a finite number"


def test_a_reply_of_json_is_held_to_the_ratings(judged):
    settings = {"rubric": "{{ answer }}", "score": "json", "ratings": ["1", "2.5"], "votes": 8}
    row, _ = judged({"a": "x"}, ["a"], **settings)
    assert 1 < row["a_scores"]["j"] < 2.5
    assert JudgeReward(kind="judge", name="j", **settings).reply_schema == {
        "type": "object",
        "properties": {"reason": {"type": "string", "maxLength": 500}, "rating": {"enum": [1, 2.5]}},
        "required": ["reason", "rating"],
        "additionalProperties": False,
    }
    words = JudgeReward(kind="judge", name="j", rubric="{{ answer }}", score="json", ratings=["bad", "good"])
    assert words.reply_schema["properties"]["rating"] == {"enum": [0, 1]}


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ('{"rating": 3}', 3),
        ('{"reason": "1 of 5", "rating": 2.5}', 2.5),
        ('{"rating": 6}', math.nan),
        ('{"rating": "3"}', math.nan),
        ('{"rating": true}', math.nan),
        ('{"reason": "it was cut of', math.nan),
        ("[3]", math.nan),
        ("3", math.nan),
        ("", math.nan),
    ],
)
def test_the_rating_of_a_json_reply(reply, rating):
    assert json_rating(reply, 1, 5) == pytest.approx(rating, nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": "json", "prefill": "x"}, "prefill: a reply in JSON"),
        ({"json_schema": {"properties": {"rating": {}}}}, "json_schema is that of an object"),
        ({"score": "json", "json_schema": {"type": "object"}}, "json_schema is that of an object"),
        ({"score": "json", "pairwise": True, "ratings": ["A", "B"]}, "pairwise takes two"),
    ],
)
def test_a_schema_that_has_no_rating_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        JudgeReward.model_validate({"kind": "judge", "name": "j", "rubric": "{{ answer }}", **changes})
