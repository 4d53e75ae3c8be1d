"""A model and pairs put on a hub: a server on this machine that speaks as much of the hub's protocol as that takes."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from tests.support.made_up import made_up_run

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


class Hub(BaseHTTPRequestHandler):
    """Makes repositories, and takes commits of small files."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path.endswith("/repos/create"):
            self.server.made.append(json.loads(body))
            kind = "datasets/" if self.server.made[-1].get("type") == "dataset" else ""
            self._answer(200, {"url": f"{self.server.address}/{kind}me/mine"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                200,
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]},
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = {"commitUrl": f"{self.server.address}/me/mine/commit/1", "commitOid": "1"}
            self._answer(200, {**commit, "success": True})
        else:
            self._answer(200, {"warnings": [], "errors": []})

    def _answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.made, server.files = [], [], {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def run_dir(job_table, tmp_path):
    run_dir = made_up_run(tmp_path / "run", job_table)
    model = StageFolder(run_dir, "model")
    model.begin("key")
    model.write_bytes("config.json", b"{}")
    model.write_bytes("README.md", b"---\ntags: []\n---\n# A model\n")
    model.commit(Manifest("model", "key", {"training.beta": 0.1}, {}))
    return run_dir


def push(hub, *arguments, **environment):
    variables = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, **environment}
    command = [sys.executable, "-m", "rdpo", "push", *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)


def is_private(made):
    """As the client's versions say it."""
    return made.get("visibility") == "private" or made.get("private") is True


def test_a_model_is_pushed_to_a_private_repository_without_the_runs_own_files(hub, run_dir):
    done = push(hub, run_dir, "model", "me/mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/mine/commit/1"
    assert [(made["name"], made["organization"], is_private(made)) for made in hub.made] == [("mine", "me", True)]
    assert hub.files.keys() == {"config.json", "README.md"}


def test_pairs_are_pushed_as_a_data_set_with_its_card(hub, run_dir):
    done = push(hub, run_dir, "pairs", "me/mine", "--public")
    assert done.returncode == 0, done.stderr
    assert (hub.made[0]["type"], is_private(hub.made[0])) == ("dataset", False)
    assert hub.files.keys() == {"README.md", "data/train.parquet", "data/test.parquet"}
    assert hub.files["data/train.parquet"][:4] == b"PAR1"


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["model", "me/mine"], {"HF_TOKEN": "hf_wrong"}, "set HF_TOKEN to a token that may write"),
        (["model", "a/b/c"], {}, "no name of a repository"),
        (["model", "me/mine"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (["model", "me/mine"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_what_stands_in_the_way_is_one_line(hub, run_dir, arguments, environment, says):
    done = push(hub, run_dir, *arguments, **environment)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1
    assert "hf_" not in done.stderr + done.stdout and not hub.files
