"""The teacher's turns, with a speaker instead of an engine: samples, drops, texts that depend on nothing else."""

import asyncio

import pyarrow as pa
import pytest

from jobs.bench.dataplane import Echo
from jobs.bench.scaling import Slow
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.synthesis.engine import EngineError, Generation
from rdpo.synthesis.instructions import check_fields, load_task
from rdpo.synthesis.teacher import Conversation, Teacher
from tests.support.crash_counts import NoCrashCounts

TASK = """
name = "sampled"

[[turns]]
name = "response"
samples = 3

[[turns]]
name = "critique"
after = "response_2"
user = "What is wrong with it? You also said: {{ response_1 }}"

[[turns]]
name = "revision"
after = "critique"
user = "Again, please."
"""


class Rule:
    """Says which seed it got and how long the conversation was; refuses what the prompt says it shall."""

    ends, keeps_tokens, chat = (), False, None

    def __init__(self, job):
        self.asked = []

    async def say(self, messages, turn, sampling, seed):
        self.asked.append((turn.name, [message["content"] for message in messages]))
        if "refused" in messages[0]["content"] and turn.name == "critique":
            raise EngineError("the engine refuses it: ValueError: no")
        text = "  " if "empty" in messages[0]["content"] else f"{turn.name} {seed} of {len(messages)}"
        text += "\ud800" if "half" in messages[0]["content"] else ""
        return Generation(text, "stop", 5, None, 7, 3)

    def shutdown(self):
        pass


@pytest.fixture
def speak(job_table, tmp_path):
    (tmp_path / "task.toml").write_text(TASK)
    job_table["synthesis"]["task"] = str(tmp_path / "task.toml")
    teacher = Teacher(Job.model_validate(job_table), Rule, NoCrashCounts)

    def spoken(*prompts):
        rows = [
            {"prompt_id": text, "prompt": [{"role": "user", "content": text}], "extra": "{}", "prompt_length": 1}
            for text in prompts
        ]

        async def blocks():
            return [block async for block in teacher(pa.Table.from_pylist(rows))]

        return {row["prompt_id"]: row for row in asyncio.run(blocks())[0].to_pylist()}

    spoken.speaker = teacher.speaker
    return spoken


@pytest.mark.parametrize("speaker", [Echo, Slow])
def test_the_speakers_of_benchmarks_carry_a_row_to_its_end(speaker, job_table):
    """Nothing else notices in time: they run in tests and benchmarks that take long."""
    job_table["synthesis"]["task"] = "roleplay"
    teacher = Teacher(Job.model_validate(job_table), speaker, NoCrashCounts)
    row = {"prompt_id": "a", "prompt": [{"role": "user", "content": "why?"}], "extra": "{}", "prompt_length": 1}

    async def blocks():
        return [block async for block in teacher(pa.Table.from_pylist([row]))]

    (done,) = asyncio.run(blocks())[0].to_pylist()
    assert done["dropped"] is None
    assert done["revision"]


def test_a_turn_is_sampled_several_times_and_goes_on_from_one_of_them(speak):
    row = speak("why?")["why?"]
    assert len({row[f"response_{number}"] for number in (1, 2, 3)}) == 3
    critique = next(texts for name, texts in speak.speaker.asked if name == "critique")
    assert critique[1] == row["response_2"]
    assert row["response_1"] in critique[2]
    assert row["revision"].endswith("of 5")
    assert (row["revision_prompt_length"], row["revision_prompt_cached"], row["dropped"]) == (7, 3, None)


def test_a_row_that_cannot_be_spoken_is_dropped_and_its_neighbours_are_not(speak):
    rows = speak("fine", "refused", "empty", "also fine", "half a character")
    reasons = {name: row["dropped"] for name, row in rows.items()}
    assert reasons.pop("refused") == "critique: the engine refuses it: ValueError: no"
    assert reasons.pop("empty") == "response_1 is empty"
    assert reasons == {"fine": None, "also fine": None, "half a character": None}
    assert rows["half a character"]["revision"].endswith("?")
    assert "revision" in rows["refused"]
    assert rows["refused"]["revision"] is None


def test_a_rows_text_depends_on_neither_order_nor_neighbours(speak):
    together, alone = speak("one", "two", "three"), speak("two")
    assert together["two"] == alone["two"]
    assert speak("three", "two")["two"] == alone["two"]


PREFILLED = """
name = "prefilled"

[[turns]]
name = "response"
prefill = "In {{ style }}:\\n"

[[turns]]
name = "other"
user = "Again: {{ prompt }}"
"""


def test_words_that_an_answer_begins_with_are_a_template(job_table, tmp_path):
    prefills = []

    async def say(messages, turn, sampling, seed):
        prefills.append(turn.prefill)
        return Generation("arr", "stop", 1, None, 1, 0)

    (tmp_path / "task.toml").write_text(PREFILLED)
    job_table["synthesis"] |= {"task": str(tmp_path / "task.toml"), "values": {"style": "rhyme"}}
    job = Job.model_validate(job_table)
    row = {"prompt_id": "a", "prompt": [{"role": "user", "content": "why?"}], "extra": "{}"}
    task = load_task(job.synthesis.task)
    spoken = asyncio.run(Conversation(job, task, job.synthesis.sampling, say)(row))
    assert prefills == ["In rhyme:\n", ""]
    assert spoken["response"] == "In rhyme:\narr"
    with pytest.raises(InputError, match="uses style"):
        check_fields(task, row, {})
