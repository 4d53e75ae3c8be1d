"""The Ray cluster of a run: a running one, or a local one started for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rdpo.config import ClassifierReward, ImplicitReward, Job, JudgeReward
from rdpo.errors import InputError

HEADROOM_CPUS = 2
MIN_STORE_BYTES = 100 << 20


def start_ray(job: Job) -> Any:
    """Connect to the cluster, or start a local one with its dashboard on loopback; the ray module."""
    import ray
    import ray.data

    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        ray.init(address=address, log_to_driver=True)
    else:
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + HEADROOM_CPUS,
            object_store_memory=max(int(job.cluster.object_store_gib * (1 << 30)), MIN_STORE_BYTES),
            dashboard_host="127.0.0.1",
            log_to_driver=True,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray


@contextmanager
def ray_stopped_after() -> Iterator[None]:
    """Leave Ray when the context ends, while its last words still go where the context sends them."""
    try:
        yield
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def check_devices(job: Job, ray: Any) -> None:
    """Compare the GPUs the job asks for with those the cluster has.

    Raises:
        InputError: a stage asks for more.
    """
    wanted = {
        "synthesis.engine.gpus": job.synthesis.engine.gpus,
        "evaluation.engine.gpus": job.evaluation.engine.gpus,
        "reference.gpus": job.reference.gpus,
        "training": job.training.num_workers * job.training.gpus_per_worker,
    }
    for reward in job.rewards:
        if isinstance(reward, JudgeReward):
            wanted[f"rewards.{reward.name}.engine.gpus"] = reward.engine.gpus
        elif isinstance(reward, ClassifierReward | ImplicitReward):
            wanted[f"rewards.{reward.name}.gpus"] = reward.gpus
    available = ray.cluster_resources().get("GPU", 0)
    for name, count in wanted.items():
        if count > available:
            raise InputError(f"{name} asks for {count} GPU(s), but the cluster has {available:g}; set it to 0")
