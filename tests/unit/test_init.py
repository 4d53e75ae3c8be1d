"""A first job file out of answers that are piped or given as options."""

import io
import sys

import pytest

from rdpo.cli import main
from rdpo.config import ClassifierReward, JudgeReward, load_job
from tests.support.jobs import write_jsonl


@pytest.fixture
def init(tmp_path, monkeypatch, capsys):
    """Run `rdpo init` in a folder with prompts and pairs; exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("asks.jsonl", [{"id": "a", "question": "why?"}])
    write_jsonl("pairs.jsonl", [{"prompt": "why?", "chosen": "so", "rejected": "no"}])

    def run(*options, answers=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in answers)))
        code = main(["init", *options])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run


def test_answers_from_a_pipe_are_asked_again_until_they_will_do(init):
    answers = ["none.jsonl", "asks.jsonl", "questionn", "", "no-such-model", "owner/student", "roleplay", "same"]
    code, output, _ = init("mine.toml", answers=[*answers, "tests.rewards:lengths", "tests.rewards:length", "two", "2"])
    assert code == 0, output
    output = " ".join(output.split())
    for remark in (
        "none.jsonl does not exist",
        "no column `questionn` (did you mean `question`?)",
        "model no-such-model: no such folder or file",
        "has no attribute 'lengths'",
        "answer with a number",
        "rdpo run mine.toml --dry-run",
    ):
        assert remark in output
    job = load_job("mine.toml")
    assert (job.name, job.prompts.column, job.student.model) == ("mine", "question", "owner/student")
    assert (job.synthesis.task, job.synthesis.teacher, job.rewards[0].name) == ("roleplay", None, "length")
    assert (job.training.num_workers, job.training.gpus_per_worker, job.evaluation.engine.gpus) == (2, 1, 1)


def test_a_wrong_answer_is_asked_for_again_three_times_at_most(init):
    code, _, errors = init("mine.toml", answers=["a.jsonl", "b.jsonl", "c.jsonl", "asks.jsonl"])
    assert code == 2
    assert "rdpo: --prompts: c.jsonl does not exist; give a file, a folder or hf:DATASET; asked 3 times" in errors


def test_options_and_defaults_without_a_question(init):
    asked = ("--yes", "--prompts", "asks.jsonl", "--student", "owner/student", "--gpus", "0")
    assert init("judged.toml", *asked, "--teacher", "owner/teacher")[0] == 0
    job = load_job("judged.toml")
    assert isinstance(job.rewards[0], JudgeReward) and job.rewards[0].model == job.synthesis.teacher == "owner/teacher"
    assert (job.training.num_workers, job.training.gpus_per_worker, job.reference.gpus) == (1, 0, 0)
    assert init("scored.toml", *asked, "--reward", "owner/reward-model")[0] == 0
    assert isinstance(load_job("scored.toml").rewards[0], ClassifierReward)


def test_ready_pairs_need_no_teacher_and_no_reward(init):
    assert init("ready.toml", "--yes", "--prompts", "pairs.jsonl", "--student", "owner/student", "--gpus", "1")[0] == 0
    job = load_job("ready.toml")
    assert (job.synthesis.task, job.rewards, job.pairs.chosen) == (None, [], "chosen")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--yes", "--prompts", "asks.jsonl"], "--student: has no default; give it"),
        (["--yes", "--prompts", "asks.jsonl", "--student", "./none"], "model ./none: no such folder or file"),
        (["--prompts", "asks.jsonl"], "the answers end before --column"),
        (["no/folder/job.toml", "--yes", "--prompts", "pairs.jsonl", "--student", "a/b"], "cannot be written"),
    ],
)
def test_what_is_missing_or_wrong_is_one_message(init, tmp_path, options, said):
    code, _, output = init(*options)
    assert (code, said in output) == (2, True), output
    assert not list(tmp_path.glob("**/*.toml"))


def test_a_file_that_is_there_stays_as_it_is(init, tmp_path):
    (tmp_path / "job.toml").write_text("mine")
    code, _, output = init("--yes", "--prompts", "asks.jsonl", "--student", "a/b")
    assert (code, "job.toml: exists" in output) == (2, True)
    assert (tmp_path / "job.toml").read_text() == "mine"
