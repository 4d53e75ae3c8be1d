"""Kinds of rewards: a job file and the code know the same ones, and each says what the stages ask of it."""

import subprocess
import sys
from typing import get_args

import pytest

from rdpo.config import FunctionReward, Job, JudgeReward, Reward, load_job, to_toml
from rdpo.errors import InputError
from rdpo.preference.rewards import check_named_rewards
from rdpo.preference.rewards.registry import KINDS, check_registry, kind_of


def job_of(job_table, *rewards):
    return Job.model_validate({**job_table, "rewards": list(rewards)})


def test_a_kind_without_code_or_without_a_section_is_refused():
    sections = get_args(get_args(Reward)[0])
    check_registry(KINDS, sections)
    with pytest.raises(TypeError, match="JudgeReward"):
        check_registry({section: kind for section, kind in KINDS.items() if section is not JudgeReward}, sections)
    with pytest.raises(TypeError, match="FunctionReward"):
        check_registry(KINDS, [section for section in sections if section is not FunctionReward])


def test_the_registry_is_light():
    heavy = ("torch", "ray", "transformers", "vllm")
    code = f"import sys, rdpo.preference.rewards; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_which_rewards_are_tried_without_pairs_of_the_user(job_table):
    judge = {"kind": "judge", "name": "judge", "rubric": "{{ answer }}"}
    job = job_of(
        job_table,
        {"kind": "classifier", "name": "rm", "model": "m"},
        {"kind": "implicit", "name": "own", "reference": "m"},
        judge,
        {**judge, "name": "other", "model": "another/judge"},
        job_table["rewards"][0],
    )
    assert [kind_of(reward).needs_trial(job) for reward in job.rewards] == [True, True, False, True, False]
    assert [kind_of(reward).seeded for reward in job.rewards] == [False, False, True, True, False]


def test_the_policys_own_reward_is_measured_against_what_it_was_trained_from(job_table):
    own = {"kind": "implicit", "name": "own", "reference": "m"}
    other = {**own, "name": "fixed", "model": "n"}
    job = job_of(job_table, own, other, {"kind": "classifier", "name": "rm", "model": "m"})
    rewards = [kind_of(reward).against("start") for reward in job.rewards]
    assert [reward.reference for reward in rewards[:2]] == ["start", "m"]
    assert rewards[2] is job.rewards[2]


def test_a_rubric_that_cannot_be_filled_is_found_without_a_model(job_table):
    job = job_of(job_table, {"kind": "judge", "name": "judge", "model": "no/such", "rubric": "{{ reply }}"})
    with pytest.raises(InputError, match=r"rewards.judge.rubric uses reply"):
        check_named_rewards(job)


def test_engines_whose_model_may_run_code_are_named(job_table):
    engine = {"options": {"trust_remote_code": True}}
    job = job_of(job_table, {"kind": "judge", "name": "judge", "rubric": "{{ answer }}", "engine": engine})
    assert job.trusted_code == ["rewards.judge.engine.options"]


@pytest.mark.parametrize(
    "reward",
    [
        {"kind": "classifier", "model": "m"},
        {"kind": "classifier", "model": "m", "engine": {"gpus": 4}, "outputs": {"helpful": 1.0}},
        {"kind": "judge", "rubric": "x"},
        {"kind": "judge", "rubric": "x", "endpoint": {"url": "http://j/v1", "model": "m"}, "top_logprobs": 5},
        {"kind": "judge", "rubric": "x", "endpoint": {"url": "http://j/v1", "model": "m"}, "criteria_column": "c"},
        {"kind": "judge", "rubric": "x", "engine": {"gpus": 1}, "criteria": [{"name": "c", "text": "x"}]},
        {"kind": "implicit", "model": "m"},
        {"kind": "endpoint", "url": "http://rm", "api": "json"},
        {"kind": "endpoint", "url": "http://rm", "api": "score", "activation": True},
        {"kind": "endpoint", "url": "http://rm", "api": "classify", "tokenizer": "m", "max_length": 64},
    ],
)
def test_a_resolved_job_is_read_back_as_it_is(job_table, tmp_path, reward):
    # Every run writes its job down so, and goes on with what is written.
    job = job_of(job_table, {"name": "r", **reward})
    (tmp_path / "job.toml").write_text(to_toml(job), encoding="utf-8")
    assert load_job(tmp_path / "job.toml") == job
