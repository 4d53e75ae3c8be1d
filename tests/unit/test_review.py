"""Pairs that people judge: what they see, and what becomes of their answers."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from rdpo.cli import main
from rdpo.errors import InputError
from rdpo.inspection.review import _ordered, places, read_review, write_pairs, write_review
from rdpo.synthesis.conversation import derive_pair
from tests.support.made_up import HOSTILE, made_up_run, pair


@pytest.fixture
def run_dir(job_table, tmp_path):
    return made_up_run(tmp_path / "run", job_table)


@pytest.fixture
def records(run_dir, tmp_path):
    write_review(run_dir, str(tmp_path / "review"))
    return json.loads((tmp_path / "review" / "records.json").read_text(encoding="utf-8"))


@pytest.fixture
def answered(records, tmp_path):
    """Write the records with people's answers: for each, which sides they preferred."""

    def answer(*of_records):
        for record, sides in zip(records, of_records, strict=False):
            there = {side: place for place, side in places(record["id"]).items()} | {"equal": "equal"}
            values = [{"value": there[side], "user_id": str(number)} for number, side in enumerate(sides)]
            record["responses"] = {"better": values} if values else {}
        path = tmp_path / "reviewed.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        return str(path)

    return answer


def test_people_see_neither_scores_nor_sides(records):
    assert len(records) == 7
    assert {frozenset(record) for record in records} == {frozenset({"id", "fields"})}
    assert {frozenset(record["fields"]) for record in records} == {frozenset({"prompt", "first", "second"})}
    assert any(HOSTILE in text for record in records for text in record["fields"].values())


def test_half_of_the_pairs_have_the_chosen_answer_first():
    first = [places(f"pair {number}")["first"] for number in range(1000)]
    assert 450 < first.count("chosen") < 550
    assert places("pair 1") == places("pair 1")


def test_a_part_is_drawn_whatever_the_order_of_the_rows(run_dir, tmp_path, records):
    write_review(run_dir, str(tmp_path / "few"), limit=3, asked="Which is plainer?")
    few = json.loads((tmp_path / "few" / "records.json").read_text(encoding="utf-8"))
    assert few == records[:3]
    settings = json.loads((tmp_path / "few" / ".argilla" / "settings.json").read_text(encoding="utf-8"))
    assert settings["questions"][0]["title"] == "Which is plainer?"


def test_answers_become_pairs_in_the_order_of_the_majority(run_dir, answered, tmp_path):
    path = answered(
        ["chosen", "chosen", "rejected"], ["rejected"], ["chosen", "rejected"], ["equal", "equal", "chosen"], []
    )
    found = read_review(run_dir, path)
    assert found.agrees == [True, False]
    assert sum(found.left_out.values()) == 5
    assert found.left_out["nobody has answered"] == 3
    assert [(row["votes_for"], row["votes_against"]) for row in found.rows] == [(2, 1), (1, 0)]
    turned = found.rows[1]
    assert "Arr" in turned["chosen"][0]["content"]
    assert turned["score_chosen"] < turned["score_rejected"]
    assert next(found.lines()).startswith("people agree with the run's order in 0.50 (")

    write_pairs(found, str(tmp_path / "pairs.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    turned = derive_pair(rows[1], "prompt")
    assert turned.answers["rejected"].startswith("Plain answer")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON of Argilla's records"),
        ("{}", r"is no list of records; write it with `dataset\.records\.to_json`"),
        ('[{"id": "x"}]', "record 1: 'x' is no pair of"),
    ],
)
def test_a_file_of_something_else_is_refused(run_dir, tmp_path, content, said):
    path = tmp_path / "reviewed.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_review(run_dir, str(path))


def test_a_label_of_another_question_is_refused(run_dir, records, tmp_path):
    records[0]["responses"] = {"better": [{"value": "the best"}]}
    (tmp_path / "reviewed.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(InputError, match="record 1: better: 'the best' is none of first, second, equal"):
        read_review(run_dir, str(tmp_path / "reviewed.json"))


def test_nothing_is_written_over(run_dir, answered, tmp_path, capsys):
    assert main(["review", run_dir, str(tmp_path / "review")]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    path = answered(["chosen"])
    target = tmp_path / "pairs.jsonl"
    assert main(["reviewed", run_dir, path, str(target)]) == 0
    assert f"1 pairs -> {target}" in capsys.readouterr().out
    assert main(["reviewed", run_dir, path, str(target)]) == 2


def test_argilla_reads_what_is_written(run_dir, tmp_path, monkeypatch):
    argilla = pytest.importorskip("argilla")
    # Its classes ask for a server when they are made, though nothing here needs one.
    monkeypatch.setattr(argilla.Argilla, "_get_default", classmethod(lambda cls: SimpleNamespace(api=_AnyApi())))
    write_review(run_dir, str(tmp_path / "review"))
    settings = argilla.Settings.from_json(tmp_path / "review" / ".argilla" / "settings.json")
    assert [field.name for field in settings.fields] == ["prompt", "first", "second"]
    assert settings.questions["better"].labels == ["first", "second", "equal"]
    records = json.loads((tmp_path / "review" / "records.json").read_text(encoding="utf-8"))
    assert [argilla.Record.from_dict(record).id for record in records] == [record["id"] for record in records]


class _AnyApi:
    def __getattr__(self, name):
        return None


def test_reasoning_stays_with_its_answer():
    row = pair(3) | {"chosen_reasoning": "Plainly.", "rejected_reasoning": ""}
    found = _ordered(row, "rejected", Counter({"first": 1}), places(row["prompt_id"]))
    assert found["rejected"] == [{"role": "assistant", "content": "Plain answer 3.", "reasoning_content": "Plainly."}]
    assert found["chosen"] == row["rejected"]
