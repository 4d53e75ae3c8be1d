"""Tasks of lm-evaluation-harness on a run's two models: what the harness says, and what changed by document."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rdpo.cli import main
from rdpo.config import Job, to_toml
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.inspection.harness import changes

# The harness looks through its thousands of tasks, each time.
pytestmark = pytest.mark.long

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "blue"]
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [{"question": f"Which colour has number {number}?", "label": number % 2} for number in range(12)]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task whose documents lie beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (folder / "colours.yaml").write_text(TASK.format(path=folder / "questions.jsonl"), encoding="utf-8")
    return str(folder)


@pytest.fixture
def run_dir(job_table, tiny_model, tmp_path):
    """A run whose published model has other weights than its start model."""
    job_table["evaluation"]["engine"] = {"dtype": "float32"}
    run_dir = tmp_path / "run"
    torch.manual_seed(3)
    trained = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for parameter in trained.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(run_dir / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(run_dir / "model")
    (run_dir / "config.toml").write_text(to_toml(Job.model_validate(job_table)), encoding="utf-8")
    StageFolder(str(run_dir), "model").commit(Manifest("model", "k", {}, {}))
    return str(run_dir)


def accuracy(folder):
    """How often a model finds the right colour the likelier one, without the harness."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def likelihood(question, answer):
        begin, whole = (tokenizer(text).input_ids for text in (question, f"{question} {answer}"))
        logps = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
        return sum(float(logps[at - 1, whole[at]]) for at in range(len(begin), len(whole)))

    with torch.inference_mode():
        chosen = [max((0, 1), key=lambda at: likelihood(row["question"], ("red", "blue")[at])) for row in QUESTIONS]
    return sum(at == row["label"] for at, row in zip(chosen, QUESTIONS, strict=True)) / len(QUESTIONS)


def test_both_models_are_measured_and_the_difference_is_paired(run_dir, tasks, tiny_model, capsys):
    (change,) = changes(run_dir, ["colours"], include=tasks)
    assert (change.task, change.metric, change.documents) == ("colours", "acc", len(QUESTIONS))
    assert change.start == pytest.approx(accuracy(tiny_model))
    assert change.trained == pytest.approx(accuracy(f"{run_dir}/model"))
    assert change.difference.mean == pytest.approx(change.trained - change.start)
    assert change.difference.low <= change.difference.mean <= change.difference.high
    assert main(["harness", run_dir, "colours", "--include", tasks, "--limit", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["colours", "acc", "4"]


def test_a_mistyped_task_is_answered_with_the_one_that_was_meant(run_dir, tasks, capsys):
    assert main(["harness", run_dir, "colors", "--include", tasks]) == 2
    assert "no task colors (did you mean `colours`?)" in capsys.readouterr().err
