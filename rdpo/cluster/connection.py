"""The Ray cluster of a run: a running one, or a local one started for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rdpo.cluster.interruption import heed_sigterm
from rdpo.cluster.pools import adapt_pools
from rdpo.config import Job

if TYPE_CHECKING:
    pass

HEADROOM_CPUS = 2
MIN_STORE_BYTES = 100 << 20


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
