"""Which rows the rewards score: what the student's own log-probs say of them, and where the orders are cut off."""

import math
import random

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from rdpo.config import Job, Selection
from rdpo.errors import InputError
from rdpo.experiments.rounds import job_of_round
from rdpo.modeling.chat import student_chat
from rdpo.preference.selection import (
    CERTAINTY,
    ENTROPY,
    SURE,
    UNDECIDED,
    Cutoff,
    Screen,
    check_selection,
    choose,
    cutoff_of,
    measured,
    sampled_turn,
)
from rdpo.stages import rewards, screening
from rdpo.stages.pools import pools_of
from rdpo.stages.table import stages_of
from tests.support.models import llama


@pytest.fixture
def selecting(job_table):
    job_table["synthesis"] |= {"task": "best_of"}
    job_table["pairs"] = {"chosen": "best", "rejected": "worst"}
    job_table["selection"] = {"prompts": 3, "pairs": 2}
    return job_table


def test_entropy_and_certainty_by_hand():
    row = measured({"prompt_id": "a"}, [-10.0, -14.0, -30.0], [0.5, -2.0, 1.25])
    assert (row[ENTROPY], row[CERTAINTY]) == (18.0, 3.25)
    # Without a model to compare with no answer is preferred.
    assert measured({"prompt_id": "a"}, [-10.0], [])[CERTAINTY] == 0.0


@pytest.mark.parametrize(("logps", "ratios"), [([-1.0, math.nan], [0.1, 0.2]), ([-1.0, -2.0], [0.1, math.nan])])
def test_a_row_without_a_log_prob_is_dropped(logps, ratios):
    row = measured({"prompt_id": "a"}, logps, ratios)
    assert row["dropped"].startswith("an answer has no tokens, one beyond the model's embedding")


def rows_of(*values):
    return [
        {"prompt_id": name, ENTROPY: entropy, CERTAINTY: certainty, "dropped": None}
        for name, entropy, certainty in values
    ]


ROWS = rows_of(("a", 5.0, 9.0), ("b", 9.0, 0.0), ("c", 7.0, 2.0), ("d", 8.0, 2.0), ("e", 1.0, 99.0), ("f", 7.0, 3.0))


def kept(rows, settings):
    cutoff = cutoff_of([pa.Table.from_pylist(rows)], settings)
    return {row["prompt_id"]: row["dropped"] for row in choose(pa.Table.from_pylist(rows), cutoff).to_pylist()}


def test_first_the_highest_entropy_then_the_largest_certainty():
    reasons = kept(ROWS, Selection(prompts=4, pairs=2))
    # By entropy b, d, then c and f; of these f, then c and d, of which d has the higher entropy.
    assert reasons == {"a": SURE, "e": SURE, "b": UNDECIDED, "c": UNDECIDED, "d": None, "f": None}
    assert kept(ROWS, Selection(prompts=2)) == {**dict.fromkeys("acef", SURE), "b": None, "d": None}
    assert kept(ROWS, Selection(pairs=1)) == {**dict.fromkeys("abcdf", UNDECIDED), "e": None}


def test_fewer_rows_than_are_wanted_are_all_kept():
    assert set(kept(ROWS, Selection(prompts=6, pairs=5)).values()) == {None, UNDECIDED}
    assert set(kept(ROWS[:2], Selection(prompts=6, pairs=5)).values()) == {None}
    assert cutoff_of([], Selection(prompts=2)) == Cutoff(None, None)


def test_equals_are_told_apart_by_their_ids_and_not_by_their_order():
    equal = rows_of(*((name, 1.0, 1.0) for name in "dbca"))
    assert [name for name, reason in kept(equal, Selection(prompts=3, pairs=2)).items() if not reason] == ["b", "a"]


def test_what_is_kept_depends_on_neither_blocks_nor_order():
    draw = random.Random(0)
    rows = rows_of(*((f"{place}", draw.random(), draw.random()) for place in range(50)))
    settings, expected = Selection(prompts=30, pairs=11), kept(rows, Selection(prompts=30, pairs=11))
    assert sum(reason is None for reason in expected.values()) == 11
    draw.shuffle(rows)
    blocks = [pa.Table.from_pylist(rows[start : start + 7]) for start in range(0, 50, 7)]
    cutoff = cutoff_of(blocks, settings)
    found = [row for block in blocks for row in choose(block, cutoff).to_pylist()]
    assert {row["prompt_id"]: row["dropped"] for row in found} == expected
    # An independent program for the same.
    first = sorted(rows, key=lambda row: row[ENTROPY], reverse=True)[:30]
    best = sorted(first, key=lambda row: row[CERTAINTY], reverse=True)[:11]
    assert {row["prompt_id"] for row in found if not row["dropped"]} == {row["prompt_id"] for row in best}


def whole_logp(model, chat, row, name):
    """The log-prob of an answer, from whole logits."""
    prompt = chat.prompt_ids(row["prompt"])
    answer = chat.completion_ids(row[name], row[f"{name}_finish_reason"] == "stop")
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(answer)[:, None]).sum().item()


def test_the_students_log_probs_are_those_of_whole_logits(selecting, tokenizer, tmp_path):
    torch.manual_seed(11)
    start = llama(tmp_path / "start", tokenizer)
    selecting["selection"] |= {"reference": start}
    selecting["synthesis"]["sampling"] |= {"temperature": 1.0}
    job = Job.model_validate(selecting)
    check_selection(job)
    rows = []
    for number in range(3):
        row = {"prompt_id": f"{number}", "prompt": [{"role": "user", "content": f"question {number}"}], "dropped": None}
        for sample in range(1, 5):
            row |= {f"response_{sample}": f"answer {sample * number}", f"response_{sample}_finish_reason": "stop"}
        rows.append(row)
    rows[2]["response_4_finish_reason"] = "length"

    found = Screen(job)(pa.Table.from_pylist(rows)).to_pylist()
    student, before = (AutoModelForCausalLM.from_pretrained(name) for name in (job.student.model, start))
    chat, names = student_chat(job), [f"response_{sample}" for sample in range(1, 5)]
    for row in found:
        own = [whole_logp(student, chat, row, name) for name in names]
        ratios = [logp - whole_logp(before, chat, row, name) for logp, name in zip(own, names, strict=True)]
        assert row[ENTROPY] == pytest.approx(-sum(own) / 4, rel=1e-5)
        assert row[CERTAINTY] == pytest.approx(max(ratios) - min(ratios), rel=1e-3)
        assert row["dropped"] is None
    assert found[2][CERTAINTY] > 0


def test_rows_pass_through_screening_and_selection_to_the_rewards(selecting, job_table):
    job = Job.model_validate(selecting)
    stages = {stage.name: stage for stage in stages_of(job)}
    assert stages["selection"].inputs == ("screening",)
    assert stages["rewards"].inputs == ("synthesis", "selection")
    # What is chosen depends on all rows: none of these may be taken up while they are still made.
    assert not stages["screening"].joins and not stages["selection"].joins
    assert [pool.setting for pool in pools_of(job)][:2] == ["synthesis.engine", "selection"]

    class Asked:
        def __init__(self, job):
            self.job = job

        def source(self, name):
            return name

    assert rewards.answered(Asked(job)) == "selection"
    plain = job.model_copy(update={"selection": None})
    assert rewards.answered(Asked(plain)) == "synthesis"
    assert next(stage for stage in stages_of(plain) if stage.name == "rewards").inputs == ("synthesis",)


def test_how_many_are_kept_measures_nothing_again(selecting):
    more = {**selecting, "selection": {"prompts": 5, "pairs": 4}}
    assert screening.settings(Job.model_validate(selecting)) == screening.settings(Job.model_validate(more))
    against = {**selecting, "selection": {"prompts": 3, "pairs": 2, "reference": selecting["student"]["model"]}}
    assert screening.settings(Job.model_validate(selecting)) != screening.settings(Job.model_validate(against))


def test_later_rounds_have_implicit_rewards_against_the_model_before(selecting):
    selecting["rounds"] = {"count": 3}
    job = Job.model_validate(selecting)
    starts = ["start", "runs/x/rounds/1/model", "runs/x/rounds/2/model"]
    references = [job_of_round(job, number, starts[:number]).selection.reference for number in (1, 2, 3)]
    assert references == [None, "start", "runs/x/rounds/1/model"]
    named = Job.model_validate({**selecting, "selection": {"pairs": 2, "reference": "fixed"}})
    assert job_of_round(named, 3, starts).selection.reference == "fixed"
    entropy = Job.model_validate({**selecting, "selection": {"prompts": 2}})
    assert job_of_round(entropy, 3, starts).selection.reference is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": {}}, "give prompts, pairs or both"),
        ({"selection": {"prompts": 2, "pairs": 2}}, "pairs are chosen among prompts; give fewer of them"),
        ({"synthesis": {"task": "best_of", "reasoning": "strip"}}, "answers are read without reasoning"),
        ({"student": {"adapter": "some/adapter"}}, "selection: pairs needs a student that is whole"),
        ({"synthesis": {}, "pairs": {}}, "it goes by samples of the student; give synthesis.task"),
    ],
)
def test_selections_that_mean_nothing_are_refused(selecting, changes, message):
    for section, change in changes.items():
        selecting[section] = {**selecting["student"], **change} if section == "student" else change
    with pytest.raises(ValueError, match=message):
        Job.model_validate(selecting)


TURNS = """
name = "turns"
[[turns]]
name = "response"
{}
[[turns]]
name = "other"
user = "Otherwise: {{{{ prompt }}}}"
"""


@pytest.mark.parametrize(
    ("turn", "synthesis", "message"),
    [
        ("temperature = 0.7", {}, "are not drawn from the student's own distribution"),
        ("top_p = 0.9", {}, "are not drawn from the student's own distribution"),
        ("", {"sampling": {"temperature": 1.0, "min_p": 0.1}}, "are not drawn from the student's own distribution"),
        ('user = "So: {{ prompt }}"', {}, "are not what the student itself says to the bare prompt"),
        ('prefill = "So"', {}, "are not what the student itself says to the bare prompt"),
        ("", {"teacher": "another/model"}, "are not what the student itself says to the bare prompt"),
    ],
)
def test_answers_that_are_no_samples_of_the_student_are_refused(selecting, tmp_path, turn, synthesis, message):
    (tmp_path / "task.toml").write_text(TURNS.format(turn))
    common = {"task": str(tmp_path / "task.toml"), "sampling": {"temperature": 1.0}}
    selecting["synthesis"] = {**selecting["synthesis"], **common, **synthesis}
    selecting["pairs"] = {"chosen": "response", "rejected": "other"}
    with pytest.raises(InputError, match=message):
        sampled_turn(Job.model_validate(selecting))
    selecting["selection"]["turn"] = "nothing"
    with pytest.raises(InputError, match="'nothing' is no turn of the task; there are response, other"):
        sampled_turn(Job.model_validate(selecting))


def test_a_reference_with_other_tokens_is_refused(selecting, tmp_path):
    from tests.support.models import byte_tokenizer

    other = llama(tmp_path / "other", byte_tokenizer(merges=(("t", "h"), ("th", "e"), ("e", "r"))))
    selecting["selection"]["reference"] = other
    selecting["synthesis"]["sampling"] |= {"temperature": 1.0}
    with pytest.raises(InputError, match="it has another tokenizer than the student"):
        check_selection(Job.model_validate(selecting))
