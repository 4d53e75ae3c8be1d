"""Near-duplicates between training and held-out prompts: found by what they share, counted, and dropped on request."""

import pytest

from rdpo.config import Job
from rdpo.execution.keys import stage_key
from rdpo.files.stage_folder import StageFolder
from rdpo.records import table_of
from rdpo.stages import calibration, prompts
from rdpo.synthesis.near_duplicates import near_duplicates, near_heldout
from rdpo.synthesis.prompts import SCHEMA, drop_near_duplicates, prompt_row

LONG = "Explain to a child of ten how the moon moves the water of the sea twice a day, and why not once"


def test_a_word_more_is_nearly_the_same_and_another_question_is_not():
    others = {
        "mark": LONG + "!",
        "word": LONG.replace("the sea", "the great sea"),
        "case": LONG.upper(),
        "other": "Explain to a child of ten how a plane flies, and why it does not fall",
        "short": "Why?",
    }
    assert near_duplicates([LONG, "How?"], others.items()) == {"mark", "word", "case"}
    assert near_duplicates([], others.items()) == set()
    assert near_duplicates(["why?"], others.items()) == {"short"}


def test_none_is_missed_among_many():
    texts = [f"{LONG} {number * 7919} times {number}" for number in range(300)]
    assert near_duplicates(texts, ((text, text + "?") for text in texts)) == set(texts)


@pytest.fixture
def folder(job_table, tmp_path):
    raws = [(LONG, "test"), (LONG + "!", "train"), ("What is the name of the tallest tree?", "train")]
    job = Job.model_validate(job_table)
    rows = [prompt_row("a", line, {"prompt": text, "split": split}, job) for line, (text, split) in enumerate(raws)]
    made = StageFolder(str(tmp_path / "run"), "prompts")
    made.begin("k")
    made.write_parts(table_of(rows).select(SCHEMA.names), "prompt_id")
    return made


def test_they_are_dropped_from_training_with_the_reason(folder):
    near = near_heldout(folder, templates=False)
    assert len(near) == 1
    drop_near_duplicates(folder, near)
    assert sorted(folder.table()["line"].to_pylist()) == [0, 2]
    assert folder.reasons() == {"nearly the same as a held-out prompt": 1}


def test_counting_makes_nothing_again_and_dropping_does(job_table):
    def keys(**changes):
        job = Job.model_validate({**job_table, "prompts": {**job_table["prompts"], **changes}})
        return [stage_key(one.STAGE.name, one.settings(job), {}) for one in (prompts, calibration)]

    assert keys() == keys(near_duplicates="count")
    assert "near_duplicates" not in prompts.settings(Job.model_validate(job_table))
    assert keys()[0] != keys(near_duplicates="drop")[0]
    assert keys()[1] == keys(near_duplicates="drop")[1]
