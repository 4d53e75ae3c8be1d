"""Where actors ran on a real cluster of three kinds of nodes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import whole_job, write_job, write_jsonl
from tests.support.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 1500
KINDS = ("spot", "small", "big")
# Ray of this process is that of the other tests.
WHERE = """
import json, sys
import ray
from ray._private.state import actors
ray.init(address=sys.argv[1], log_to_driver=False)
kinds = {node["NodeID"]: [kind for kind in sys.argv[2:] if kind in node["Resources"]] for node in ray.nodes()}
placed = [(actor["ActorClassName"], actor["Address"]["NodeID"]) for actor in actors().values()]
ran = [(name, kinds[node]) for name, node in placed if node in kinds]
print(json.dumps(ran))
"""
EXPECTED = {
    "Teacher": "spot",
    "Answerer": "spot",
    "Classifier": "small",
    "Reference": "big",
    "Divergence": "big",
    "RayTrainWorker": "big",
}


@pytest.fixture
def cluster():
    nodes = Nodes(*KINDS)
    yield nodes
    nodes.end()


def job_file(place, model, classifier, placement):
    rows = [{"prompt": f"question {i}", "split": "train" if i % 4 else "heldout"} for i in range(12)]
    write_jsonl(place / "prompts.jsonl", rows)
    table = whole_job(place / "prompts.jsonl", model, classifier)
    return write_job(place / "job.toml", {**table, "cluster": {"placement": placement}})


def run(job, nodes, run_dir):
    command = [sys.executable, "-m", "rdpo", "run", job, "--run-dir", str(run_dir), "--until", "evaluation"]
    placed = [*command, "--set", f"cluster.address={nodes.address}"]
    return subprocess.run(placed, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.timeout(2 * PATIENCE_S)
def test_every_actor_runs_on_the_nodes_of_its_kind(cluster, tmp_path, wordy_models, tiny_classifier):
    placement = {"teacher": "spot", "reward": "small", "trainer": "big"}
    done = run(job_file(tmp_path, wordy_models[0], tiny_classifier, placement), cluster, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-c", WHERE, cluster.address, *KINDS], capture_output=True, text=True, timeout=PATIENCE_S
    )
    ran = json.loads(done.stdout.splitlines()[-1])
    for actor, kind in EXPECTED.items():
        places = [kinds for name, kinds in ran if actor in name]
        assert places, f"{actor} did not run: {ran}"
        assert all(kinds == [kind] for kinds in places), f"{actor}: {places}"


def test_a_kind_that_no_node_declares_is_said_before_any_model_is_loaded(
    cluster, tmp_path, wordy_models, tiny_classifier
):
    done = run(job_file(tmp_path, wordy_models[0], tiny_classifier, {"trainer": "huge"}), cluster, tmp_path / "run")
    assert done.returncode == 2
    assert "no node declares huge" in done.stderr
    assert not (tmp_path / "run" / "synthesis").exists()


def test_a_node_with_another_version_is_said_before_any_model_is_loaded(
    cluster, tmp_path, wordy_models, tiny_classifier
):
    other = tmp_path / "other" / "peft-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    cluster.cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(other.parent)})
    done = run(job_file(tmp_path, wordy_models[0], tiny_classifier, {}), cluster, tmp_path / "run")
    assert done.returncode == 2
    assert "peft is 0.0.1 on node" in done.stderr
