"""How far a run has come, read from its files alone."""

import fcntl
import json
import threading
import time

import pyarrow as pa
import pytest
from filelock import FileLock

from rdpo.cli import main
from rdpo.config import Job, to_toml
from rdpo.errors import InputError
from rdpo.execution.lock import held, holder
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.training.loop import PairTable


def rows(count, **columns):
    return pa.table({"prompt_id": [f"{i:02}" for i in range(count)], **columns})


@pytest.fixture
def run_dir(job_table, tmp_path):
    """A run that was stopped in training: 4 of 10 steps are on file."""
    folder = tmp_path / "run"
    folder.mkdir()
    job_table["training"] |= {"batch_size": 2, "epochs": 2}
    (folder / "config.toml").write_text(to_toml(Job.model_validate(job_table)), encoding="utf-8")
    digests = {}
    for name, inputs in {
        "prompts": [],
        "synthesis": ["prompts"],
        "rewards": ["synthesis"],
        "pairs": ["rewards"],
        "reference": ["pairs"],
    }.items():
        stage = StageFolder(str(folder), name)
        dropped = ["too long"] + [None] * 11 if name == "pairs" else [None] * 12
        stage.write_parts(rows(12, heldout=[True, None] * 6, split=["train"] * 12, dropped=dropped), "prompt_id")
        made = Manifest(name, name, {}, {other: digests[other] for other in inputs}, seconds=3.0)
        digests[name] = stage.commit(made, "prompt_id").digest
    training = StageFolder(str(folder), "training")
    training.write_json("in_progress.json", {"key": "k", "attempt_id": "b", "began": time.time() - 60})
    steps = [{"step": i, "loss": 0.7 - i / 10, "rewards/margins": i / 2, "seconds": 5.0} for i in range(1, 5)]
    training.write_bytes("metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps).encode())
    return str(folder)


def status(capsys, run_dir):
    assert main(["status", run_dir, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    return status["driver"], {stage.pop("stage"): stage for stage in status["stages"]}


def test_a_run_that_nobody_works_in(run_dir, capsys):
    driver, stages = status(capsys, run_dir)
    assert driver is None
    states = [stage["state"] for stage in stages.values()]
    assert states == ["done", "not begun", "done", "done", "done", "done", "interrupted", *["not begun"] * 3]
    assert (stages["pairs"]["stored"], stages["pairs"]["dropped"]) == (12, 1)
    # Six of the pairs are trained on, two at a time, twice.
    assert (stages["training"]["stored"], stages["training"]["total"]) == (4, 6)
    assert stages["training"]["left_s"] is None


def test_a_run_at_work_says_how_long_training_will_take(run_dir, capsys):
    with FileLock(f"{run_dir}/.lock"):
        driver, stages = status(capsys, run_dir)
        assert main(["status", run_dir]) == 0
    assert driver == "an rdpo command"
    assert stages["training"]["state"] == "in progress"
    assert stages["training"]["left_s"] == pytest.approx(10.0)
    assert "4/6 steps  loss 0.3000  margin 2.000  10 s left  begun 6" in capsys.readouterr().out


def test_a_driver_may_begin_while_somebody_looks(run_dir):
    with held(run_dir):
        assert holder(run_dir) == "an rdpo command"
    with open(f"{run_dir}/.lock", "rb") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.1, look.close).start()
        with held(run_dir):
            assert look.closed
    assert holder(run_dir) is None


def test_rows_so_far_and_stages_whose_inputs_were_made_again(run_dir, capsys):
    synthesis = StageFolder(run_dir, "synthesis")
    synthesis.clear()
    synthesis.begin("another")
    synthesis.write_parts(rows(5, dropped=[None, "refused", None, None, None]), "prompt_id")
    _, stages = status(capsys, run_dir)
    assert stages["synthesis"]["state"] == "interrupted"
    assert [stages["synthesis"][name] for name in ("stored", "total", "dropped")] == [5, 12, 1]
    assert stages["rewards"]["state"] == "outdated"


def test_a_run_whose_pairs_all_fell_out_can_be_looked_at(run_dir, capsys):
    reference = StageFolder(run_dir, "reference")
    pairs = StageFolder(run_dir, "pairs").manifest().digest
    reference.clear()
    reference.write_parts(rows(12, dropped=["longer than reference.max_length"] * 12), "prompt_id")
    reference.commit(Manifest("reference", "reference", {}, {"pairs": pairs}), "prompt_id")
    stage = status(capsys, run_dir)[1]["reference"]
    assert (stage["stored"], stage["dropped"]) == (12, 12)
    with pytest.raises(InputError, match="no pair is left to train on; dropped 12: longer than"):
        PairTable.load(run_dir)


def test_no_run_is_one_message(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
