"""The Ray cluster of a run: a running one, or a local one started for it."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.cluster.interruption import heed_sigterm
from rdpo.cluster.pools import adapt_pools
from rdpo.config import Job
from rdpo.tracking.trace import gather, span

if TYPE_CHECKING:
    import psutil

HEADROOM_CPUS = 2
MIN_STORE_BYTES = 100 << 20
STARTS = 3
TOO_SLOW = "timed out during startup"
"""In Ray's message about processes that did not start in time."""
OWNER_ONLY, OTHERS = 0o600, 0o077


def start_ray(job: Job) -> Any:
    """Connect to the cluster, or start a local one with its dashboard on loopback; the ray module."""
    import ray
    import ray.data

    if not ray.is_initialized():
        with span("Ray starts"):
            _start(ray, job)
    gather()
    return ray


def _start(ray: Any, job: Job) -> None:
    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        ray.init(address=address, log_to_driver=True)
    else:
        keep_token_private()
        # By default Ray's workers, and the engines in them, give way to every other process of the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray looks for new files of logs ten times a second, which a small machine feels; once a second is enough.
        os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
        os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "1")
        # Ray Train looks at its workers every two seconds, and waits so long for their end; and one more process asks
        # whether a cloud takes a node away, which this machine is not.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        start_local(
            ray,
            num_cpus=(os.cpu_count() or 1) + HEADROOM_CPUS,
            object_store_memory=max(int(job.cluster.object_store_gib * (1 << 30)), MIN_STORE_BYTES),
            dashboard_host="127.0.0.1",
            log_to_driver=True,
        )
    # Ray's own handler would end this process without a word.
    heed_sigterm()
    # They would draw over the line of the console.
    ray.data.DataContext.get_current().enable_progress_bars = False
    adapt_pools()


def start_local(ray: Any, **options: Any) -> Any:
    """Start Ray on this machine, again if it was too slow; what `ray.init` returns.

    Ray gives its own processes thirty seconds to start. On a busy machine they need more the first time, and less the
    second time, when they are in the cache of the disk.

    Args:
        ray: the module.
        options: arguments of `ray.init`.
    """
    import psutil

    before, starts = set(psutil.Process().children()), 0
    while True:
        starts += 1
        try:
            return ray.init(address="local", **options)
        except Exception as error:
            # Ray has no class for it.
            if TOO_SLOW not in str(error) or starts == STARTS:
                raise
        # Else two of each would run, and the first ones until this process ends.
        for process in set(psutil.Process().children()) - before:
            _end_if_rays(process, str(Path(ray.__file__).parent))
        ray.shutdown()


def _end_if_rays(process: psutil.Process, package: str) -> None:
    """End a process, with those that it has started, if it was started from Ray's package."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        if any(package in part for part in process.cmdline()):
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


def keep_token_private() -> None:
    """Let nobody but its owner read the token with which Ray lets code run on its clusters.

    Ray writes one for whoever has none, into a file that all users of the machine can read, and its servers listen on
    all interfaces. A token that is there already stays the same, since a running cluster may rest on it.
    """
    if "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"

    # What cannot be written or read here, Ray itself says next.
    with suppress(OSError):
        if not path.exists() and not named:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_token(path)
        if path.stat().st_mode & OTHERS:
            path.chmod(OWNER_ONLY)


def _write_token(path: Path) -> None:
    """Write a new token, whole or not at all; another process may be quicker."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        with suppress(FileExistsError):
            # A link fails where the name is taken; a rename would replace the token of a process that was quicker.
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


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
