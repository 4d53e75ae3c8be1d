"""Drafts from a conversation's own text: who has them, what they do not go with, and where they would pay."""

import pytest

from rdpo.config import Engine, Job
from rdpo.config.task import Task
from rdpo.synthesis.engine import engine_arguments
from rdpo.synthesis.lookup import MATCH, proposals, repeated, repeated_shares

TABLE = {
    "name": "tiny",
    "student": {"model": "none"},
    "prompts": {"source": "none.jsonl"},
    "rewards": [{"kind": "function", "name": "length", "function": "tests.rewards:length"}],
}
JUDGED = {"kind": "judge", "name": "j", "model": "m", "rubric": "quality"}
TASK = Task.model_validate(
    {
        "name": "t",
        "turns": [
            {"name": "response"},
            {"name": "critique", "after": "response", "user": "What is wrong?"},
            {"name": "revision", "after": "critique", "user": "Again."},
        ],
    }
)
ANSWER = "the quick brown fox jumps over the lazy dog and runs away into the deep dark forest"


def job_with(engine=None, sampling=None, **synthesis):
    spoken = {"task": "roleplay", "engine": engine or {}, "sampling": sampling or {}, **synthesis}
    return Job.model_validate({**TABLE, "synthesis": spoken})


def test_an_engine_drafts_where_the_job_says_so_and_nowhere_else():
    assert "speculative_config" not in engine_arguments("model", Engine(), 0)
    config = engine_arguments("model", Engine(prompt_lookup=True), 0)["speculative_config"]
    assert (config["method"], config["prompt_lookup_min"], config["prompt_lookup_max"]) == ("ngram", MATCH, MATCH)


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


def test_what_is_copied_is_drafted_once_it_is_seen_to_be_copied():
    words = len(ANSWER.split())
    # The first words are written one by one, until as many stand there as are looked for.
    assert repeated(ANSWER, f"Say this: {ANSWER}") == (words - MATCH, words)
    assert repeated(ANSWER, "something else altogether, and nothing of it") == (0, words)


def test_a_word_that_is_changed_ends_a_draft():
    changed = ANSWER.replace("lazy", "tired")
    drafted, words = repeated(changed, ANSWER)
    # Four words before the first draft, the changed one, and three more until four stand there again.
    assert (drafted, words) == (words - MATCH - 1 - MATCH, len(ANSWER.split()))


def test_what_an_answer_repeats_of_itself_counts():
    drafted, words = repeated("one two three four " * 10, "")
    assert drafted >= words - 2 * MATCH


def test_shares_are_of_the_turns_that_go_on_after_others():
    row = {"prompt": [{"role": "user", "content": "Tell."}], "response": ANSWER, "critique": "Too long, I think."}
    shares = repeated_shares([{**row, "revision": ANSWER}, {**row, "revision": None}], TASK)
    assert shares["critique"] == 0
    assert shares["revision"] == pytest.approx((16 - MATCH) / 16, abs=0.07)


def test_a_run_says_where_drafts_would_pay():
    shares = {"critique": 0.1, "revision": 0.62}
    assert list(proposals(job_with(), shares)) == [
        "revision repeats 62% of its words; engine.prompt_lookup = true has them drafted"
    ]
    assert not list(proposals(job_with({"prompt_lookup": True}), shares))
    server = {"url": "http://teacher/v1", "model": "m"}
    assert not list(proposals(job_with(endpoint=server), shares))


def test_a_job_that_does_not_say_has_the_key_that_it_had():
    assert "prompt_lookup" not in Engine().model_dump()
    assert Engine(prompt_lookup=True).model_dump()["prompt_lookup"] is True
