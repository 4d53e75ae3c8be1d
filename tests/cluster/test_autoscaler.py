"""A real autoscaler: teacher nodes come from zero, do the work, and go again."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdpo.files.stage_folder import StageFolder
from tests.support.head import Head, free_ports
from tests.support.jobs import ALL_STAGES, whole_job, write_job, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 900
GONE_WITHIN_S = 120
HEAD_ID = "f" * 51 + "00000"
# Written down by a process of its own: Ray of this one is that of other tests.
COUNT = """
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
while True:
    teachers = [node for node in ray.nodes() if node["Alive"] and "teacher" in node["Resources"]]
    print(len(teachers), flush=True)
    time.sleep(1)
"""


def autoscaling(gcs_address):
    """What the autoscaler may start: up to two teacher nodes, each a Ray node of its own on this machine."""
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.2,
        "provider": {
            # Its own name asks for a file that Ray's wheels lack.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 6, "trainer": 1}, "node_config": {}, "max_workers": 0},
            "teacher": {
                "resources": {"CPU": 4, "teacher": 1, "object_store_memory": 120 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in lists},
    }


@pytest.fixture
def head(tmp_path):
    # The nodes that come must find the head, whose port is chosen after the file is written.
    (port,) = free_ports(1)
    config = tmp_path / "autoscaling.json"
    config.write_text(json.dumps(autoscaling(f"127.0.0.1:{port}")))
    one = Head(
        tmp_path,
        *("--num-cpus=6", '--resources={"trainer": 1}', f"--autoscaling-config={config}", f"--port={port}"),
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=HEAD_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
        RAY_NODE_TYPE_NAME="ray.head.default",
    )
    one.port = port
    yield one
    one.end()


@pytest.fixture
def counts(head, tmp_path):
    """How many teacher nodes there were, second by second so far."""
    counts = tmp_path / "counts"
    with open(counts, "w") as out:
        process = subprocess.Popen([sys.executable, "-c", COUNT, head.address], env=head.environ, stdout=out)
    # Ray tells of what it meets between the lines.
    yield lambda: [int(line) for line in counts.read_text().split() if line.isdigit()]
    process.terminate()
    process.wait()


def test_teachers_come_from_zero_do_the_work_and_go(head, counts, tmp_path, wordy_models, tiny_classifier):
    rows = [{"prompt": f"question {i}", "split": "train" if i % 4 else "heldout"} for i in range(12)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    table = whole_job(tmp_path / "prompts.jsonl", wordy_models[0], tiny_classifier)
    table["cluster"] = {"placement": {"teacher": "teacher", "trainer": "trainer"}, "address": head.address}
    deadline = time.monotonic() + GONE_WITHIN_S
    while not counts():
        assert time.monotonic() < deadline, head.log.read_text()
        time.sleep(0.5)
    command = [sys.executable, "-m", "rdpo", "run", write_job(tmp_path / "job.toml", table)]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        env=head.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(StageFolder(str(tmp_path / "run"), stage).manifest() for stage in ALL_STAGES)
    deadline = time.monotonic() + GONE_WITHIN_S
    while counts()[-1]:
        assert time.monotonic() < deadline, counts()
        time.sleep(1)
    assert counts()[0] == 0
    assert 1 <= max(counts()) <= 2
