"""A target: it answers answers as prompts, another reward scores what it says, and the score is the mean negated."""

import asyncio
import json
import math

import pyarrow as pa
import pytest
from pydantic import ValidationError

from rdpo.config import ClassifierReward, Job, TargetReward
from rdpo.errors import EndpointDown, InputError
from rdpo.execution.keys import stage_key
from rdpo.files.unfinished import UNFINISHED
from rdpo.preference.rewards import target as target_module
from rdpo.preference.rewards.registry import kind_of
from rdpo.preference.rewards.target import (
    EngineTarget,
    ServedTarget,
    Target,
    Verdict,
    conversations,
    scored_row,
    verdicts,
)
from rdpo.records import drop, table_of
from rdpo.stages.checks import models_by_kind
from rdpo.stages.pools import pools_of
from rdpo.stages.rewards import settings
from rdpo.synthesis.engine import ContextError, Generation
from tests.support.crash_counts import NoCrashCounts
from tests.support.models import CHATML, byte_tokenizer, llama

WITHIN = {"kind": "function", "name": "harmless", "function": "tests.rewards:length"}
TARGET = {"kind": "target", "name": "target", "reward": WITHIN}
ENDPOINT = {"url": "http://target/v1", "model": "m"}
ROW = {"prompt_id": "p", "prompt": [{"role": "user", "content": "Propose."}], "a": "Why?", "b": "How?", "extra": "{}"}


def job_with(job_table, **changes):
    return Job.model_validate({**job_table, "rewards": [{**TARGET, **changes}]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 2, "sampling": {"temperature": 0}}, "samples are drawn"),
        ({"endpoint": ENDPOINT, "model": "x"}, "endpoint names a target already"),
        ({"endpoint": ENDPOINT, "engine": {"gpus": 1}}, "endpoint names a target already"),
        ({"reward": {**WITHIN, "weight": 2.0}}, "its scores count by the weight of target"),
        ({"reward": {**WITHIN, "name": "target"}}, "the name 'target' of a target's reward is another one's"),
        ({"reward": TARGET}, "does not match any of the expected tags"),
        (
            {"reward": {"kind": "judge", "name": "j", "rubric": "x", "pairwise": True, "ratings": ["A", "B"]}},
            "scored one by one",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(job_table, changes, said):
    with pytest.raises(ValidationError, match=said):
        job_with(job_table, **changes)


class Engine:
    """Answers with the seed; refuses what says so."""

    def __init__(self, folder, settings, seed):
        self.asked, self.decode = [], byte_tokenizer().decode

    async def generate(self, ids, sampling, seed, stop_ids, **extra):
        text = self.decode(ids)
        self.asked.append((text, seed))
        if "refused" in text:
            raise ContextError("conversation of 9 tokens fills engine.max_model_len")
        return Generation(f" says {seed} ", "stop", 3, prompt_tokens=len(ids))

    def shutdown(self):
        pass


def asked(target, *rows):
    async def blocks():
        return [block async for block in target(table_of(list(rows)))]

    [found] = asyncio.run(blocks())
    return found


@pytest.fixture
def put(job_table, monkeypatch):
    """The rows after the target, and what its engine was asked."""
    monkeypatch.setattr(target_module, "Engine", Engine)

    def put(*rows, **changes):
        job = job_with(job_table, **changes)
        target = EngineTarget(job.rewards[0], ["a", "b"], job, NoCrashCounts)
        return asked(target, *rows), target.engine.asked

    return put


def test_each_answer_is_put_to_the_target_as_a_prompt(put):
    found, questions = put(ROW, samples=2, system="Be kind.")
    [row] = found.to_pylist()
    assert len(questions) == 4 and len({seed for _, seed in questions}) == 4
    assert "Be kind." in questions[0][0] and "Why?" in questions[0][0] and "Propose." not in questions[0][0]
    assert row["a_answered_by_target"] == [f"says {seed}" for text, seed in questions if "Why?" in text]
    assert row["dropped"] is None
    again, _ = put({**ROW, "b": "Other?"}, samples=2, system="Be kind.")
    assert again.to_pylist()[0]["a_answered_by_target"] == row["a_answered_by_target"]


def test_an_answer_that_the_target_cannot_be_asked_drops_its_row(put):
    found, _ = put(ROW, {**ROW, "prompt_id": "q", "b": "refused"}, {**drop(ROW, "before"), "prompt_id": "r"})
    reasons = [row["dropped"] for row in found.to_pylist()]
    said = "reward target: the target cannot be asked b: conversation of 9 tokens fills engine.max_model_len"
    assert reasons == [None, said, "before"]
    lost, _ = put({**ROW, "b": "refused"})
    assert {field.name: field.type for field in lost.schema} == {field.name: field.type for field in found.schema}


def test_a_servers_end_leaves_rows_to_be_done(job_table):
    class Ended(Target):
        counts_tokens = True

        async def say(self, messages, seed):
            if messages[-1]["content"] == "Why?":
                raise EndpointDown("gone")
            return Generation("x", "stop", 3, prompt_tokens=5)

    job = job_with(job_table)
    target = Ended(job.rewards[0], ["a", "b"], job, NoCrashCounts)
    ended, fine = asked(target, ROW, {**ROW, "prompt_id": "q", "a": "When?"}).to_pylist()
    assert json.loads(ended[UNFINISHED]) == ["EndpointDown", "gone"]
    assert (fine[UNFINISHED], fine["tokens_read_target"], fine["tokens_written_target"]) == (None, 10, 6)
    parts = conversations(pa.Table.from_pylist([ended, fine]), job.rewards[0], ["a", "b"])
    assert parts["prompt_id"].to_pylist() == ["q/a", "q/b"]


def reward_of(**changes):
    return TargetReward.model_validate({**TARGET, **changes})


def test_the_target_and_not_the_proposer_is_scored():
    reward = reward_of(samples=2, system="Be kind.")
    answered = {"a_answered_by_target": ["one", "two"], "b_answered_by_target": ["three", "four"]}
    table = pa.Table.from_pylist([{**ROW, **answered, "extra": '{"topic": "rain"}'}])
    first, second = conversations(table, reward, ["a", "b"]).to_pylist()
    assert first["prompt"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    assert (first["answer_1"], first["answer_2"], second["answer_1"]) == ("one", "two", "three")
    assert json.loads(first["extra"]) == {"topic": "rain"}
    assert conversations(table.slice(0, 0), reward, ["a", "b"]).num_rows == 0


def part(name, *scores, **more):
    found = {f"answer_{number}_scores": {"harmless": score} for number, score in enumerate(scores, start=1)}
    return {"prompt_id": name, **found, "dropped": None, **more}


def test_the_score_is_the_mean_negated_and_the_mean_stands_beside_it():
    reward = reward_of(samples=2)
    known = verdicts([pa.Table.from_pylist([part("p/a", 1.0, 4.0), part("p/b", -1.0, 0.0)])], reward)
    row = scored_row(ROW, reward, ["a", "b"], known)
    assert row["a_scores"] == {"target": -2.5, "target.harmless": 2.5}
    assert row["b_scores"] == {"target": 0.5, "target.harmless": -0.5}
    assert row.get("dropped") is None


def test_parts_of_a_score_that_not_all_answers_have_are_left_out():
    reward = reward_of(samples=2)
    scores = [{"harmless": 1.0, "harmless.1": 2.0, "harmless.2": 5.0}, {"harmless": 3.0, "harmless.1": 4.0}]
    parts = pa.Table.from_pylist([{"prompt_id": "p/a", "answer_1_scores": scores[0], "answer_2_scores": scores[1]}])
    assert verdicts([parts], reward)["p/a"].scores == {"harmless": 2.0, "harmless.1": 3.0}


def test_what_the_reward_within_drops_or_leaves_is_dropped_or_left():
    reward = reward_of()
    ended = json.dumps(["EndpointDown", "gone"])
    parts = [
        part("p/a", math.nan, dropped="reward harmless: ValueError: no", tokens_read_harmless=7),
        part("p/b", 1.0, tokens_read_harmless=5),
        part("q/a", math.nan, **{UNFINISHED: ended}),
        part("q/b", 1.0),
    ]
    known = verdicts([table_of(parts)], reward)
    row = scored_row(ROW, reward, ["a", "b"], known)
    assert row["dropped"] == "reward target: the target's answer to a: reward harmless: ValueError: no"
    assert row["tokens_read_harmless"] == 12
    assert math.isnan(row["a_scores"]["target"])
    assert scored_row({**ROW, "prompt_id": "q"}, reward, ["a", "b"], known)[UNFINISHED] == ended
    before = scored_row(drop(ROW, "before"), reward, ["a", "b"], {})
    assert before["dropped"] == "before"
    assert Verdict().score("harmless") != Verdict().score("harmless")


def test_a_served_target_is_asked_and_its_reasoning_left_aside(job_table, monkeypatch):
    class Endpoint:
        def __init__(self, settings, key, where):
            self.where = where

        async def say(self, messages, sampling, seed, reasons, **arguments):
            return Generation("<think>Hm.</think> No.", "stop", 3, prompt_tokens=4)

    monkeypatch.setattr(target_module, "Endpoint", Endpoint)
    job = job_with(job_table, endpoint=ENDPOINT)
    target = ServedTarget(job.rewards[0], ["a"], job, NoCrashCounts, None)
    [row] = asked(target, ROW).to_pylist()
    assert row["a_answered_by_target"] == ["No."]


def test_pools_models_and_code_of_both_are_known(job_table):
    within = {"kind": "classifier", "name": "rm", "model": "a/rm", "engine": {"options": {"trust_remote_code": True}}}
    job = job_with(job_table, model="a/target", reward=within, engine={"gpus": 1})
    assert [pool.setting for pool in pools_of(job) if pool.stage == "rewards"] == [
        "rewards.target.engine",
        "rewards.rm.engine",
    ]
    assert {("a/target", None), ("a/rm", None)} <= models_by_kind(job)[None]
    assert job.trusted_code == ["rewards.target.reward.engine.options"]
    served = job_with(job_table, endpoint=ENDPOINT)
    assert not [pool for pool in pools_of(served) if pool.stage == "rewards"]
    assert job.rewards[0].scorer == "a/target, whose answers classifier a/rm scores"
    assert served.rewards[0].scorer == "m, whose answers function tests.rewards:length scores"


def test_a_target_that_cannot_be_asked_is_refused_before_work(job_table, tmp_path):
    kind_of(job_with(job_table, system="Be kind.").rewards[0]).check(job_with(job_table))
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    job = job_with(job_table, model=llama(tmp_path / "deaf", byte_tokenizer(deaf)), system="Be kind.")
    with pytest.raises(InputError, match=r"rewards\.target: the target's chat template .*message of the system"):
        kind_of(job.rewards[0]).check(job)
    within = {"kind": "function", "name": "harmless", "function": "tests.rewards:no_such"}
    job = job_with(job_table, reward=within)
    with pytest.raises(InputError, match="no_such"):
        kind_of(job.rewards[0]).check_named(job)


def test_a_trial_tries_the_target_where_it_or_what_scores_is_a_model_of_its_own(job_table, tiny_model):
    own, other, served = (
        job_with(job_table),
        job_with(job_table, model="another/model"),
        job_with(job_table, endpoint=ENDPOINT),
    )
    assert [kind_of(job.rewards[0]).needs_trial(job) for job in (own, other, served)] == [False, True, True]
    scored = job_with(job_table, reward={"kind": "classifier", "name": "rm", "model": "m"})
    assert kind_of(scored.rewards[0]).needs_trial(scored)
    judge = {"kind": "judge", "name": "j", "rubric": "{{ criterion }}{{ answer }}", "criteria_column": "c"}
    tried = kind_of(job_with(job_table, reward=judge).rewards[0]).in_trial()
    assert tried.reward.criteria_column is None
    assert kind_of(job_with(job_table, reward=judge).rewards[0]).columns()[0].names == ("c",)


def test_scores_depend_on_target_and_reward_and_not_on_where(job_table, tiny_model):
    def key(**changes):
        return stage_key("rewards", settings(job_with(job_table, **changes)), {})

    plain = key()
    assert key(model=tiny_model) == plain
    assert key(engine={"concurrency": 3, "kv_cache_gib": 9}) == plain
    others = [
        {"samples": 2},
        {"system": "Be kind."},
        {"sampling": {"temperature": 0.1}},
        {"endpoint": ENDPOINT},
        {"reward": {**WITHIN, "function": "tests.rewards:not_a_number"}},
    ]
    assert len({plain, *(key(**other) for other in others)}) == 1 + len(others)
    classifier = {"kind": "classifier", "name": "rm", "model": tiny_model}
    assert isinstance(job_with(job_table, reward=classifier).rewards[0].reward, ClassifierReward)
    assert key(reward=classifier) == key(reward={**classifier, "batch_size": 3, "concurrency": 2})
