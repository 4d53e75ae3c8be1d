"""A job sent to a cluster: what goes along, and what is said where the cluster refuses it."""

import re

import pytest

from rdpo.cli import main
from rdpo.cluster.submission import RUNTIME_ENV
from tests.support.jobs import write_job


@pytest.fixture
def sent(monkeypatch, tmp_path, job_table):
    """Submits the job from its folder to a cluster that obeys; what the cluster was sent."""
    import ray.job_submission

    write_job(tmp_path / "job.toml", job_table)
    monkeypatch.chdir(tmp_path)
    seen = {}

    def to(refusal=None, *options):
        class Client:
            def __init__(self, address):
                seen["address"] = address

            def submit_job(self, **what):
                seen.update(what)
                if refusal:
                    raise refusal

        monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Client)
        return main(["submit", "job.toml", *(options or ("--run-dir", "s3://b/run", "--id", "one"))]), seen

    return to


def test_the_job_its_changes_and_what_is_left_out_go_along(sent, tmp_path, capsys):
    (tmp_path / "jobs").mkdir()
    (tmp_path / RUNTIME_ENV).write_text("excludes: [.git]\n")
    changes = ("--set", "training.beta=0.2", "--set", "name=a")
    extent = ("--until", "pairs", "--fresh")
    code, what = sent(None, "--run-dir", "/shared/a run", "--address", "http://h:1", *changes, *extent)
    assert (code, what["address"]) == (0, "http://h:1")
    assert what["entrypoint"] == (
        "python -m rdpo run job.toml --run-dir '/shared/a run' --set training.beta=0.2 --set name=a "
        "--until pairs --fresh"
    )
    assert what["runtime_env"] == {"excludes": [".git"], "working_dir": "."}
    output = capsys.readouterr().out
    assert re.search(r"^job:  a-\d{8}-\d{6}$", output, re.MULTILINE)
    assert f"logs: RAY_AUTH_MODE=token ray job logs --follow --address http://h:1 {what['submission_id']}" in output


def refusals():
    from ray.exceptions import AuthenticationError

    return {
        "refuses the token in RAY_AUTH_TOKEN": AuthenticationError("Forbidden"),
        "no Ray dashboard answers there": ConnectionError("Failed to connect"),
        r"100 MiB packed; its largest files are weights\.bin \(3 MiB\), .*under `excludes`": RuntimeError(
            "Request failed with status code 413: Maximum request body size 104857600 exceeded.."
        ),
        "cluster: Job with submission_id one already exists": RuntimeError(
            "Request failed with status code 500: Traceback\n  File\nJob with submission_id one already exists\n"
        ),
    }


@pytest.mark.parametrize("said", refusals())
def test_a_refusal_is_one_line_with_the_remedy(sent, tmp_path, capsys, said):
    (tmp_path / "weights.bin").write_bytes(bytes(3 << 20))
    code, _ = sent(refusals()[said], "--run-dir", "s3://b/run", "--address", "cluster", "--id", "one")
    output = capsys.readouterr().err
    assert code == 2 and output.count("\n") == 1
    assert re.search(said, output)


def test_a_run_needs_a_place_that_stays(sent, capsys):
    code, what = sent(None, "--run-dir", "runs/mine")
    assert code == 2 and not what
    assert "--run-dir runs/mine" in capsys.readouterr().err


def test_a_job_that_is_wrong_is_not_sent(sent, capsys):
    code, what = sent(None, "--run-dir", "/shared/run", "--set", "training.bta=1")
    assert code == 2 and not what
    assert "bta: unknown key" in capsys.readouterr().err
