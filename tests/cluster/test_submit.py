"""`ray job submit` to a real head with its token on, from elsewhere than the repository: onto a disk, into a store."""

import json
import os
import subprocess
import sys
import time

import pytest

from rdpo.files.stage_folder import StageFolder
from tests.support.head import RAY, Head
from tests.support.jobs import ALL_STAGES, whole_job, write_job, write_jsonl
from tests.support.stores import client, environment, keys

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

PATIENCE_S = 900
BUCKET = "runs"


@pytest.fixture(scope="module")
def store():
    """The address of an S3 protocol server."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def head(tmp_path_factory, store):
    one = Head(tmp_path_factory.mktemp("head"), "--num-cpus=6", **environment(store))
    yield one
    one.end()


@pytest.fixture
def work(tmp_path, wordy_models, tiny_classifier):
    """A working directory with a job and its prompts, and nothing else."""
    folder = tmp_path / "work"
    folder.mkdir()
    rows = [{"prompt": f"question {i}", "split": "train" if i % 4 else "heldout"} for i in range(12)]
    write_jsonl(folder / "prompts.jsonl", rows)
    write_job(folder / "job.toml", whole_job("prompts.jsonl", wordy_models[0], tiny_classifier))
    return folder


def submission(head, name, work, run_dir, *more):
    command = [*RAY, "job", "submit", "--address", head.dashboard, "--submission-id", name, "--working-dir", str(work)]
    return [*command, "--", sys.executable, "-m", "rdpo", "run", "job.toml", "--run-dir", str(run_dir), *more]


def test_a_submitted_job_succeeds_and_another_on_its_run_is_refused(head, work, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "first.log"
    with open(log, "w") as out:
        first = subprocess.Popen(
            submission(head, "first", work, run_dir), env=head.environ, cwd=tmp_path, stdout=out, stderr=out
        )
    deadline = time.monotonic() + PATIENCE_S
    while StageFolder(str(run_dir), "prompts").manifest() is None:
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    second = subprocess.run(
        submission(head, "second", work, run_dir), env=head.environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert second.returncode and "another rdpo command works in this run" in second.stdout
    assert first.wait(PATIENCE_S) == 0, log.read_text()
    assert "SUCCEEDED" in head.job("status", "first").stdout.upper()
    assert "FAILED" in head.job("status", "second").stdout.upper()
    assert all(StageFolder(str(run_dir), stage).manifest() for stage in ALL_STAGES)
    assert "win rate" in log.read_text()
    assert (run_dir / "report.html").is_file()


def test_a_wrong_token_and_a_folder_too_large_are_one_message(head, work, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    command = [sys.executable, "-m", "rdpo", "submit", "job.toml", "--run-dir", str(tmp_path / "run")]

    def refusal(environ):
        there = ["--address", head.dashboard]
        return subprocess.run([*command, *there], env=environ, cwd=work, capture_output=True, text=True, timeout=300)

    done = refusal(head.environ | {"RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert done.returncode == 2 and "refuses the token" in done.stderr and "Traceback" not in done.stderr
    (work / "weights.bin").write_bytes(os.urandom(120 << 20))
    done = refusal(head.environ)
    assert done.returncode == 2 and "its largest files are weights.bin (120 MiB)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_submitted_job_has_prompts_and_run_in_a_store(head, work, store, tmp_path):
    client(store).create_bucket(Bucket=BUCKET)
    client(store).upload_file(str(work / "prompts.jsonl"), BUCKET, "prompts.jsonl")
    (work / "prompts.jsonl").unlink()
    more = ["--set", f"prompts.source=s3://{BUCKET}/prompts.jsonl"]
    done = subprocess.run(
        submission(head, "stored", work, f"s3://{BUCKET}/run", *more),
        env=head.environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stored = keys(store, BUCKET, "run/")
    assert {f"run/{stage}/manifest.json" for stage in ALL_STAGES} <= set(stored)
    assert {"run/report.html", "run/model/model.safetensors"} <= set(stored)
    body = client(store).get_object(Bucket=BUCKET, Key="run/prompts/manifest.json")["Body"].read()
    assert json.loads(body)["rows_out"] == 12
