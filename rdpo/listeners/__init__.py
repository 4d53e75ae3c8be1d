"""Who hears of a run beside the person at the terminal: Ray's metrics, and trackers of experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.listeners.ray_metrics import RayMetrics
from rdpo.tracking import Console, Listener, log_dir

if TYPE_CHECKING:
    from rdpo.config.tracking import Tracker


def check_trackers(job: Job) -> None:
    """Check that the trackers a job names are installed.

    Raises:
        InputError: one of them is not.
    """
    for name in job.tracking.to:
        if find_spec(name) is None:
            raise InputError(f"tracking.to: {name} is not installed; pip install {name}")


@contextmanager
def listening(job: Job, run_dir: str, console: Console) -> Iterator[None]:
    """Within this context the job's trackers and Ray's metrics hear what the console is told.

    A tracker that cannot begin is left out with a warning.

    Raises:
        InputError: one of them is not installed.
    """
    check_trackers(job)
    before = list(console.listeners)
    console.listeners.append(RayMetrics(job.name))
    for name in job.tracking.to:
        try:
            console.listeners.append(_maker(name)(job, run_dir, log_dir(run_dir)))
        except Exception as error:
            console.warn(f"tracking.to: {name} does not begin, the run goes on without it: {error}")
    try:
        yield
    finally:
        console.close_listeners(but=before)


def _maker(name: Tracker) -> Callable[[Job, str, Path], Listener]:
    if name == "tensorboard":
        from rdpo.listeners.tensorboard import TensorBoard

        return TensorBoard
    if name == "wandb":
        from rdpo.listeners.wandb import WandB

        return WandB
    from rdpo.listeners.mlflow import MLflow

    return MLflow
