"""Commands without a job file: the job that they print is the one that they run."""

import tomllib

import pytest

from rdpo.cli import main
from rdpo.config import job_of
from tests.support.jobs import write_jsonl


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Type a command in a folder with prompts and pairs; exit code, output, errors, and what would be run."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("asks.jsonl", [{"id": "a", "question": "why?"}])
    write_jsonl("pairs.jsonl", [{"prompt": "why?", "chosen": "so", "rejected": "no"}])
    executed = []
    monkeypatch.setattr(
        "rdpo.api.execute", lambda job, run_dir, until=None: executed.append((job, str(run_dir), until))
    )

    def typed(*arguments):
        code = main([*arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split()), executed

    return typed


def test_dpo_on_a_data_set_in_one_line(run):
    code, printed, _, executed = run(
        *("dpo", "--model", "owner/student", "--dataset", "pairs.jsonl", "--loss", "ipo", "--gpus", "0"),
        *("--set", "training.batch_size=4"),
    )
    assert code == 0
    [(job, run_dir, until)] = executed
    assert (job.training.loss, job.training.batch_size, job.synthesis.task) == ("ipo", 4, None)
    assert (job.prompts.source, run_dir, until) == ("pairs.jsonl", "runs/dpo", None)
    assert job_of(tomllib.loads(printed), "printed") == job


def test_synth_stops_behind_the_teacher(run):
    asked = ("--prompts", "asks.jsonl", "--task", "roleplay", "--teacher", "owner/teacher", "--gpus", "1")
    code, printed, _, executed = run("synth", "--model", "owner/student", *asked, "--name", "mine")
    assert code == 0
    [(job, run_dir, until)] = executed
    assert (job.synthesis.task, job.synthesis.teacher, job.prompts.column) == ("roleplay", "owner/teacher", "question")
    assert (run_dir, until, job.synthesis.engine.gpus) == ("runs/mine", "synthesis", 1)
    assert 'name = "mine"' in printed


def test_score_takes_a_data_set_in_the_place_of_a_run(run):
    asked = ("--dataset", "pairs.jsonl", "--reward", "rdpo.rewards:instructions", "--model", "owner/student")
    code, printed, _, executed = run("score", "--gpus", "0", *asked)
    assert code == 0
    [(job, run_dir, until)] = executed
    assert [(reward.kind, reward.function) for reward in job.rewards] == [("function", "rdpo.rewards:instructions")]
    assert (run_dir, until, job.synthesis.task) == ("runs/score", "rewards", None)
    assert job_of(tomllib.loads(printed), "printed") == job


@pytest.mark.parametrize("reward", ["owner/rm", "judge"])
def test_what_scores_has_a_gpu_where_there_are_some(run, reward):
    asked = ("--dataset", "pairs.jsonl", "--reward", reward, "--model", "owner/student", "--dry-run")
    found = []
    for gpus in ("2", "0"):
        job = job_of(tomllib.loads(run("score", "--gpus", gpus, *asked)[1]), "printed")
        found.append((job.rewards[0].engine or job.rewards[0]).gpus)
    assert found == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give the directory of a run; or --dataset"),
        (("--dataset", "pairs.jsonl"), "takes --reward, and --model"),
        (("--dataset", "pairs.jsonl", "--reward", "a/b"), "takes --reward, and --model"),
        (("no-such-run",), "no run here"),
    ],
)
def test_score_says_what_it_lacks(run, arguments, said):
    code, _, error, executed = run("score", *arguments)
    assert (code, executed) == (2, [])
    assert said in error


def test_a_dry_run_prints_the_job_alone(run):
    code, printed, _, executed = run("dpo", "--model", "a/b", "--dataset", "pairs.jsonl", "--gpus", "0", "--dry-run")
    assert (code, executed) == (0, [])
    assert "`rdpo run FILE` does the same" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dataset", "none.jsonl"), "none.jsonl does not exist"),
        (("--dataset", "asks.jsonl", "--column", "questionn"), "no column `questionn` (did you mean `question`?)"),
        (("--dataset", "pairs.jsonl", "--loss", "dppo"), "did you mean"),
        (("--dataset", "pairs.jsonl", "--set", "training.bta=1"), "unknown key"),
    ],
)
def test_what_is_wrong_is_one_message_and_nothing_runs(run, arguments, said):
    code, _, errors, executed = run("dpo", "--model", "a/b", "--gpus", "0", *arguments)
    assert (code, executed) == (2, [])
    assert said in errors
