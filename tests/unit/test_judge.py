"""A judge's scores from its engine's replies, with an engine that answers by rule."""

import asyncio
import math

import pyarrow as pa
import pytest

from rdpo.config import Job, JudgeReward
from rdpo.preference.rewards import judge as judge_module
from rdpo.preference.rewards.judge import Judge
from rdpo.synthesis.engine import ContextError, Generation
from tests.support.crash_counts import NoCrashCounts


class Engine:
    """Prefers what stands first, and what is longer; writes a rating that depends on the seed."""

    def __init__(self, folder, settings, seed):
        self.asked = []

    async def generate(self, prompt_ids, sampling, seed, stop_ids, logprobs=0, logprob_token_ids=()):
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
