"""Who hears of a run beside the person at the terminal: Ray's metrics, and trackers of experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.tracking.console import Console, Listener, Meter, log_dir
from rdpo.tracking.listeners.ray_metrics import RayMetrics

if TYPE_CHECKING:
    from rdpo.config.tracking import Tracker
    from rdpo.files.manifest import Manifest

PACKAGES = {"opentelemetry": ("opentelemetry.exporter.otlp.proto.http", "opentelemetry-exporter-otlp-proto-http")}
"""Of trackers whose name is not that of their module and package: both."""


def check_trackers(job: Job) -> None:
    """Check that the trackers a job names are installed.

    Raises:
        InputError: one of them is not.
    """
    for name in job.tracking.to:
        module, package = PACKAGES.get(name, (name, name))
        if not _is_installed(module):
            raise InputError(f"tracking.to: {name} is not installed; pip install {package}")


@contextmanager
def listening(job: Job, run_dir: str, console: Console) -> Iterator[None]:
    """Within this context the job's trackers and Ray's metrics hear what the console says.

    A tracker begins with the first stage that does something; one that cannot is left out with a warning.

    Raises:
        InputError: one of them is not installed.
    """
    check_trackers(job)
    before = list(console.listeners)
    console.listeners.append(RayMetrics(job.name))
    for name in job.tracking.to:
        console.listeners.append(_Later(name, partial(_maker(name), job, run_dir, log_dir(run_dir)), console.warn))
    try:
        yield
    finally:
        console.close_listeners(but=before)


class _Later(Listener):
    """A tracker that begins when it first hears something: a run in which all is done opens none."""

    def __init__(self, name: str, begin: Callable[[], Listener], warn: Callable[[str], None]):
        self.name, self.begin, self.warn = name, begin, warn
        self.tracker: Listener | None = None

    def progress(self, meter: Meter) -> None:
        self._begun().progress(meter)

    def step(self, metrics: Mapping[str, float]) -> None:
        self._begun().step(metrics)

    def made(self, manifest: Manifest) -> None:
        self._begun().made(manifest)

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()

    def _begun(self) -> Listener:
        if self.tracker is None:
            try:
                self.tracker = self.begin()
            except Exception as error:
                self.warn(f"tracking.to: {self.name} does not begin, the run goes on without it: {error}")
                # One that does nothing, so that the other is not tried again at every step.
                self.tracker = Listener()
        return self.tracker


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # Not even the package that it would be in.
        return False


def _maker(name: Tracker) -> Callable[[Job, str, Path], Listener]:
    if name == "tensorboard":
        from rdpo.tracking.listeners.tensorboard import TensorBoard

        return TensorBoard
    if name == "wandb":
        from rdpo.tracking.listeners.wandb import WandB

        return WandB
    if name == "trackio":
        from rdpo.tracking.listeners.trackio import Trackio

        return Trackio
    if name == "opentelemetry":
        from rdpo.tracking.listeners.opentelemetry import OpenTelemetry

        return OpenTelemetry
    from rdpo.tracking.listeners.mlflow import MLflow

    return MLflow
