"""Criteria: a judge asks for each by itself, their weighted mean is the score, and what is none drops the row."""

import asyncio
import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from rdpo.config import Job, JudgeReward
from rdpo.errors import InputError
from rdpo.evaluation.compare import summarize
from rdpo.files.manifest import Manifest
from rdpo.inspection.show import show_rows
from rdpo.preference.agreement import agreement
from rdpo.preference.calibration import tried_rewards
from rdpo.preference.criteria import criteria_of
from rdpo.preference.ratings import check_rubric
from rdpo.preference.rewards import judge as judge_module
from rdpo.preference.rewards.judge import Judge, JudgeKind
from rdpo.preference.scores import combine_table
from rdpo.report.alerts import alerts
from rdpo.report.report import write_report
from rdpo.stages.checks import check_other_sources
from rdpo.synthesis.engine import Generation
from tests.support.crash_counts import NoCrashCounts
from tests.support.jobs import write_jsonl
from tests.support.made_up import commit, evaluated, made_up_run, pair

RUBRIC = "{{ prompt }} {{ answer }} {{ criterion }}"
LISTED = [{"name": "clear", "text": "It is clear.", "weight": 3}, {"name": "short", "text": "It is short."}]
CLEAR = {"name": "clear", "text": "It is clear."}


def judge(**changes):
    settings = {"kind": "judge", "name": "j", "rubric": RUBRIC, "ratings": ["1", "5"], **changes}
    return JudgeReward.model_validate(settings)


def of_column(value, **row):
    return criteria_of(judge(criteria_column="rubric"), {"extra": json.dumps({"rubric": value}), **row})


class Engine:
    """Rates by the criterion: 5 where it asks for clearness, 1 where for shortness; otherwise it would not rate."""

    def __init__(self, folder, settings, seed):
        self.asked = []

    async def generate(self, prompt_ids, sampling, seed, stop_ids, logprobs=0, logprob_token_ids=()):
        text = "".join(chr(token + 31) for token in prompt_ids if token > 1)
        self.asked.append((text, seed))
        chances = (0.0, 1.0) if "clear" in text else (1.0, 0.0) if "short" in text else (0.0, 0.0)
        known = dict(zip(logprob_token_ids, [math.log(chance + 1e-12) for chance in chances], strict=False))
        return Generation("", "stop", 1, known)

    def shutdown(self):
        pass


@pytest.fixture
def judged(job_table, monkeypatch):
    monkeypatch.setattr(judge_module, "Engine", Engine)

    def judge_row(answers=("a",), extra=None, **settings):
        actor = Judge(judge(**settings), list(answers), Job.model_validate(job_table), NoCrashCounts)
        row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "q"}], "extra": json.dumps(extra or {})}
        table = pa.Table.from_pylist([{**row, "a": "x", "b": "y"}])

        async def blocks():
            return [block async for block in actor(table)]

        return asyncio.run(blocks())[0].to_pylist()[0], actor.engine.asked

    return judge_row


def test_each_criterion_is_asked_by_itself_and_their_weighted_mean_is_the_score(judged):
    row, asked = judged(criteria=LISTED)
    assert len(asked) == 2 and len({seed for _, seed in asked}) == 2
    assert row["a_scores"] == pytest.approx({"j": (3 * 5 + 1) / 4, "j.clear": 5, "j.short": 1})
    combined = combine_table(pa.Table.from_pylist([row]), {"j": 2.0}, ["a"])
    assert combined["a_score"].to_pylist() == [pytest.approx(8)]


def test_the_criteria_of_a_column_are_numbered(judged):
    column = {
        "rubric": [{"text": "Is it short?", "weight": 1, "name": "brevity"}, {"text": "Is it clear?", "weight": 1}]
    }
    row, _ = judged(criteria_column="rubric", extra=column)
    assert row["a_scores"] == pytest.approx({"j": 3, "j.1": 1, "j.2": 5})


def test_a_criterion_that_gets_no_rating_drops_the_row_and_is_named(judged):
    row, _ = judged(criteria=[*LISTED, {"name": "kind", "text": "It is kind."}])
    assert row["dropped"].startswith("reward j: criterion kind: the judge's ratings have 2e-12 of")


def test_pairs_are_compared_by_each_criterion(judged):
    settings = {"rubric": "{{ first }} {{ second }} {{ criterion }}", "pairwise": True, "ratings": ["A", "B"]}
    row, asked = judged(("a", "b"), criteria=LISTED, **settings)
    assert len(asked) == 4
    assert row["a_scores"] == row["b_scores"] == pytest.approx({"j": 0.5, "j.clear": 0.5, "j.short": 0.5})


@pytest.mark.parametrize(
    ("value", "texts", "weights"),
    [
        (["one", "two"], ["one", "two"], [1, 1]),
        ([{"text": "one", "weight": 2}, {"text": "two", "weight": -1, "name": None}], ["one", "two"], [2, -1]),
        ('[{"text": "one", "weight": 0.5}]', ["one"], [0.5]),
        ("only this", ["only this"], [1]),
    ],
)
def test_a_column_holds_criteria_in_one_of_several_forms(value, texts, weights):
    found = of_column(value)
    assert list(found.texts.values()) == texts and list(found.weights.values()) == weights


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is empty"),
        ("", "is empty"),
        ("  ", "is empty"),
        ([], "is empty"),
        ("[]", "is no list of criteria"),
        ("[broken", "begins as a list and is not JSON"),
        (7, "is no list of criteria"),
        ({"text": "one"}, "is no list of criteria"),
        ([7], "has a criterion 1 that is neither text nor a table"),
        (["one", " "], "has no text in criterion 2"),
        ([{"weight": 1}], "has no text in criterion 1"),
        ([{"text": "one", "points": 3}], "has an unknown key `points` in criterion 1; there are text, weight and name"),
        ([{"text": "one", "weight": "3"}], "has a weight in criterion 1 that is no finite number"),
        ([{"text": "one", "weight": True}], "has a weight in criterion 1 that is no finite number"),
        ([{"text": "one", "weight": 10**400}], "has a weight in criterion 1 that is no finite number"),
        ("[" * 100_000, "begins as a list and is not JSON"),
        ([{"text": "one", "weight": 1}, {"text": "two", "weight": -1}], "has weights that sum to 0"),
    ],
)
def test_what_is_no_criterion_is_said_with_the_column(value, reason):
    with pytest.raises(ValueError, match="criteria_column `rubric` ") as refusal:
        of_column(value)
    assert reason in str(refusal.value)


def test_a_row_without_the_column_is_dropped_with_the_reason(judged):
    row, asked = judged(criteria_column="rubric", extra={"other": "x"})
    assert row["dropped"] == "reward j: criteria_column `rubric` is empty"
    assert asked == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": [CLEAR, CLEAR]}, "two have the same name"),
        ({"criteria": [CLEAR], "criteria_column": "rubric"}, "remove them, or criteria_column"),
        ({"criteria": [{**CLEAR, "weight": 0}]}, "their weights sum to 0; give weights that sum to more than 0"),
        ({"criteria": [{**CLEAR, "text": " "}]}, "criteria.0.text"),
        ({"criteria": [{**CLEAR, "name": "Very clear"}]}, "criteria.0.name"),
    ],
)
def test_criteria_that_make_no_score_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        judge(**changes)


def test_the_rubric_asks_for_the_criterion_where_there_are_some():
    check_rubric(judge(criteria=LISTED))
    with pytest.raises(InputError, match=r"rewards.j.rubric uses criterion; give criteria, or criteria_column"):
        check_rubric(judge())
    with pytest.raises(InputError, match=r"asks the same for every criterion; use \{\{ criterion \}\} in it"):
        check_rubric(judge(criteria=LISTED, rubric="{{ answer }}"))


def test_without_criteria_nothing_is_added_to_the_key(job_table):
    job = Job.model_validate(job_table)
    assert (
        not {"criteria", "criteria_column", "endpoint", "top_logprobs"}
        & JudgeKind(judge(rubric="{{ answer }}")).settings(job).keys()
    )
    weighed = [{**CLEAR, "weight": weight} for weight in (1.0, 2.0)]
    keys = [JudgeKind(judge(criteria=[one])).settings(job) for one in weighed]
    assert keys[0] != keys[1]


def test_a_column_that_the_prompts_do_not_have_is_said_before_the_work(job_table, tmp_path):
    table = {"kind": "judge", "name": "j", "rubric": RUBRIC, "criteria_column": "rubric"}
    job = Job.model_validate({**job_table, "rewards": [table]})
    with pytest.raises(InputError, match=r"rewards.j.criteria_column: .* has no column `rubric`; it has 'prompt'"):
        check_other_sources(job)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q", "rubric": ["It is clear."]}])
    check_other_sources(job)


def test_two_plain_pairs_are_judged_by_a_plain_criterion(job_table):
    table = {"kind": "judge", "name": "j", "model": "a/judge", "rubric": RUBRIC, "criteria_column": "rubric"}
    job = Job.model_validate({**job_table, "rewards": [table]})
    [tried] = tried_rewards(job)
    assert tried.criteria_column is None and [criterion.name for criterion in tried.criteria] == ["helpful"]
    own = Job.model_validate({**job_table, "rewards": [table], "calibration": {"source": "known.jsonl"}})
    assert tried_rewards(own) == own.rewards


def test_how_far_each_criterion_agrees_is_told(job_table):
    scores = [{"j": 1.0, "j.clear": 2.0, "j.3": None}, {"j": 0.5, "j.clear": 3.0, "j.3": 1.0}]
    sides = {"chosen_scores": scores[:1], "rejected_scores": scores[1:]}
    pairs = pa.table({**sides, "chosen_from": ["revision"], "rejected_from": ["response"]})
    found = agreement([pairs], Job.model_validate(job_table).pairs)
    assert {name: sides.preferred for name, sides in found.items()} == {"j": 1.0, "j.clear": 0.0}


def test_report_and_terminal_show_each_criterion_also_where_a_row_has_fewer(job_table, tmp_path, capsys):
    run_dir = made_up_run(tmp_path / "run", job_table)
    shutil.rmtree(tmp_path / "run" / "training")
    rows = [evaluated(number) for number in range(3)]
    for number, row in enumerate(rows):
        for model in ("start_scores", "trained_scores"):
            row[model] |= {"length.1": 0.25 + number, "length.2": None if number else 4.0}
    pairs = [pair(number) for number in range(8)]
    for number, row in enumerate(pairs):
        for side in ("chosen_scores", "rejected_scores"):
            row[side] |= {"length.1": 0.5, "length.2": None if number else 4.0}
    commit(run_dir, "evaluation", rows, summarize(rows, {"length": 1.0}))
    commit(run_dir, "pairs", pairs)

    page = Path(write_report(run_dir)).read_text(encoding="utf-8")
    assert "length.1 2.25" in page and "length.2 4.00" in page
    show_rows(run_dir, "pairs", None, 8, dropped=False)
    shown = capsys.readouterr().out
    assert "length.1 0.500" in shown


def test_a_part_that_counts_against_an_answer_is_no_alarm():
    agreed = {"preferred": 0.2, "chosen_mean": 0.0, "rejected_mean": 1.0, "constant": False}
    manifest = Manifest("pairs", "k", {}, {}, summary={"agreement": {"rm": agreed, "rm.verbosity": agreed}})
    said = alerts({"pairs": manifest}, None)
    assert len([line for line in said if line.startswith("rm prefers")]) == 1
    assert not [line for line in said if "verbosity" in line]
