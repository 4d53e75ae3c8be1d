"""A ready preference data set in place of synthesis: what becomes a pair, and what is dropped and why."""

import json

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.preference.pairs import UNSCORED, pairs_table
from rdpo.preference.scores import combine_table
from rdpo.stages.pairs import settings as pairs_settings
from rdpo.synthesis.columns import check_columns, needed_columns
from rdpo.synthesis.given import answered
from rdpo.synthesis.prompts import prompt_row


@pytest.fixture
def job(job_table):
    del job_table["synthesis"], job_table["rewards"]
    return Job.model_validate(job_table)


def from_source(raw, job):
    row = prompt_row("pairs.jsonl", 1, raw, job)
    return row if row.get("dropped") else answered(row)


def paired(rows, job):
    scored = combine_table(pa.Table.from_pylist(rows), {"given": 1.0}, ["chosen", "rejected"])
    return pairs_table(scored, job).to_pylist()


def test_text_becomes_a_pair(job):
    row = from_source({"prompt": "q", "chosen": "good", "rejected": "    bad\n"}, job)
    (pair,) = paired([row], job)
    assert pair["chosen"] == [{"role": "assistant", "content": "good"}]
    # Blanks belong to an answer: in code they are its indentation.
    assert pair["rejected"] == [{"role": "assistant", "content": "    bad\n"}]
    assert (pair["reward_gap"], pair["chosen_finished"], pair["dropped"]) == (0.0, True, None)


@pytest.mark.parametrize(
    ("training", "pairs", "goes"),
    [
        ({}, {}, False),
        ({"reward_as": "offset"}, {}, False),
        ({"reward_as": "soft_label"}, {}, True),
        ({"reward_as": "geometric_label"}, {}, True),
        ({"reward_as": "weight"}, {}, True),
        ({"loss": "infonca"}, {}, True),
        ({"loss": "nca"}, {}, True),
        ({"loss": "plackett_luce"}, {}, False),
        ({}, {"direction": "reward"}, True),
        ({}, {"min_gap": -1.0}, True),
        ({}, {"max_gap": 1.0}, True),
        ({}, {"min_score": -1.0}, True),
    ],
)
def test_a_pair_without_scores_is_dropped_where_the_job_goes_by_them(job, training, pairs, goes):
    """A gap of 0 would make its two answers equally good: trained on so, or chosen from so."""
    job = job.model_copy(
        update={"training": job.training.model_copy(update=training), "pairs": job.pairs.model_copy(update=pairs)}
    )
    bare = {"chosen": "good", "rejected": "bad"}
    rows = [{"prompt": "q", **bare}, {"prompt": "p", **bare, "score_chosen": 0.5, "score_rejected": 0.25}]
    found = paired([from_source(row, job) for row in rows], job)
    assert [pair["dropped"] for pair in found] == [UNSCORED if goes else None, None]
    assert (pairs_settings(job).get("unscored") == "dropped") == goes


def test_the_prompt_may_stand_in_the_chosen_messages(job):
    question = {"role": "user", "content": "q"}
    sides = {side: [question, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = from_source({**sides, "score_chosen": 4.5, "score_rejected": 1}, job)
    (pair,) = paired([row], job)
    assert pair["prompt"] == [question]
    assert (pair["score_chosen"], pair["reward_gap"]) == (4.5, 3.5)


def test_a_prompt_may_have_several_pairs_but_one_split(job):
    rows = [from_source({"prompt": "q", "chosen": f"good {i}", "rejected": "bad"}, job) for i in range(20)]
    assert len({row["prompt_id"] for row in rows}) == 20
    assert len({row["split"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen: empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: neither text nor a list of messages"),
        (
            {"prompt": "q", "chosen": "a", "rejected": [{"role": "user", "content": "b"}]},
            "rejected: its last message is not the assistant's",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": float("nan"), "score_rejected": 1},
            "score_chosen is not a finite number",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": "high"},
            "score_rejected is not a finite number",
        ),
        ({"chosen": "a", "rejected": "b"}, "prompt: missing, and chosen has only the answer"),
    ],
)
def test_what_is_no_pair_is_dropped_with_its_reason(job, raw, reason):
    row = from_source(json.loads(json.dumps(raw)), job)
    assert row["dropped"] == reason


def test_identical_answers_are_dropped(job):
    row = from_source({"prompt": "q", "chosen": "same", "rejected": "same "}, job)
    assert paired([row], job)[0]["dropped"] == "chosen and rejected are the same"


def test_a_source_without_the_columns_is_refused(job):
    with pytest.raises(InputError, match="preference data set needs it, a source of prompts synthesis"):
        check_columns("pairs.jsonl", [{"prompt": "q", "chosen": "a"}], needed_columns(job))


def test_a_job_that_synthesises_needs_a_reward(job_table):
    del job_table["rewards"]
    with pytest.raises(ValueError, match="give at least one"):
        Job.model_validate(job_table)


def test_the_folder_of_a_pairs_stage_is_a_source_of_pairs(job, tmp_path):
    from rdpo.files.manifest import Manifest
    from rdpo.files.stage_folder import StageFolder
    from rdpo.synthesis.sources import read_rows, source_files

    (pair,) = paired([from_source({"prompt": "q", "chosen": "good", "rejected": "bad"}, job)], job)
    folder = StageFolder(str(tmp_path), "pairs")
    folder.begin("k")
    folder.write_parts(pa.Table.from_pylist([pair]), "prompt_id")
    folder.commit(Manifest("pairs", "k", {}, {}), "prompt_id", 1)
    (path,) = source_files(folder.path)
    ((_, raw),) = read_rows(path)
    (again,) = paired([from_source(raw, job)], job)
    assert [again[name] for name in ("prompt", "chosen", "rejected")] == [
        pair[n] for n in ("prompt", "chosen", "rejected")
    ]
