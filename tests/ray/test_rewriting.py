"""A segment written anew by a real engine: the tokens that it is given, and those that the student is trained on."""

import io

import pytest

from rdpo.config import Job
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.modeling.chat import student_chat
from rdpo.preference.reference import tokenize_pair
from rdpo.stages.table import stages_of
from rdpo.tracking.console import Console
from tests.support.jobs import valid_job, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.long]

TASK = """
name = "segment"

[[turns]]
name = "human"
given = "{{ answer }}"

[[turns]]
name = "rewritten"
rewrites = "human"
max_tokens = 3
temperature = 0.0
"""
ANSWER = "the answer that stands in the data"


@pytest.fixture(scope="module")
def run(ray_cluster, wordy_models, tmp_path_factory):
    place = tmp_path_factory.mktemp("rewriting")
    (place / "task.toml").write_text(TASK)
    table = valid_job(wordy_models[0], place)
    rows = [{"prompt": f"question {number}", "answer": ANSWER, "split": "train"} for number in range(24)]
    rows.append({"prompt": "question of the evaluation", "answer": ANSWER, "split": "heldout"})
    write_jsonl(place / "prompts.jsonl", rows)
    table["synthesis"] |= {"task": str(place / "task.toml")}
    table["synthesis"]["engine"] |= {"max_model_len": 256, "options": {"dtype": "float32"}}
    table["pairs"] = {"chosen": "human", "rejected": "rewritten"}
    job = Job.model_validate(table)
    run = Run(job, str(place / "run"), Console(io.StringIO()), lambda *_: False)
    run_stages(run, [stage for stage in stages_of(job) if stage.name in ("prompts", "synthesis", "rewards", "pairs")])
    return run


def places_of(drawn, own):
    """Where three tokens of an answer may have been replaced by others."""
    starts = range(len(own) - 4)
    return [start for start in starts if drawn[:start] + drawn[start + 3 :] == own[:start] + own[start + 3 :]]


def test_the_engine_goes_on_from_the_answers_own_tokens(run, wordy_models):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wordy_models[0], dtype=torch.float32)
    chat, folder = student_chat(run.job), run.folder("synthesis")
    own, rows = chat.text_ids(ANSWER), folder.table().to_pylist()
    assert len(rows) + folder.count("dropped") == 24

    found = set()
    for row in rows:
        drawn, asked = row["rewritten_drawn"], chat.prompt_ids(row["prompt"])
        if len(drawn) < len(own):
            # The model ended its answer within the segment.
            assert row["rewritten_finish_reason"] == "stop"
            continue
        written = []
        for start in places_of(drawn, own):
            ids = torch.tensor([asked + own[:start]])
            said = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
            written += [start] if said == drawn[start : start + 3] else []
        assert written
        found.add(written[0])
    assert len(found) > 2


def test_the_tokens_that_are_trained_on_are_those(run):
    chat = student_chat(run.job)
    pairs = run.folder("pairs").table().to_pylist()
    assert pairs
    for pair in pairs:
        row = tokenize_pair(pair, chat, 512)
        assert row["chosen_ids"] == [*chat.text_ids(ANSWER), *chat.ending]
        assert row["rejected_ids"][: len(pair["rejected_drawn"])] == pair["rejected_drawn"]
