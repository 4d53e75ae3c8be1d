"""Pairs: sides, gaps, and the reasons for which a pair is no use."""

import pyarrow as pa
import pytest
from pydantic import ValidationError

from rdpo.config import Job, Pairs
from rdpo.config.task import Turn
from rdpo.errors import InputError
from rdpo.modeling.chat import make_chat
from rdpo.preference.agreement import agreement
from rdpo.preference.pairs import (
    answers_of,
    copies,
    copy_names,
    drawn_together,
    exchanged,
    pair_row,
    pairs_table,
    scored_answers,
    shaping_of,
    sound,
    wide_enough,
)
from rdpo.preference.reference import tokenize_pair
from rdpo.records import question_id, table_of


def scored(response=1.0, revision=3.0, **changes):
    row = {
        "prompt_id": "p",
        "prompt": [{"role": "user", "content": "why?"}],
        "response": "a pirate says",
        "revision": "plainly",
        "response_score": response,
        "revision_score": revision,
        "response_scores": {"r": response},
        "revision_scores": {"r": revision},
        "response_finish_reason": "stop",
        "revision_finish_reason": "length",
    }
    return {**row, **changes}


def test_teacher_direction_keeps_a_pair_that_the_reward_contradicts():
    pair = pair_row(scored(response=3.0, revision=1.0), Pairs())
    assert pair["chosen"][0]["content"] == "plainly"
    assert pair["reward_gap"] == -2.0
    assert (pair["chosen_finished"], pair["rejected_finished"]) == (False, True)


def test_reward_direction_swaps_the_sides():
    pair = pair_row(scored(response=3.0, revision=1.0), Pairs(direction="reward"))
    assert pair["chosen"][0]["content"] == "a pirate says"
    assert (pair["chosen_from"], pair["reward_gap"]) == ("response", 2.0)
    assert (pair["chosen_finished"], pair["rejected_finished"]) == (True, False)


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ({**scored(), "revision": "a pirate says"}, Pairs(), None),
        (scored(), Pairs(min_answer_chars=10), "shorter"),
        (scored(), Pairs(drop_truncated="chosen"), "cut off"),
        (scored(), Pairs(drop_truncated="any"), "cut off"),
        (
            {**scored(), "revision_finish_reason": "stop", "response_finish_reason": "length"},
            Pairs(drop_truncated="chosen"),
            None,
        ),
        (scored(), Pairs(min_gap=2.5), "below pairs.min_gap"),
        (scored(), Pairs(max_gap=2.0), "reward gap is pairs.max_gap or more"),
        (scored(), Pairs(min_gap=2.0, max_gap=2.01), None),
        (scored(), Pairs(min_score=3.5), "the chosen answer's score is below pairs.min_score"),
        (scored(), Pairs(min_score=3.0), None),
        (scored(), Pairs(min_gap=2.0), None),
    ],
)
def test_filters(row, settings, reason):
    if row["revision"] == row["response"]:
        reason = "the same"
    dropped = wide_enough(sound(pair_row(row, settings), settings), settings)["dropped"]
    assert dropped is None if reason is None else reason in dropped


def test_tokens_of_a_pair(tokenizer):
    chat = make_chat(tokenizer, [], "x")
    row = tokenize_pair(pair_row(scored(), Pairs()), chat, 256)
    assert row["rejected_ids"][-1] == chat.end_id
    assert row["chosen_ids"][-1] != chat.end_id
    assert tokenize_pair(row, chat, 20)["dropped"] == "pair is longer than reference.max_length"
    row["chosen"][0]["content"] = ""
    assert tokenize_pair(row, chat, 256)["dropped"] == "a completion has no tokens"


@pytest.mark.parametrize("direction", ["teacher", "reward"])
def test_agreement_of_a_reward_with_the_teacher(direction, job_table):
    rows = [scored(), scored(response=4.0), scored(response=3.0)]
    for row in rows:
        row["response_scores"]["r"], row["revision_scores"]["r"] = row["response_score"], row["revision_score"]
    job = job_with(job_table, direction=direction)
    parts = [pairs_table(table_of([row]), job) for row in rows]
    found = agreement(parts, job.pairs)["r"]
    assert (found.preferred, found.chosen_mean, found.rejected_mean) == (0.5, 3.0, pytest.approx(8 / 3))
    assert not found.constant
    assert agreement([], job.pairs) == {}
    assert agreement([pairs_table(table_of([rows[2]]), job)], job.pairs)["r"].constant


def job_with(job_table, **pairs):
    return Job.model_validate({**job_table, "pairs": pairs})


def test_a_row_makes_several_pairs_and_their_prompt_may_be_a_turns_question(job_table):
    job_table["synthesis"] |= {"task": "counterfactual", "values": {"treatment": "Be brief.", "negative": "Ramble."}}
    also = [{"chosen": "control", "rejected": "negative"}]
    job = job_with(job_table, chosen="treatment", rejected="control", also=also, condition="treatment")
    assert scored_answers(job) == ["treatment", "control", "negative"]
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "why?"}], "extra": "{}"}
    for name in ("control", "treatment", "negative"):
        row |= {name: name, f"{name}_score": 0.0, f"{name}_scores": {"r": 0.0}, f"{name}_finish_reason": "stop"}
    pairs = pairs_table(copies(table_of([row]), 2), job).to_pylist()
    assert [pair["prompt_id"] for pair in pairs] == copy_names(pa.chunked_array([["p"]]), 2).to_pylist() == ["p", "p#1"]
    assert [(pair["chosen_from"], pair["rejected_from"]) for pair in pairs] == [
        ("treatment", "control"),
        ("control", "negative"),
    ]
    assert pairs[0]["prompt"] == [{"role": "user", "content": "why?\n\nBe brief."}]


def test_flipped_pairs_keep_their_scores(job_table):
    rows = table_of([{**scored(), "prompt_id": f"p{index}"} for index in range(400)])
    pairs = pairs_table(rows, job_with(job_table, flip=0.3)).to_pylist()
    flipped = [pair for pair in pairs if pair["chosen_from"] == "response"]
    assert 0.2 < len(flipped) / len(pairs) < 0.4
    assert {pair["reward_gap"] for pair in flipped} == {-2.0}
    assert {pair["reward_gap"] for pair in pairs if pair not in flipped} == {2.0}


def test_the_same_pairs_are_left_however_many_are_flipped(job_table):
    stops = {"revision_finish_reason": "stop"}
    endings = [{**stops, "response_finish_reason": "length"}, {}, stops]
    rows = table_of([{**scored(), **endings[index % 3], "prompt_id": f"p{index}"} for index in range(90)])

    def left(flip, **more):
        pairs = pairs_table(rows, job_with(job_table, flip=flip, drop_truncated="chosen", **more)).to_pylist()
        return {pair["prompt_id"]: pair for pair in pairs if not pair["dropped"]}

    straight, flipped = left(0.0), left(1.0)
    assert list(straight) == list(flipped) == [f"p{index}" for index in range(90) if index % 3 != 1]
    assert flipped["p0"] == exchanged(straight["p0"])
    assert flipped["p0"]["chosen_from"] == "response"
    assert not left(1.0, min_gap=0.0)


def test_random_sides_are_those_of_the_same_pairs(job_table):
    """A filter by scores has looked at them before; otherwise the right ones would be left."""
    prompts = [[{"role": "user", "content": f"question {index}"}] for index in range(400)]
    rows = [{**scored(), "prompt_id": f"p{index}", "prompt": prompt} for index, prompt in enumerate(prompts)]
    for row in rows[::4]:
        row["revision_score"] = row["response_score"]

    def left(seed=0, **more):
        job = job_with({**job_table, "seed": seed}, min_gap=0.5, heldout_fraction=0.25, **more)
        pairs = pairs_table(table_of(rows), job).to_pylist()
        return {pair["prompt_id"]: pair for pair in pairs if not pair["dropped"]}

    straight, drawn, other = left(), left(random_sides=True), left(seed=1, random_sides=True)
    assert list(straight) == list(drawn) == list(other)
    turned = [name for name in straight if drawn[name] != straight[name]]
    assert all(drawn[name] == exchanged(straight[name]) for name in turned)
    trained = [name for name, pair in straight.items() if not pair["heldout"]]
    assert set(turned) < set(trained)
    assert 0.4 < len(turned) / len(trained) < 0.6
    assert turned != [name for name in straight if other[name] != straight[name]]


def test_random_sides_and_flips_are_refused_together(job_table):
    with pytest.raises(ValidationError, match="random_sides leaves nothing that flip could turn round"):
        job_with(job_table, random_sides=True, flip=0.1)


def test_held_out_pairs_are_never_flipped_and_the_same_for_every_seed(job_table):
    prompts = [[{"role": "user", "content": f"question {index}"}] for index in range(200)]
    rows = table_of([{**scored(), "prompt_id": f"p{index}", "prompt": prompt} for index, prompt in enumerate(prompts)])
    made = []
    for seed in (0, 1):
        job = job_with({**job_table, "seed": seed}, flip=1.0, heldout_fraction=0.25)
        pairs = pairs_table(rows, job).to_pylist()
        assert all((pair["chosen_from"] == "revision") == pair["heldout"] for pair in pairs)
        made.append([pair["prompt_id"] for pair in pairs if pair["heldout"]])
    assert made[0] == made[1]
    assert 35 < len(made[0]) < 65


def test_all_pairs_of_one_question_are_held_out_or_none(job_table):
    texts = [f"question {index}" + end for index in range(100) for end in ("", " ", "  ")]
    rows = []
    for line, text in enumerate(texts):
        prompt = [{"role": "user", "content": text}]
        place = {"prompt": prompt, "question_id": question_id(prompt), "source": "a", "line": line}
        rows.append({**scored(), **place, "prompt_id": f"p{line}"})
    pairs = pairs_table(
        table_of(rows), job_with(job_table, heldout_fraction=0.4), drawn_by=drawn_together([table_of(rows)])
    ).to_pylist()
    heldout = [pair["heldout"] for pair in pairs]
    assert heldout[::3] == heldout[1::3] == heldout[2::3]
    alone = pairs_table(table_of(rows[::3]), job_with(job_table, heldout_fraction=0.4))
    assert heldout[::3] == alone["heldout"].to_pylist()
    assert {pair["question_id"] for pair in pairs} == {row["question_id"] for row in rows}


def sampled(scores, **changes):
    names = [f"response_{number}" for number in range(1, len(scores) + 1)]
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "why?"}]}
    for name, score in zip(names, scores, strict=True):
        row |= {name: f"text of {name}", f"{name}_score": score, f"{name}_scores": {"r": score}}
        row[f"{name}_finish_reason"] = "stop"
    return {**row, **changes}


def test_best_and_worst_of_several_samples():
    settings = Pairs(chosen="best", rejected="worst")
    pair = pair_row(sampled([2.0, 5.0, 1.0, 5.0]), settings)
    assert (pair["chosen_from"], pair["rejected_from"], pair["reward_gap"]) == ("response_2", "response_3", 4.0)
    flat = pair_row(sampled([3.0, 3.0]), settings)
    assert sound(flat, settings)["dropped"] == "chosen and rejected are the same"


def test_longer_samples_are_held_back_and_unusable_ones_left_out():
    settings = Pairs(chosen="best", rejected="worst", length_coef="auto", drop_truncated="any")
    row = sampled([1.0, 1.2, 0.0], response_2="x" * 40, response_3_finish_reason="length")
    parts = [table_of([row]), table_of([sampled([9.0, 0.0], response_1="y" * 48)])]
    found = shaping_of(parts, settings)
    assert (found.length_coef, found.mean_length_gap) == (0.01, 4.0)
    pair = pair_row(row, settings, length_coef=found.length_coef)
    assert (pair["chosen_from"], pair["rejected_from"]) == ("response_1", "response_2")
    assert pair_row(row, settings)["chosen_from"] == "response_2"
    assert shaping_of(parts, Pairs()) is None


def test_a_row_with_too_few_usable_samples_is_dropped(job_table):
    job_table["synthesis"]["task"] = "best_of"
    job = job_with(job_table, chosen="best", rejected="worst", min_samples=3, drop_truncated="chosen")
    rows = table_of([sampled([1.0, 2.0, 3.0]), sampled([1.0, 2.0, 3.0], response_1_finish_reason="length")])
    assert pairs_table(rows, job)["dropped"].to_pylist() == [None, "fewer usable samples than pairs.min_samples"]


def test_the_answers_that_are_scored():
    turns = [Turn(name="response", samples=3), Turn(name="critique", after="response_1", user="?")]
    best = Pairs(chosen="best", rejected="worst")
    assert answers_of(best, turns) == ["response_1", "response_2", "response_3"]
    assert answers_of(Pairs(chosen="critique", rejected="response_2"), turns) == ["critique", "response_2"]
    assert answers_of(Pairs(chosen="chosen", rejected="rejected"), None) == ["chosen", "rejected"]
    with pytest.raises(InputError, match=r"no answer `revision`; there are response_1, .*critique"):
        answers_of(Pairs(), turns)
    with pytest.raises(InputError, match="a turn `response` with `samples` would make best and worst"):
        answers_of(best, [Turn(name="response"), Turn(name="other")])
