"""Several speakers: who speaks which turn, in which order models are asked, and that the texts do not depend on it."""

import asyncio
import re
import tomllib
from collections import Counter

import pyarrow as pa
import pytest

from rdpo.config import Job, Pairs
from rdpo.config.task import Task
from rdpo.errors import InputError
from rdpo.execution.keys import stage_key
from rdpo.preference.agreement import count_voices
from rdpo.preference.pairs import exchanged, pair_row
from rdpo.stages.pools import pools_of
from rdpo.stages.synthesis import settings
from rdpo.synthesis.engine import Generation
from rdpo.synthesis.instructions import check_fields, load_task
from rdpo.synthesis.teacher import Conversation, Teacher
from rdpo.synthesis.voices import Leg, check_voices, drawn_voices, legs, models_named, spoken_by
from tests.support.crash_counts import NoCrashCounts

DELTA = """
name = "two"

[[turns]]
name = "strong"
voice = "big"

[[turns]]
name = "weak"
"""
CRITIC = """
name = "critic"

[[turns]]
name = "response"

[[turns]]
name = "critique"
after = "response"
user = "What is wrong?"
voice = "critic"

[[turns]]
name = "revision"
after = "critique"
user = "Again. You said: {{ response }}"
"""
POOL = """
name = "pool"

[[turns]]
name = "response"
samples = 2
voice = ["one", "two", "three"]

[[turns]]
name = "critique"
after = "response_2"
user = "What is wrong? {{ response_1 }}"
voice = "two"

[[turns]]
name = "plain"
user = "In short: {{ prompt }}"
voice = "one"
"""


def task_of(text):
    return Task.model_validate(tomllib.loads(text))


@pytest.fixture
def job_with(job_table, tmp_path):
    def made(task, **voices):
        (tmp_path / "task.toml").write_text(task)
        job_table["synthesis"] |= {"task": str(tmp_path / "task.toml"), "voices": voices}
        return Job.model_validate(job_table)

    return made


SCORED = {
    "prompt_id": "p",
    "prompt": [{"role": "user", "content": "why?"}],
    **{"response": "a pirate says", "response_score": 1.0, "response_scores": {}, "response_finish_reason": "stop"},
    **{"revision": "plainly", "revision_score": 3.0, "revision_scores": {}, "revision_finish_reason": "stop"},
}
ONE_TWO_THREE = {"one": {}, "two": {"weight": 2.0}, "three": {"weight": 1.0}}


def test_a_task_without_voices_is_one_leg():
    assert legs(load_task("safety")) == [Leg(None, ("response", "critique", "revision"))]


def test_a_leg_takes_along_all_that_its_speaker_can_say():
    assert legs(task_of(DELTA)) == [Leg("big", ("strong",)), Leg(None, ("weak",))]
    assert legs(task_of(CRITIC)) == [Leg(None, ("response",)), Leg("critic", ("critique",)), Leg(None, ("revision",))]
    # `plain` needs nothing of the turns before it, so that its model is loaded once.
    assert legs(task_of(POOL)) == [
        Leg("one", ("response", "plain")),
        Leg("two", ("response",)),
        Leg("three", ("response",)),
        Leg("two", ("critique",)),
    ]


def test_voices_are_drawn_by_their_weights_and_none_twice_while_there_are_others(job_with):
    job, turn = job_with(POOL, **ONE_TWO_THREE), task_of(POOL).turns[0]
    drawn = [drawn_voices(turn, f"row {number}", job) for number in range(4000)]
    assert all(len(set(one.values())) == 2 for one in drawn)
    first = Counter(one["response_1"] for one in drawn)
    # Two of four, one of four, one of four; four standard deviations of a share of 4,000 are 0.03.
    for voice, share in (("one", 0.25), ("two", 0.5), ("three", 0.25)):
        assert first[voice] / 4000 == pytest.approx(share, abs=0.03)
    # Without putting back: given that `two` was first, the others are alike.
    second = Counter(one["response_2"] for one in drawn if one["response_1"] == "two")
    assert second["one"] / sum(second.values()) == pytest.approx(0.5, abs=0.05)
    assert drawn_voices(turn, "row 7", job) == drawn[7]


def test_more_samples_than_voices_begin_with_the_first_again(job_with):
    turn = task_of(POOL.replace("samples = 2", "samples = 5")).turns[0]
    spoken = list(drawn_voices(turn, "row", job_with(POOL, **ONE_TWO_THREE)).values())
    assert len(set(spoken[:3])) == 3
    assert spoken[3:] == spoken[:2]


def test_a_voice_has_from_the_teacher_what_it_does_not_say(job_with):
    voice = {"model": "other", "sampling": {"temperature": 0.1}}
    job = job_with(DELTA, big=voice)
    seen = spoken_by(job, "big").synthesis
    assert (seen.teacher, seen.sampling.temperature, seen.engine) == ("other", 0.1, job.synthesis.engine)
    assert spoken_by(job, None) is job


@pytest.mark.parametrize(
    ("task", "synthesis", "said"),
    [
        (DELTA, {"voices": {"bog": {}}}, r"has turns of the voice 'big' \(did you mean `bog`\?\), which the job does"),
        (DELTA, {"voices": {"big": {}, "other": {}}}, "synthesis.voices.other: no turn of .* names this voice"),
        (POOL, {"voices": ONE_TWO_THREE, "teacher": "x"}, "synthesis.teacher: every turn of .* names a voice"),
        (POOL.replace('"three"', '"two"'), {"voices": ONE_TWO_THREE}, "a list is of two voices or more, each of them"),
    ],
)
def test_voices_that_do_not_fit_the_task_are_refused(job_table, tmp_path, task, synthesis, said):
    (tmp_path / "task.toml").write_text(task)
    job_table["synthesis"] |= {"task": str(tmp_path / "task.toml"), **synthesis}
    with pytest.raises(InputError, match=said):
        check_voices(Job.model_validate(job_table))


def test_voices_without_a_task_and_two_models_of_one_voice_are_refused(job_table):
    endpoint = {"url": "http://teacher/v1", "model": "m"}
    job_table["synthesis"]["voices"] = {"big": {"model": "m", "endpoint": endpoint}}
    with pytest.raises(ValueError, match="endpoint names a model already"):
        Job.model_validate(job_table)
    job_table["synthesis"] |= {"task": None, "voices": {"big": {}}}
    with pytest.raises(ValueError, match="voices speak the turns of a task"):
        Job.model_validate(job_table)


def test_two_voices_may_be_asked_the_same_and_one_may_not():
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "why?"}], "extra": "{}"}
    check_fields(task_of(DELTA), row, {})
    with pytest.raises(InputError, match="ask the same"):
        check_fields(task_of(DELTA.replace('voice = "big"', "")), row, {})


class Voice:
    """Says who it is, what it was asked last, and with which seed."""

    ends, keeps_tokens, chat = (), False, None

    def __init__(self, job):
        self.model = job.synthesis.teacher or "student"

    async def say(self, messages, turn, sampling, seed):
        text = f"{self.model} at {sampling.temperature} {seed} of {len(messages)}: {messages[-1]['content'][:40]}"
        if "refused" in messages[0]["content"] and turn.name == "critique":
            raise ValueError("no")
        return Generation(text, "stop", 5, None, 7, 3)

    def shutdown(self):
        pass


def through_legs(job, prompts):
    """The rows after all legs, in blocks of one row each."""
    rows = [
        {"prompt_id": text, "prompt": [{"role": "user", "content": text}], "extra": "{}", "prompt_length": 1}
        for text in prompts
    ]
    tables = [pa.Table.from_pylist([row]) for row in rows]
    for leg in legs(load_task(job.synthesis.task)):
        teacher = Teacher(job, Voice, NoCrashCounts, leg)
        tables = [asyncio.run(_blocks(teacher, table)) for table in tables]
    return tables


async def _blocks(teacher, table):
    async for block in teacher(table):
        return block


def test_legs_say_what_one_speaker_would_have_said_at_a_stretch(job_with):
    job = job_with(CRITIC, critic={})
    row = through_legs(job, ["why?"])[0].to_pylist()[0]
    expected = {"prompt_id": "why?", "prompt": row["prompt"], "extra": "{}", "prompt_length": 1}
    whole = Conversation(job, load_task(job.synthesis.task), job.synthesis.sampling, Voice(job).say)
    assert asyncio.run(whole(expected)) == {name: value for name, value in row.items() if name != "dropped"}
    assert f"of 5: Again. You said: {row['response'][:5]}" in row["revision"]


def test_each_answer_is_of_the_voice_that_was_drawn_for_it(job_with):
    voices = {name: {"model": f"model {name}", **rest} for name, rest in ONE_TWO_THREE.items()}
    voices["two"]["sampling"] = {"temperature": 0.25}
    job = job_with(POOL, **voices)
    prompts = [f"question {number}" for number in range(30)]
    tables = through_legs(job, prompts)
    assert len({table.schema for table in tables}) == 1
    turn = load_task(job.synthesis.task).turns[0]
    for row in (table.to_pylist()[0] for table in tables):
        drawn = drawn_voices(turn, row["prompt_id"], job)
        assert {name: row[f"{name}_voice"] for name in drawn} == drawn
        for name, voice in drawn.items():
            assert row[name].startswith(f"model {voice} at {0.25 if voice == 'two' else 1.0} ")
        assert row["plain"].startswith("model one ")
        assert re.match("model two at 0.25 .* of 3: What is wrong", row["critique"])
        assert "critique_voice" not in row


def test_a_row_that_one_voice_drops_passes_the_others_untouched(job_with):
    kept, refused = (table.to_pylist()[0] for table in through_legs(job_with(CRITIC, critic={}), ["why?", "refused"]))
    assert kept["dropped"] is None
    assert refused["dropped"] == "critique: no"
    assert (refused["response"] is None, refused["revision"] is None) == (False, True)


def test_pairs_say_whose_answers_they_are_and_how_often_each_is_chosen():
    row = SCORED | {"revision_voice": "big", "response_voice": "small"}
    pair = pair_row(row, Pairs())
    assert (pair["chosen_voice"], pair["rejected_voice"]) == ("big", "small")
    other = exchanged(pair)
    assert (other["chosen_voice"], other["rejected_voice"]) == ("small", "big")
    names = ["chosen_voice", "rejected_voice"]
    parts = [pa.table({name: [one[name]] for name in names}) for one in (pair, pair, other)]
    assert count_voices(parts) == {"big": {"chosen": 2, "rejected": 1}, "small": {"chosen": 1, "rejected": 2}}
    assert "chosen_voice" not in pair_row(SCORED, Pairs())
    assert count_voices([pa.table({"chosen": ["x"]})]) == {}


def test_each_leg_is_a_pool_and_servers_hold_none(job_with):
    endpoint = {"url": "http://teacher/v1", "model": "m"}
    engine = {"gpus": 2, "max_model_len": 99}
    job = job_with(CRITIC, critic={"engine": engine})
    spoken = [pool for pool in pools_of(job) if pool.stage == "synthesis"]
    assert [(pool.setting, pool.gpus) for pool in spoken] == [
        ("synthesis.engine", 0),
        ("synthesis.voices.critic.engine", 2),
        ("synthesis.engine", 0),
    ]
    job = job_with(CRITIC, critic={"endpoint": endpoint})
    assert [pool.setting for pool in pools_of(job) if pool.stage == "synthesis"] == ["synthesis.engine"] * 2
    assert models_named(job) == [job.student.model, "m (critic)"]


def test_a_key_depends_on_what_a_voice_says_and_not_on_where(job_with, tiny_model):
    def key(**voice):
        return stage_key("synthesis", settings(job_with(DELTA, big={"model": tiny_model, **voice})), {})

    plain = key()
    assert key(engine={**job_engine(job_with), "concurrency": 3, "kv_cache_gib": 9}) == plain
    assert key(sampling={"temperature": 0.123}) != plain
    assert key(weight=2.0) != plain
    assert key(engine={**job_engine(job_with), "max_model_len": 77}) != plain


def job_engine(job_with):
    return job_with(DELTA, big={}).synthesis.engine.model_dump()
