"""What Ray's metrics endpoint says of a run, and that the dashboard and a real Prometheus find it there."""

import io
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from rdpo.files.manifest import Manifest
from rdpo.tracking.console import Console
from rdpo.tracking.listeners.ray_metrics import MEANINGS, RayMetrics
from rdpo.training.metrics import NAMES

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "observe" / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
PROMETHEUS = shutil.which("prometheus")
PATIENCE_S = 90


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def get(address):
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read().decode()


def awaited(found):
    """What `found` gives as soon as that is something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(1)
    return result


@pytest.fixture(scope="module")
def endpoint(ray_cluster):
    """The address of the metrics of a node on which a run is at work."""
    import ray

    console = Console(io.StringIO())
    console.listeners = [RayMetrics("mine")]
    with console.stage("synthesis", 20) as meter:
        meter.total = 20
        meter.advance(5, tokens=100)
    console.step({"step": 1, "loss": 0.625, "rewards/margins": 0.25, "mfu": 0.5, "grad_norm": 1.0})
    manifest = Manifest("synthesis", "key", {}, {}, seconds=2.0)
    manifest.dropped = {"too long": 3}
    console.made(manifest)
    assert console.listeners, console.stream.getvalue()
    (node,) = ray.nodes()
    yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def values(text):
    """The value of each of rdpo's metrics, by name and stage."""
    pattern = r'^ray_rdpo_(\w+)\{.*?run="mine".*?stage="(\w+)".*?\} (\S+)$'
    return {(name, stage): float(value) for name, stage, value in re.findall(pattern, text, re.MULTILINE)}


def test_the_endpoint_has_progress_and_training(endpoint):
    found = awaited(lambda: (seen := values(get(f"http://{endpoint}/metrics"))) and len(seen) >= 9 and seen)
    assert found["rows", "synthesis"] == 5
    assert found["rows_expected", "synthesis"] == 20
    assert found["tokens", "synthesis"] == 100
    assert found["dropped_rows", "synthesis"] == 3
    assert found["train_loss", "training"] == 0.625
    assert found["train_rewards_margins", "training"] == 0.25


def test_the_dashboard_asks_for_what_runs_tell():
    asked = {name for expr in EXPRESSIONS for name in re.findall(r"ray_rdpo_(\w+)", expr)}
    steps = {re.sub(r"\W", "_", f"train/{name}") for name in (*NAMES, "grad_norm", "mfu")}
    assert asked and not asked - steps - set(MEANINGS)


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus")
def test_prometheus_answers_every_question_of_the_dashboard(endpoint, tmp_path):
    nodes = tmp_path / "nodes.json"
    nodes.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [endpoint]}]))
    settings = (ROOT / "cluster" / "observe" / "prometheus.yaml").read_text(encoding="utf-8")
    settings = settings.replace("/tmp/ray/prom_metrics_service_discovery.json", str(nodes)).replace("10s", "1s")
    (tmp_path / "prometheus.yaml").write_text(settings)
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [
            *(PROMETHEUS, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"),
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    )

    def answer(expr):
        expr = expr.replace("$run", ".*")
        try:
            reply = json.loads(get(f"http://{address}/api/v1/query?query={urllib.parse.quote(expr)}"))
        except OSError:
            return None
        assert reply["status"] == "success", expr
        return reply["data"]["result"]

    try:
        loss = awaited(lambda: answer('ray_rdpo_train_loss{run=~"$run"}'))
        assert float(loss[0]["value"][1]) == 0.625
        answered = {expr for expr in EXPRESSIONS if answer(expr)}
        missing = {name for expr in set(EXPRESSIONS) - answered for name in re.findall(r"ray_rdpo_(\w+)", expr)}
        # Nothing was reported of these.
        assert missing <= {"train_rewards_accuracies", "train_logps_chosen", "train_logps_rejected", "rows"}
    finally:
        server.terminate()
        server.wait()
