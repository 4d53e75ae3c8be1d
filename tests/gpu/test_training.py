"""Training on one GPU over NCCL: every ZeRO stage has the CPU's losses; save, resume and export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def losses(job, run_dir, device, port):
    """Losses of all steps on a device, in a process of its own: DeepSpeed takes one device for life."""
    environment = {**os.environ, **ALONE, "MASTER_PORT": str(port)}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tests.support.gpu_steps", json.dumps(job), str(run_dir), device]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def job(tiny_model, tmp_path_factory):
    from tests.support.jobs import valid_job

    table = valid_job(tiny_model, tmp_path_factory.mktemp("gpu"))
    table["reference"]["max_length"] = 64
    table["training"] |= {"epochs": 2, "offset_coef": 0.7, "tokens_per_batch": 128}
    return table


@pytest.fixture(scope="module")
def run_dir(job, tmp_path_factory):
    """A run whose reference stage is done, with log-probs of the CPU."""
    import ray

    from tests.support.reference_stage import pair, referenced

    if not ray.is_initialized():
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    import random

    draw = random.Random(0)
    place = referenced(tmp_path_factory.mktemp("run"), job, [pair(draw, index) for index in range(27)])
    ray.shutdown()
    return place


@pytest.fixture(scope="module")
def on_the_cpu(job, run_dir):
    return losses({**job, "training": {**job["training"], "zero_stage": 0}}, run_dir, "cpu", 29551)


@pytest.mark.parametrize("stage", [1, 3])
def test_float32_on_the_gpu_has_the_losses_of_the_cpu(job, run_dir, on_the_cpu, stage):
    table = {**job, "training": {**job["training"], "zero_stage": stage, "gpus_per_worker": 1}}
    assert losses(table, run_dir, "cuda", 29552 + stage) == pytest.approx(on_the_cpu, abs=2e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_stays_near_them(job, run_dir, on_the_cpu, stage):
    table = {**job, "student": {**job["student"], "dtype": "bfloat16"}}
    table["training"] = {**job["training"], "zero_stage": stage, "gpus_per_worker": 1}
    assert losses(table, run_dir, "cuda", 29562 + stage) == pytest.approx(on_the_cpu, abs=0.15)
