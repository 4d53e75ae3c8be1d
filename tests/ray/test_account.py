"""A server whose account ends in the middle of a run: what it answered is stored, and is not asked for again."""

import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.files.stage_folder import StageFolder
from rdpo.stages.table import stages_of
from rdpo.tracking.console import Console
from tests.support.chat_server import completion
from tests.support.jobs import write_job, write_jsonl

pytestmark = pytest.mark.ray

ROWS = 42
ROOT = Path(__file__).parents[2]


class Account:
    """How many requests a server answers before it refuses all with `status`; which it has answered."""

    def __init__(self, answers, status):
        self.left, self.status = answers, status
        self.answered, self.refused = Counter(), 0
        self.lock = threading.Lock()

    def reply(self, question):
        with self.lock:
            if not self.left:
                self.refused += 1
                return self.status, {"error": {"message": "the account has ended", "code": "insufficient_quota"}}
            self.left -= 1
            self.answered[question] += 1
            return 200, completion(f"answer {sum(self.answered.values())}")


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status, reply = self.server.account.reply(body["messages"][-1]["content"])
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def table(job_table, server, tmp_path):
    """A job with a teacher of three turns behind the server."""
    questions = [{"prompt": f"question {index}", "split": "train"} for index in range(ROWS)]
    write_jsonl(tmp_path / "prompts.jsonl", [*questions, {"prompt": "held out", "split": "heldout"}])
    url = f"http://127.0.0.1:{server.server_port}/v1"
    endpoint = {"url": url, "model": "m", "concurrency": 4, "pause_s": 0.01}
    job_table["synthesis"] = {"task": "roleplay", "endpoint": endpoint, "engine": {"batch_rows": 16}}
    return job_table


def run_until_synthesis(table, folder):
    job = Job.model_validate(table)
    stages = [stage for stage in stages_of(job) if stage.name in ("prompts", "synthesis")]
    run_stages(Run(job, str(folder), Console(io.StringIO()), lambda *_: False), stages)


@pytest.mark.parametrize("status", [402, 429])
def test_answers_are_stored_before_the_end_of_the_account_ends_the_run(ray_cluster, server, table, tmp_path, status):
    (tmp_path / "two.toml").write_text('name = "two"\n[[turns]]\nname = "response"\nsamples = 2\n')
    table["synthesis"]["task"] = str(tmp_path / "two.toml")
    account = server.account = Account(47, status)
    with pytest.raises(InputError, match="the account has ended"):
        run_until_synthesis(table, tmp_path / "run")
    stored = StageFolder(str(tmp_path / "run"), "synthesis")
    whole = [question for question, count in account.answered.items() if count == 2]
    questions = [prompt[0]["content"] for prompt in stored.table()["prompt"].to_pylist()]
    assert sorted(questions) == sorted(whole) and len(whole) >= 20
    assert (stored.count("dropped"), stored.manifest()) == (0, None)
    assert account.refused <= 5

    account.left = 2 * ROWS
    run_until_synthesis(table, tmp_path / "run")
    assert stored.manifest().rows_out == ROWS
    assert {account.answered[question] for question in whole} == {2}


@pytest.mark.long
def test_the_same_command_does_all_rows_once_the_server_answers(server, table, tmp_path):
    account = server.account = Account(0, 400)
    job = write_job(tmp_path / "job.toml", table)
    command = [sys.executable, "-m", "rdpo", "run", job, "--run-dir", str(tmp_path / "run"), "--until", "synthesis"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ended.returncode == 2, ended.stderr
    assert "refuses every request" in ended.stderr and "the account has ended" in ended.stderr
    assert account.refused <= 4

    account.left = 10 * ROWS
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert StageFolder(str(tmp_path / "run"), "synthesis").manifest().rows_out == ROWS
