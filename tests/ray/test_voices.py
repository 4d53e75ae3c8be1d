"""Two models speak in one task, on real engines: whose words they are, and the tokens that they drew."""

import io

import pytest

from rdpo.config import Job
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.modeling.chat import student_chat
from rdpo.preference.reference import tokenize_pair
from rdpo.stages.table import stages_of
from rdpo.synthesis.instructions import load_task
from rdpo.synthesis.voices import drawn_voices
from rdpo.tracking.console import Console

pytestmark = [pytest.mark.ray, pytest.mark.long]

TASK = """
name = "two"

[[turns]]
name = "response"
samples = 2
voice = ["first", "second"]

[[turns]]
name = "critique"
after = "response_1"
user = "What is wrong?"
voice = "second"
prefill = "Well, "
"""
MOST = 8


@pytest.fixture(scope="module")
def run(ray_cluster, wordy_models, tmp_path_factory):
    from tests.support.jobs import valid_job

    place = tmp_path_factory.mktemp("voices")
    (place / "task.toml").write_text(TASK)
    table = valid_job(wordy_models[0], place)
    engine = {"max_model_len": 512, "kv_cache_gib": 1, "batch_rows": 4, "options": {"dtype": "float32"}}
    voices = {"first": {}, "second": {"model": wordy_models[1]}}
    sampling = {"max_tokens": MOST, "temperature": 0.0}
    table["synthesis"] = {"task": str(place / "task.toml"), "sampling": sampling, "engine": engine, "voices": voices}
    table["pairs"] = {"chosen": "response_1", "rejected": "response_2"}
    job = Job.model_validate(table)
    run = Run(job, str(place / "run"), Console(io.StringIO()), lambda *_: False)
    run_stages(run, [stage for stage in stages_of(job) if stage.name in ("prompts", "synthesis", "rewards", "pairs")])
    return run


def greedy(folder, ids, stops):
    """What transformers draws, up to a token that ends the answer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drawn = model.generate(torch.tensor([ids]), max_new_tokens=MOST, do_sample=False)[0, len(ids) :].tolist()
    return next((drawn[:place] for place, token in enumerate(drawn) if token in stops), drawn)


def spoken(run):
    """All rows of the synthesis, kept and dropped."""
    folder = run.folder("synthesis")
    return [*folder.table().to_pylist(), *folder.table("dropped").to_pylist()]


def test_each_answer_is_what_the_drawn_model_would_say_by_the_tokens_that_it_drew(run, wordy_models):
    chat, folders = student_chat(run.job), dict(zip(("first", "second"), wordy_models, strict=True))
    turn = load_task(run.job.synthesis.task).turns[0]
    compared = 0
    for row in spoken(run):
        voices = drawn_voices(turn, row["prompt_id"], run.job)
        assert len(set(voices.values())) == 2
        for name, voice in voices.items():
            if row.get(name) is None:
                continue
            expected = greedy(folders[voice], chat.prompt_ids(row["prompt"]), chat.stop_ids)
            assert (row[f"{name}_voice"], row[f"{name}_drawn"]) == (voice, expected)
            compared += 1
    assert compared >= 10


def test_a_later_leg_goes_on_from_what_an_earlier_one_said_with_the_first_words_it_was_given(run, wordy_models):
    chat = student_chat(run.job)
    compared = 0
    for row in spoken(run):
        if row.get("critique") is None:
            continue
        answered = {"role": "assistant", "content": row["response_1"]}
        asked = [*row["prompt"], answered, {"role": "user", "content": "What is wrong?"}]
        begun = chat.text_ids("Well, ")
        expected = greedy(wordy_models[1], chat.prompt_ids(asked, "Well, "), chat.stop_ids)
        assert row["critique_drawn"] == [*begun, *expected]
        compared += 1
    assert compared >= 5


def test_drawn_tokens_of_the_same_text_are_those_that_are_trained_on(run):
    chat = student_chat(run.job)
    pairs = run.folder("pairs").table().to_pylist()
    assert pairs
    kept = 0
    for pair in pairs:
        row = tokenize_pair(pair, chat, 512)
        for side in ("chosen", "rejected"):
            drawn = pair[f"{side}_drawn"]
            if chat.tokenizer.decode(drawn) == pair[side][0]["content"]:
                assert row[f"{side}_ids"][: len(drawn)] == drawn
                kept += 1
    assert kept
    assert {pair["chosen_voice"] for pair in pairs} <= {"first", "second"}
    assert not any(name.startswith("step-") for name in run.folder("synthesis").files())
