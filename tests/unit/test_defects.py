"""Defects of conversations: each found where it is, and not where it is not."""

import pytest

from rdpo.config import Job
from rdpo.preference.agreement import count_defects
from rdpo.preference.pairs import pairs_table
from rdpo.records import table_of
from rdpo.synthesis.defects import defects


def row(response="Arr, Paris it be!", critique="It speaks as a pirate, which was not asked for.", revision="Paris."):
    texts = {"response": response, "critique": critique, "revision": revision}
    return {"prompt_id": "p", **texts, **{f"{name}_finish_reason": "stop" for name in texts}}


LONG = "The answer above speaks as a pirate in every one of its sentences, and that is not wanted here."


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({}, []),
        ({"revision": "I'm sorry, but I can't help with that."}, ["refusal"]),
        ({"revision": "As an AI language model, I have no opinion."}, ["refusal"]),
        ({"revision": "I cannot assist with this request."}, ["refusal"]),
        ({"revision": "I\u2019m sorry, but I can\u2019t provide that."}, ["refusal"]),
        ({"revision": "I cannot stress enough how much it matters."}, []),
        ({"response": "!!!", "revision": "..."}, []),
        ({"revision": "Here\u2019s the revised answer: Paris."}, ["preamble"]),
        ({"revision": "Sorry to hear that. Rest, and drink water."}, []),
        ({"revision": "You cannot boil an egg without heat."}, []),
        ({"critique": "Fine."}, ["empty_critique"]),
        ({"critique": "The answer is accurate. No changes are needed."}, ["no_change_asked"]),
        ({"critique": "No change of tone is visible; it stays a pirate."}, []),
        ({"revision": "arr -- Paris it be"}, ["repeats_response"]),
        ({"critique": LONG, "revision": f"You are right: {LONG}"}, ["quotes_critique"]),
        ({"critique": LONG, "revision": "The answer above is Paris."}, []),
        ({"revision": "Here is the revised answer:\nParis."}, ["preamble"]),
        ({"revision": "Sure! Here's a rewritten version of it: Paris."}, ["preamble"]),
        ({"revision": "Here is how to do it: boil water."}, []),
    ],
)
def test_defects(texts, expected):
    assert defects(row(**texts), "response", "revision") == expected


def scored(*rows):
    turns = ("response", "revision")
    scores = {f"{turn}_score": 1.0 for turn in turns} | {f"{turn}_scores": {"r": 1.0} for turn in turns}
    return table_of([{**one, "prompt": [], **scores} for one in rows])


def job_with(job_table, **pairs):
    return Job.model_validate({**job_table, "pairs": pairs})


def test_counts(job_table):
    table = scored(row(), row(critique="Fine."), row(critique="Ok", revision="As an AI, no."))
    found = count_defects([pairs_table(table, job_with(job_table))] * 2)
    assert found == {"empty_critique": 4, "refusal": 2}
    given = job_with({**job_table, "synthesis": {}}, chosen="revision", rejected="response")
    assert count_defects([pairs_table(table, given)]) == {}


def test_rows_with_a_defect_are_dropped_where_the_job_says_so(job_table):
    table = scored(row(), row(revision="As an AI, no."))
    assert pairs_table(table, job_with(job_table))["dropped"].to_pylist() == [None, None]
    dropped = pairs_table(table, job_with(job_table, drop_defects=["refusal"]))["dropped"].to_pylist()
    assert dropped == [None, "revision: refusal"]
