"""Training beside a worker that freezes, and from checkpoints that are damaged."""

import os
import random
import signal

import psutil
import pytest

from rdpo.config import Job
from rdpo.files.stage_folder import StageFolder
from tests.support.jobs import valid_job
from tests.support.reference_stage import losses, pair, referenced

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def table(tiny_model, place):
    """A job of 8 steps on two workers, in fp32."""
    job = valid_job(tiny_model, place)
    job["reference"]["max_length"] = 64
    settings = {"num_workers": 2, "checkpoint_every": 2, "keep_checkpoints": 3, "zero_stage": 3}
    return {**job, "training": {**job["training"], **settings}}


@pytest.fixture(scope="module")
def run_dir(ray_cluster, place, table):
    draw = random.Random(1)
    return referenced(place, table, [{**pair(draw, index), "heldout": False} for index in range(32)])


def train(run_dir, table, name, on_step=lambda metrics: None, warnings=None, **training):
    from rdpo.training.trainer import train

    job = Job.model_validate({**table, "training": {**table["training"], **training}})
    folder = StageFolder(run_dir, name)
    if not folder.exists("in_progress.json"):
        folder.begin("k")
    return train(job, run_dir, folder, on_step, [].append if warnings is None else warnings.append)


@pytest.fixture(scope="module")
def undisturbed(run_dir, table):
    return losses(train(run_dir, table, "undisturbed"))


def interrupt_after(step):
    def on_step(metrics):
        if metrics["step"] == step:
            raise KeyboardInterrupt

    return on_step


def damage_newest(run_dir, name):
    """Change one byte of a file of the newest checkpoint; its folder."""
    newest = sorted(
        (StageFolder(run_dir, name).local("checkpoints") + "/" + one) for one in checkpoints(run_dir, name)
    )[-1]
    shard = next(path for path in sorted(os.listdir(f"{newest}/state")) if path.endswith("optim_states.pt"))
    with open(f"{newest}/state/{shard}", "r+b") as file:
        file.seek(os.path.getsize(file.name) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))
    return newest


def checkpoints(run_dir, name):
    place = StageFolder(run_dir, name).local("checkpoints")
    return [one for one in os.listdir(place) if os.path.isdir(f"{place}/{one}/state")]


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over(run_dir, table, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        train(run_dir, table, "damaged", interrupt_after(5))
    damage_newest(run_dir, "damaged")
    done = []
    resumed = train(run_dir, table, "damaged", lambda metrics: done.append(metrics["step"]))
    assert losses(resumed) == undisturbed
    assert min(done) <= 5 < max(done)


@pytest.mark.long
def test_a_frozen_worker_is_named_and_training_resumes(run_dir, table, undisturbed):
    frozen, warnings = [], []

    def freeze(metrics):
        if metrics["step"] == 3 and not frozen:
            workers = [one for one in psutil.Process().children(recursive=True) if is_train_worker(one)]
            frozen.append(workers[0].pid)
            os.kill(frozen[0], signal.SIGSTOP)

    resumed = train(run_dir, table, "frozen", freeze, warnings, hang_after_s=30)
    assert frozen
    assert "no optimizer step for" in warnings[0]
    assert "says nothing any more" in warnings[0]
    assert losses(resumed) == undisturbed
    assert not psutil.pid_exists(frozen[0]) or psutil.Process(frozen[0]).status() == psutil.STATUS_ZOMBIE


def is_train_worker(process):
    try:
        return process.cmdline()[0].startswith("ray::RayTrainWorker")
    except (psutil.Error, IndexError):
        return False
