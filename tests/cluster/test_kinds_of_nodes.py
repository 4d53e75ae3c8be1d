"""Teachers on their nodes, training across two others, and a teacher's node that goes while it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from rdpo.files.stage_folder import StageFolder
from tests.support.faults import PATIENCE_S, Victim
from tests.support.jobs import ALL_STAGES, whole_job, write_job, write_jsonl
from tests.support.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
ROWS = 240
"""Enough that a look at all processes, which takes its time beside so many of them, comes before the stage's end."""


@pytest.fixture
def nodes():
    """A head that runs nothing, two nodes for teachers and two for training, of 6 CPUs each."""
    four = Nodes("teacher", "teacher", "trainer", "trainer")
    yield four
    four.end()


def test_a_teachers_node_goes_and_nothing_is_lost(nodes, tmp_path, wordy_models, tiny_classifier):
    rows = [{"prompt": f"question {i}", "split": "train" if i % 8 else "heldout"} for i in range(ROWS)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    table = whole_job(tmp_path / "prompts.jsonl", wordy_models[0], tiny_classifier)
    table["cluster"] = {"placement": {"teacher": "teacher", "trainer": "trainer"}, "address": nodes.address}
    # Tiny answers are written within a second or two of the engines' start.
    table["synthesis"]["sampling"]["max_tokens"] = 48
    # Two do not fit on one node.
    table["training"] |= {"num_workers": 2, "cpus_per_worker": 4, "epochs": 2}
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "rdpo", "run", write_job(tmp_path / "job.toml", table), "--run-dir", str(run_dir)]
    with open(log, "wb") as output:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    victim = Victim(driver, run_dir, "synthesis", nodes)
    engines = []

    def engines_write():
        assert not (victim.folder / "manifest.json").exists(), "the stage ended before the fault"
        engines[:] = victim.engines() if list(victim.folder.glob("part-*")) else []
        return engines

    victim.wait_until(engines_write)
    stored = StageFolder(str(run_dir), "synthesis").count()
    nodes.remove(engines[-1])
    trainers = Victim(driver, run_dir, "training", nodes)
    working = []

    def two_train():
        working[:] = trainers.workers()
        return trainers.at_work() and len(working) == 2

    trainers.wait_until(two_train)
    assert len({id(nodes.of(worker)) for worker in working}) == 2
    assert driver.wait(PATIENCE_S) == 0, log.read_text()
    assert all(StageFolder(str(run_dir), stage).manifest() for stage in ALL_STAGES)
    synthesis, prompts = (StageFolder(str(run_dir), stage) for stage in ("synthesis", "prompts"))
    wanted = {row["prompt_id"] for row in prompts.table().to_pylist() if row["split"] == "train"}
    made = [row["prompt_id"] for row in synthesis.table().to_pylist()]
    gone = [row["prompt_id"] for row in synthesis.table("dropped").to_pylist()]
    assert 0 < stored < len(wanted)
    assert sorted(made + gone) == sorted(wanted)
