"""Questions: one question is one row and in one split, whatever its wording looks like and whatever the run's seed."""

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.files.stage_folder import StageFolder
from rdpo.records import HELDOUT, alive, question_id
from rdpo.stages import prompts
from rdpo.synthesis.prompts import (
    HELD_OUT,
    SAME_QUESTION,
    SCHEMA,
    distinguishing,
    drop_duplicates,
    drop_heldout_questions,
    prompt_row,
    question_of,
)


def asked(text, system=None):
    before = [{"role": "system", "content": system}] if system else []
    return question_id([*before, {"role": "user", "content": text}])


@pytest.mark.parametrize(
    "duplicate",
    [
        "what is café 5²? ",
        "What  is\tcafé\n5²?",
        "WHAT IS CAFÉ 5²?",
        "What is cafe\u0301 5²?",
        "What\u00a0is café 5²?",
        "\ufeffWhat is ca\u00adfé 5²\u200b?",
        "What is café 5²\uff1f",
    ],
)
def test_duplicates_ask_one_question(duplicate):
    assert asked(duplicate) == asked("What is café 5²?")


@pytest.mark.parametrize("other", ["What is café 52?", "What is cafe 5²?", "What is café 5²", "Whatis café 5²?"])
def test_other_words_ask_another(other):
    assert asked(other) != asked("What is café 5²?")


def test_who_says_it_counts():
    assert asked("why?", system="Be brief.") != asked("why?")


def stored(job_table, tmp_path, raws):
    """The kept rows of a source and the dropped ones, by line."""
    job = Job.model_validate(job_table)
    rows = [prompt_row("a", line, raw, job) for line, raw in enumerate(raws, 1)]
    folder = StageFolder(str(tmp_path / "run"), "prompts")
    folder.begin("k")
    folder.write_parts(pa.Table.from_pylist(rows, schema=SCHEMA), "prompt_id")
    drop_duplicates(folder, distinguishing(job))
    drop_heldout_questions(folder)
    kept = {row["line"]: row for row in folder.table().to_pylist()}
    dropped = {row["line"]: row["dropped"] for row in folder.table("dropped").to_pylist()}
    assert len(kept) + len(dropped) == len(raws)
    return kept, dropped


def test_the_first_of_near_duplicates_stays(job_table, tmp_path):
    raws = [{"prompt": "Why is it so?"}, {"prompt": "Why not?"}, {"prompt": "why is it so? "}, {"prompt": "Why not?"}]
    kept, dropped = stored(job_table, tmp_path, raws)
    assert list(kept) == [1, 2]
    assert dropped == {3: SAME_QUESTION, 4: "duplicate of an earlier prompt"}


def ready(prompt, chosen, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": "no", **more}


def test_ready_pairs_of_a_held_out_question_are_not_trained_on(job_table, tmp_path):
    job_table["synthesis"] = {}
    raws = [
        ready("Why?", "a", split="train"),
        ready("why? ", "b", split="test"),
        ready("How?", "c", split="train"),
        ready("how?", "d", split="train"),
        ready("HOW?", "c", split="train"),
    ]
    kept, dropped = stored(job_table, tmp_path, raws)
    assert {line: row["split"] for line, row in kept.items()} == {2: HELDOUT, 3: "train", 4: "train"}
    assert dropped == {1: HELD_OUT, 5: SAME_QUESTION}


def test_no_question_is_in_two_splits_where_they_are_drawn(job_table, tmp_path):
    job_table["synthesis"] = {}
    job_table["prompts"]["heldout_fraction"] = 0.5
    raws = [ready(f"question {number}" + " " * copy, f"answer {copy}") for number in range(60) for copy in range(3)]
    kept, dropped = stored(job_table, tmp_path, raws)
    splits = {row["question_id"]: set() for row in kept.values()}
    for row in kept.values():
        splits[row["question_id"]].add(row["split"])
    assert len(splits) == 60
    assert all(len(of_question) == 1 for of_question in splits.values())
    assert set(dropped.values()) == {HELD_OUT}


def test_one_question_in_a_template_with_other_columns_is_several_prompts(job_table, tmp_path):
    job_table["prompts"]["templates"] = ["{{ prompt }} In {{ language }}."]
    raws = [{"prompt": text, "language": to, "split": "train"} for to in ("Dutch", "Thai") for text in ("Why?", "why?")]
    kept, dropped = stored(job_table, tmp_path, raws)
    assert list(kept) == [1, 3]
    assert set(dropped.values()) == {SAME_QUESTION}
    assert len({row["question_id"] for row in kept.values()}) == 1


def test_what_the_job_puts_around_a_prompt_is_no_part_of_its_question(job_table):
    plain = prompt_row("a", 1, {"prompt": "Why?"}, Job.model_validate(job_table))
    job_table["prompts"] |= {"system": "Be brief.", "templates": ["Story: {{ prompt }}"]}
    job = Job.model_validate(job_table)
    wrapped = prompt_row("a", 1, {"prompt": "Why?"}, job)
    own = prompt_row("a", 1, {"prompt": [{"role": "system", "content": "Be brief."}, *plain["prompt"]]}, job)
    assert wrapped["prompt"][-1]["content"] == "Story: Why?"
    assert plain["question_id"] == wrapped["question_id"] == own["question_id"] == asked("why?")

    earlier = {name: value for name, value in wrapped.items() if name != "question_id"}
    assert question_of(earlier, job.prompts) == question_of(wrapped, job.prompts) == asked("why?")


def test_pairs_of_another_run_say_what_was_asked(job_table):
    job_table["synthesis"] = {}
    job = Job.model_validate(job_table)
    made = {"question_id": asked("why?"), "chosen_from": "revision", "rejected_from": "response"}
    assert prompt_row("a", 1, ready("Story: why?", "a", **made), job)["question_id"] == asked("why?")
    for foreign in ({"question_id": asked("why?")}, {**made, "question_id": 81}):
        assert prompt_row("a", 1, ready("How?", "a", **foreign), job)["question_id"] == asked("how?")


def test_prompts_splits_and_templates_are_the_same_for_every_seed(job_table):
    templates = [f"Story {number}: {{{{ prompt }}}}" for number in range(4)]
    job_table["prompts"] |= {"templates": templates, "heldout_templates": ["Now: {{ prompt }}", "So: {{ prompt }}"]}
    jobs = [Job.model_validate({**job_table, "seed": seed}) for seed in (0, 1, 2)]
    rows = [[prompt_row("a", number, {"prompt": f"how {number}"}, job) for number in range(1000)] for job in jobs]
    assert rows[0] == rows[1] == rows[2]
    assert all(map(alive, rows[0]))
    assert 60 < sum(row["split"] == HELDOUT for row in rows[0]) < 140
    assert prompts.settings(jobs[0]) == prompts.settings(jobs[2])
    assert prompts.settings(jobs[0])["seed"] == 0


def test_the_prompts_of_seed_0_are_held_out_as_ever(job_table):
    """Known from a version that drew them by the job's seed: finished runs stay what they are."""
    job = Job.model_validate(job_table)
    rows = [prompt_row("a", number, {"prompt": f"hello {number}"}, job) for number in range(60)]
    assert [number for number, row in enumerate(rows) if row["split"] == HELDOUT] == [4, 8, 33, 38, 45]
