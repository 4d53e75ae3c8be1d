"""Pairs and answers for other programs: what is written loads where it is meant to."""

import json

import pytest

from rdpo.cli import main
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.inspection.export import export
from rdpo.records import question_id
from rdpo.synthesis.prompts import prompt_row
from rdpo.synthesis.sources import read_rows
from tests.support.made_up import made_up_run


@pytest.fixture
def run_dir(job_table, tmp_path):
    return made_up_run(tmp_path / "run", job_table)


@pytest.fixture
def pairs(run_dir, tmp_path):
    """The exported pairs as the `datasets` library finds them by the card."""
    from datasets import load_dataset

    export(run_dir, "pairs", str(tmp_path / "pairs"))
    return load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))


def test_pairs_load_with_their_splits_and_scores(pairs, tmp_path):
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 5, "test": 2}
    row = next(row for row in pairs["train"] if row["prompt"][0]["content"] == "question 1")
    assert row["chosen"] == [{"role": "assistant", "content": "Plain answer 1."}]
    assert (row["score_chosen"], row["score_rejected"], row["reward_gap"]) == (2.0, 0.5, 1.5)
    assert row["chosen_scores"] == {"length": 2.0}
    assert row["question_id"] == question_id(row["prompt"])
    card = (tmp_path / "pairs" / "README.md").read_text(encoding="utf-8")
    assert "| `question_id` | identity of the question" in card
    assert "| test | 2 | held out from training |" in card
    assert "- 1: `reward gap is below pairs.min_gap`" in card


def test_pairs_train_in_trl(pairs, tiny_model, tmp_path):
    pytest.importorskip("trl")
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = DPOTrainer(tiny_model, args=settings, train_dataset=pairs["train"], processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2
    # Before the first step policy and reference are the same.
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)


def test_answers_are_lists_of_outputs(run_dir, tmp_path, capsys):
    assert main(["export", run_dir, "answers", str(tmp_path / "answers")]) == 0
    assert f"3 answers -> {tmp_path}/answers/trained.json" in capsys.readouterr().out
    start, trained = (json.loads((tmp_path / "answers" / f"{side}.json").read_text()) for side in ("start", "trained"))
    assert [one["instruction"] for one in start] == [one["instruction"] for one in trained]
    assert sorted(one["output"] for one in trained) == [f"trained answer {number}" for number in range(3)]
    assert {one["generator"] for one in trained} == {"tiny"}
    assert all(set(one) == {"instruction", "output", "generator"} for one in start)


def test_what_is_not_made_or_would_be_written_over_is_refused(run_dir, tmp_path):
    with pytest.raises(InputError, match="is not empty"):
        export(run_dir, "pairs", run_dir)
    (tmp_path / "run" / "evaluation" / "manifest.json").unlink()
    with pytest.raises(InputError, match="the evaluation stage is not finished"):
        export(run_dir, "answers", str(tmp_path / "answers"))


def test_exported_pairs_that_are_read_again_ask_the_question_that_they_asked(run_dir, tmp_path, job_table):
    export(run_dir, "pairs", str(tmp_path / "pairs"))
    del job_table["synthesis"], job_table["rewards"]
    job_table["prompts"]["system"] = "Be brief."
    job = Job.model_validate(job_table)
    rows = [row for _, row in read_rows(str(tmp_path / "pairs" / "data" / "train.parquet"))]
    # As a run whose templates stand around its prompts leaves them.
    wrapped = [{**row, "prompt": [{"role": "user", "content": f"In rhyme: {index}"}]} for index, row in enumerate(rows)]
    again = [prompt_row("train.parquet", line, row, job) for line, row in enumerate(wrapped)]
    assert [row["question_id"] for row in again] == [row["question_id"] for row in rows]
