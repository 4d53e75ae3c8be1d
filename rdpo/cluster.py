"""The Ray cluster of a run: a running one, or a local one started for it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rdpo.config import Concurrency, Job, largest, smallest
from rdpo.interruption import heed_sigterm

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

HEADROOM_CPUS = 2
MIN_STORE_BYTES = 100 << 20
FULL = 1.0
POOL_ACTOR = "MapWorker"
ENDS_WITHIN_S = 60.0
PAUSE_S = 0.5


def start_ray(job: Job) -> Any:
    """Connect to the cluster, or start a local one with its dashboard on loopback; the ray module."""
    import ray
    import ray.data

    if ray.is_initialized():
        return ray
    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        ray.init(address=address, log_to_driver=True)
    else:
        # By default Ray's workers, and the engines in them, give way to every other process of the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + HEADROOM_CPUS,
            object_store_memory=max(int(job.cluster.object_store_gib * (1 << 30)), MIN_STORE_BYTES),
            dashboard_host="127.0.0.1",
            log_to_driver=True,
        )
    # Ray's own handler would end this process without a word.
    heed_sigterm()
    ray.data.DataContext.get_current().enable_progress_bars = False
    adapt_pools()
    return ray


def adapt_pools() -> None:
    """Let pools grow as soon as all their places are taken.

    Ray's own threshold is above the share that an actor with one waiting task ever reaches.
    """
    from ray.data import DataContext

    DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = FULL


@contextmanager
def ray_stopped_after() -> Iterator[None]:
    """Leave Ray when the context ends, while its last words still go where the context sends them.

    A program that was connected before stays so.
    """
    connected = _connected()
    try:
        yield
    finally:
        if _connected() and not connected:
            sys.modules["ray"].shutdown()


def _connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def pools_ended(within_s: float = ENDS_WITHIN_S) -> bool:
    """Wait until no actor of this run's pools is left, so that what they held is free; whether that is so.

    A cluster without a dashboard does not say which actors it has; there nothing is waited for.
    """
    import ray
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    mine = [("job_id", "=", context.get_job_id()), ("state", "!=", "DEAD")]
    deadline = time.monotonic() + within_s
    while True:
        try:
            actors = list_actors(address=context.gcs_address, filters=mine)
        except (ConnectionError, RayStateApiException):
            return True
        if not any(actor.class_name.startswith(POOL_ACTOR) for actor in actors):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE_S)


def actor_pool(concurrency: Concurrency, at_once: int = 1) -> ActorPoolStrategy:
    """A pool of actors that grows while all its places are taken and shrinks when work runs out.

    Args:
        concurrency: number of actors, or the smallest and the largest.
        at_once: tasks that one actor works on at the same time.
    """
    from ray.data import ActorPoolStrategy

    sizes = {"min_size": smallest(concurrency), "max_size": largest(concurrency)}
    # One more task waits in each actor, so that an engine has no gap between two blocks.
    return ActorPoolStrategy(**sizes, max_tasks_in_flight_per_actor=at_once + 1)
