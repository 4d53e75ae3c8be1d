"""Drafts from a conversation's own text: who has them, and what they do not go together with."""

import pytest

from rdpo.config import Endpoint, Engine, Job
from rdpo.config.task import Turn
from rdpo.synthesis.engine import engine_arguments
from rdpo.synthesis.lookup import lookup_arguments, why_without, with_lookup

TABLE = {
    "name": "tiny",
    "student": {"model": "none"},
    "prompts": {"source": "none.jsonl"},
    "rewards": [{"kind": "function", "name": "length", "function": "tests.rewards:length"}],
}
JUDGED = {"kind": "judge", "name": "j", "model": "m", "rubric": "quality"}
ALONE = [Turn(name="response"), Turn(name="other")]
REVISED = [Turn(name="response"), Turn(name="revision", after="response", user="Again.")]


def job_with(engine=None, sampling=None, **synthesis):
    spoken = {"task": "roleplay", "engine": engine or {}, "sampling": sampling or {}, **synthesis}
    return Job.model_validate({**TABLE, "synthesis": spoken})


def drafts(job, turns):
    return "speculative_config" in engine_arguments("model", with_lookup(job, turns).synthesis.engine, 0)


def test_a_speaker_of_turns_that_go_over_an_answer_drafts_on_the_cpu():
    assert drafts(job_with(), REVISED)
    assert not drafts(job_with(), ALONE)
    assert not drafts(job_with({"gpus": 1}), REVISED)


def test_the_job_decides_where_it_says_so():
    assert drafts(job_with({"prompt_lookup": True}), ALONE)
    assert drafts(job_with({"prompt_lookup": True, "gpus": 1}), ALONE)
    assert not drafts(job_with({"prompt_lookup": False}), REVISED)


def test_no_other_engine_drafts_by_itself():
    assert "speculative_config" not in engine_arguments("model", Engine(), 0)
    assert lookup_arguments(Engine(prompt_lookup=True))["speculative_config"]["method"] == "ngram"


@pytest.mark.parametrize(
    ("engine", "sampling", "said"),
    [
        ({}, {"min_p": 0.1}, "min_p"),
        ({"options": {"speculative_config": {"method": "suffix"}}}, {}, "speculative_config of its own"),
    ],
)
def test_what_does_not_go_with_drafts_is_said_and_goes_the_slower_way(engine, sampling, said):
    job = job_with(engine, sampling)
    assert not drafts(job, REVISED)
    assert said in why_without(job, REVISED)
    # Nobody expected any there.
    assert not why_without(job, ALONE)
    assert not why_without(job_with(), REVISED)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"engine": {"prompt_lookup": True}, "sampling": {"min_p": 0.1}}, "synthesis: vLLM does not draft with min_p"),
        (
            {"engine": {"prompt_lookup": True, "options": {"speculative_config": {}}}},
            "options have a speculative_config of their own",
        ),
        (
            {"voices": {"v": {"sampling": {"min_p": 0.1}, "engine": {"prompt_lookup": True}}}},
            "synthesis.voices.v: vLLM does not draft",
        ),
    ],
)
def test_drafts_that_are_asked_for_and_cannot_be_are_refused(table, said):
    with pytest.raises(ValueError, match=said):
        job_with(**table)


def test_a_judge_that_is_to_draft_is_refused():
    rewards = [{**JUDGED, "engine": {"prompt_lookup": True}}]
    with pytest.raises(ValueError, match=r"j: engine.prompt_lookup: a score repeats nothing"):
        Job.model_validate({**TABLE, "synthesis": {"task": "roleplay"}, "rewards": rewards})


def test_a_server_is_sent_no_drafts():
    server = Endpoint(url="http://teacher/v1", model="m").model_dump()
    assert not drafts(job_with(endpoint=server), REVISED)


def test_a_job_that_does_not_say_has_the_key_that_it_had():
    assert "prompt_lookup" not in Engine().model_dump()
    assert Engine(prompt_lookup=False).model_dump()["prompt_lookup"] is False
