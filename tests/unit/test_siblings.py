"""What other arms have made and an arm takes from them: by its content, where all it depends on agrees."""

import io

import pyarrow as pa

from rdpo.config import Job
from rdpo.execution.run import Run
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.preference.known_logps import answer_key, known_logps, recalled
from rdpo.records import table_of
from rdpo.stages import evaluation, reference
from rdpo.stages.evaluation import _start_answers, start_settings
from rdpo.stages.reference import refer
from rdpo.tracking.console import Console

ROW = {
    "prompt_id": "p",
    "prompt_ids": [1, 2],
    "chosen_ids": [3],
    "rejected_ids": [4, 5],
    "reference_chosen_logps": -1.5,
    "reference_rejected_logps": -2.5,
}


def test_a_pair_with_its_sides_changed_is_known():
    flipped = {**ROW, "chosen_ids": [4, 5], "rejected_ids": [3]}
    found = recalled(flipped, known_logps([pa.Table.from_pylist([ROW])]))
    assert (found["reference_chosen_logps"], found["reference_rejected_logps"]) == (-2.5, -1.5)


def test_a_pair_of_which_one_answer_is_new_is_made_whole():
    found = recalled({**ROW, "rejected_ids": [4]}, known_logps([pa.Table.from_pylist([ROW])]))
    assert found["reference_chosen_logps"] is found["reference_rejected_logps"] is None


def test_where_the_prompt_ends_counts():
    assert answer_key([1, 2], [3]) != answer_key([1], [2, 3])
    assert answer_key([1, 2], [3]) == answer_key([1, 2], [3])


def test_siblings_with_other_weights_or_settings_are_not_asked(job_table, tmp_path, monkeypatch):
    job = Job.model_validate(job_table)
    settings = reference.settings(job)
    for name, changes in {"same": {}, "other": {"student": {**settings["student"], "weights": "others"}}}.items():
        folder = StageFolder(str(tmp_path / name), "reference")
        folder.begin("k")
        row = {**ROW, "reference_chosen_logps": -9.0 if name == "other" else -1.5}
        folder.write_parts(pa.Table.from_pylist([row]), "prompt_id")
        folder.commit(Manifest("reference", "k", {**settings, **changes}, {}), "prompt_id", 1)
    siblings = tuple(str(tmp_path / name) for name in ("same", "other", "not-begun"))
    run = Run(job, str(tmp_path / "own"), Console(io.StringIO()), lambda *_: False, siblings)
    monkeypatch.setattr("rdpo.preference.reference.add_reference", lambda rows, job, known, run_dir: known)
    known = refer(None, run)
    assert known == {answer_key([1, 2], [3]): -1.5, answer_key([1, 2], [4, 5]): -2.5}


def evaluated_by_siblings(tmp_path, **made):
    """Sibling runs with an evaluation each, of these settings and rows; their directories."""
    for name, (settings, rows) in made.items():
        folder = StageFolder(str(tmp_path / name), "evaluation")
        folder.begin("k")
        folder.write_parts(table_of(rows).drop_columns(["dropped"]), "prompt_id")
        folder.commit(Manifest("evaluation", "k", settings, {}), "prompt_id", len(rows))
    return tuple(str(tmp_path / name) for name in made)


def test_the_start_models_answers_to_another_turns_question_are_not_taken(job_table, tmp_path):
    job_table["synthesis"] |= {"task": "counterfactual", "values": {"treatment": "Be brief.", "negative": "Ramble."}}
    table = {**job_table, "pairs": {"chosen": "treatment", "rejected": "control"}}
    plain, asked = (
        Job.model_validate({**table, "evaluation": {**table["evaluation"], "condition": condition}})
        for condition in (None, "treatment")
    )
    assert start_settings(plain) != start_settings(asked)
    other = Job.model_validate({**table, "evaluation": {**table["evaluation"], "condition": "negative"}})
    assert start_settings(asked) != start_settings(other)

    answer = {"start": "no", "start_finish_reason": "stop", "start_tokens": 1, "prompt_id": "p"}
    siblings = evaluated_by_siblings(tmp_path, other=(evaluation.settings(other), [answer]))
    run = Run(asked, str(tmp_path / "own"), Console(io.StringIO()), lambda *_: False, siblings)
    assert _start_answers(run) == {}


def test_an_answer_is_taken_only_where_the_question_was_the_same_word_by_word(job_table, tmp_path):
    job = Job.model_validate(job_table)
    answer = {"start": "no", "start_finish_reason": "stop", "start_tokens": 1}
    question = [{"role": "user", "content": "why?"}]
    rows = [{**answer, "prompt_id": name, "prompt": question} for name in ("same", "other")]
    siblings = evaluated_by_siblings(tmp_path, made=(evaluation.settings(job), rows))
    run = Run(job, str(tmp_path / "own"), Console(io.StringIO()), lambda *_: False, siblings)
    asked = {"same": question, "other": [{"role": "user", "content": "why, in Dutch?"}]}
    assert _start_answers(run, asked) == {"same": answer}


def test_the_start_models_answers_are_taken_from_siblings_that_asked_alike(job_table, tmp_path):
    job = Job.model_validate(job_table)
    asked = evaluation.settings(job)
    others = evaluation.settings(job.model_copy(update={"seed": job.seed + 1}))
    answer = {"start": "no", "start_finish_reason": "stop", "start_tokens": 1}
    for name, settings in {"same": asked, "other": others}.items():
        folder = StageFolder(str(tmp_path / name), "evaluation")
        folder.begin("k")
        folder.write_parts(pa.Table.from_pylist([{**answer, "prompt_id": name}]), "prompt_id")
        folder.commit(Manifest("evaluation", "k", settings, {}), "prompt_id", 1)
    siblings = tuple(str(tmp_path / name) for name in ("same", "other", "not-begun"))
    run = Run(job, str(tmp_path / "own"), Console(io.StringIO()), lambda *_: False, siblings)
    assert _start_answers(run) == {"same": answer}
