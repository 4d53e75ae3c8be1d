"""Faults x stages: whatever is killed, removed or full, the run ends with what an undisturbed one gives.

Each cell takes the stages before its own from a run that nothing disturbed, meets a real fault while its stage is at
work, and must complete: by itself, or with the same command once more.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rdpo.execution.reader import JOB_FILE, MARKER
from rdpo.files.stage_folder import METRICS, StageFolder
from tests.support.faults import FAULTS, PATIENCE_S, Victim
from tests.support.jobs import ALL_STAGES, whole_job, write_job, write_jsonl
from tests.support.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.long]

ROOT = Path(__file__).parents[2]
STAGES = ("synthesis", "rewards", "pairs", "reference", "training", "evaluation")
ROWS = 48
# What a worker or a node takes with it is made again by Ray; an engine that dies as it starts ends the run.
BY_ITSELF = ("worker kill -9", "node removed")
ENGINE_STAGES = ("synthesis", "evaluation")
SPARE_BYTES = {"synthesis": 24 << 10, "training": 200 << 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def job(place, wordy_models, tiny_classifier):
    write_jsonl(
        place / "prompts.jsonl",
        [{"prompt": f"question {i}", "split": "train" if i % 4 else "heldout"} for i in range(ROWS)],
    )
    table = whole_job(place / "prompts.jsonl", wordy_models[0], tiny_classifier)
    table["training"] |= {"cpus_per_worker": 1, "epochs": 2}
    return write_job(place / "job.toml", table)


def start(job, run_dir, stage, log, *more):
    command = [sys.executable, "-m", "rdpo", "run", job, "--run-dir", str(run_dir), "--until", stage, *more]
    with open(log, "ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


def complete(job, run_dir, stage, log, *more):
    """Run to the end of the stage; what the run said."""
    assert start(job, run_dir, stage, log, *more).wait(PATIENCE_S) == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def whole(job, place):
    """The run that nothing disturbs."""
    complete(job, place / "whole", "evaluation", place / "whole.log")
    return place / "whole"


def begun(whole, run_dir, stage):
    """A run directory in which all stages before this one are done."""
    run_dir.mkdir()
    for file in (MARKER, JOB_FILE):
        shutil.copy(whole / file, run_dir / file)
    for earlier in ALL_STAGES[: ALL_STAGES.index(stage)]:
        shutil.copytree(whole / earlier, run_dir / earlier)
    return run_dir


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", [name for name, act in FAULTS.items() if act])
def test_a_fault_in_a_stage_loses_nothing(fault, stage, job, whole, tmp_path, survived):
    if fault == "engine kill -9" and stage not in ENGINE_STAGES:
        pytest.skip("no engine at work")
    run_dir, log = begun(whole, tmp_path / "run", stage), tmp_path / "log"
    nodes = Nodes() if fault == "node removed" else None
    try:
        placed = ["--set", f"cluster.address={nodes.address}"] if nodes else []
        victim = Victim(start(job, run_dir, stage, log, *placed), run_dir, stage, nodes)
        FAULTS[fault](victim)
        code = victim.driver.wait(PATIENCE_S)
        assert StageFolder(str(run_dir), stage).manifest() if code == 0 else True
        assert "Traceback" not in log.read_text()
        if fault in BY_ITSELF:
            assert code == 0, log.read_text()
        elif code:
            complete(job, run_dir, stage, log, *placed)
    finally:
        if nodes:
            nodes.end()
    same(run_dir, whole, stage)
    survived(fault, stage, "by itself" if code == 0 else "same command")


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_loses_nothing(stage, job, whole, tmp_path, survived):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run_dir, log = begun(whole, disk / "run", stage), tmp_path / "log"
        used = shutil.disk_usage(disk).used
        subprocess.run(["mount", "-o", f"remount,size={used + SPARE_BYTES.get(stage, 12 << 10)}", disk], check=True)
        assert start(job, run_dir, stage, log).wait(PATIENCE_S) == 1, log.read_text()
        assert "No space left on device" in log.read_text()
        assert "Traceback" not in log.read_text()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        complete(job, run_dir, stage, log)
        same(run_dir, whole, stage)
    finally:
        subprocess.run(["umount", disk])
    survived("disk full", stage, "same command")


def test_training_resumes_with_the_workers_that_are_left(job, whole, tmp_path):
    """One worker fits on each of two nodes; one node goes, and none comes in its place."""
    run_dir, log, nodes = begun(whole, tmp_path / "run", "training"), tmp_path / "log", Nodes()
    elastic = ["training.num_workers=[1, 2]", "training.cpus_per_worker=4", f"cluster.address={nodes.address}"]
    try:
        placed = [part for setting in elastic for part in ("--set", setting)]
        victim = Victim(start(job, run_dir, "training", log, *placed), run_dir, "training", nodes)
        FAULTS["node removed"](victim)
        assert victim.driver.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        nodes.end()
    same(run_dir, whole, "training")


def test_a_node_that_will_be_taken_away_leaves_a_checkpoint(job, whole, tmp_path):
    """No other checkpoint is due before the end of a long training."""
    run_dir, log, nodes = begun(whole, tmp_path / "run", "training"), tmp_path / "log", Nodes()
    settings = ["num_workers=[1, 2]", "cpus_per_worker=4", "checkpoint_every=10000", "epochs=60"]
    try:
        placed = [part for setting in settings for part in ("--set", f"training.{setting}")]
        placed += ["--set", f"cluster.address={nodes.address}"]
        victim = Victim(start(job, run_dir, "training", log, *placed), run_dir, "training", nodes)
        victim.wait_until(lambda: victim.workers() and losses(run_dir))
        nodes.announce(victim.workers()[0])
        snapshot = victim.folder / "checkpoints" / "checkpoint_manager_snapshot.json"
        victim.wait_until(lambda: snapshot.exists() and '"checkpoint_2' in snapshot.read_text())
        first = StageFolder(str(run_dir), "training").read_lines(METRICS)[0]
        nodes.remove(victim.workers()[0])
        assert victim.driver.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        nodes.end()
    assert "is about to be taken away; checkpoint after step" in log.read_text()
    steps = StageFolder(str(run_dir), "training").read_lines(METRICS)
    assert len(steps) == 60 * len(losses(whole)) / 2
    # With the seconds it took: a step that was made again would have others.
    assert steps[0] == first


def same(run_dir, whole, stage):
    """The stage is as in the undisturbed run: ids and texts to the letter, numbers but for a batch's padding."""
    if stage == "training":
        assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-4)
        return
    exact, numbers = rows(run_dir, stage)
    expected, expected_numbers = rows(whole, stage)
    assert [row["prompt_id"] for row in exact] == [row["prompt_id"] for row in expected]
    if stage != "evaluation":
        assert exact == expected
        assert numbers == pytest.approx(expected_numbers, abs=1e-4)


def rows(run_dir, stage):
    table = StageFolder(str(run_dir), stage).table().sort_by("prompt_id").to_pylist()
    numbers = [value for row in table for value in row.values() if isinstance(value, float)]
    kept = [
        {name: value for name, value in row.items() if not isinstance(value, float | dict) and "cached" not in name}
        for row in table
    ]
    return kept, numbers


def losses(run_dir):
    return [step["loss"] for step in StageFolder(str(run_dir), "training").read_lines(METRICS)]
