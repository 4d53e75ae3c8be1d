"""Ray Train wiring: workers, placement, failure and checkpoint policy, and the metrics on the driver."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from rdpo.config import Job
from rdpo.policy.hardware import worker_cores
from rdpo.storage import StageFolder
from rdpo.stores import arrow_file_system
from rdpo.training.checkpoint import EXPORT
from rdpo.training.loop import NonFiniteStep
from rdpo.training.worker import train_worker

METRICS = "metrics.jsonl"
HELDOUT_MARGINS = "heldout.jsonl"
CHECKPOINTS = "checkpoints"
POLL_SECONDS = 0.5
WRITE_SECONDS = 10.0

StepMetrics = dict[str, float]


class MetricsSink:
    """An actor that collects each step's metrics from rank 0 until the driver takes them."""

    def __init__(self) -> None:
        self.pending: list[StepMetrics] = []
        self.given_up: str | None = None
        self.margins: list[Any] = []

    def record(self, steps: list[StepMetrics]) -> None:
        """Add steps."""
        self.pending.extend(steps)

    def measure(self, margins: list[Any]) -> None:
        """Keep the margins of held-out pairs."""
        self.margins = margins

    def measured(self) -> list[Any]:
        """The margins of held-out pairs, if there are any."""
        return self.margins

    def give_up(self, reason: str) -> None:
        """Keep why training must not go on."""
        self.given_up = reason

    def reason(self) -> str | None:
        """Why training gave up, if it did."""
        return self.given_up

    def take(self) -> list[StepMetrics]:
        """The steps since the last call."""
        taken, self.pending = self.pending, []
        return taken


def train(job: Job, run_dir: str, folder: StageFolder, on_step: Callable[[StepMetrics], None]) -> list[StepMetrics]:
    """Train on the run's reference rows; leaves the policy in `training/policy`; metrics of all steps.

    Margins of pairs that were held out are left in `training/heldout.jsonl`.

    A run that was interrupted goes on from its last checkpoint in `training/checkpoints`.

    Raises:
        NonFiniteStep: a loss or gradient is not finite, once more than the job allows.
    """
    history = _History(folder, on_step)
    sink = ray.remote(num_cpus=0)(MetricsSink).remote()
    trainer = _torch_trainer(job, run_dir, folder, sink)
    with history.following(sink):
        result = trainer.fit()
    if reason := ray.get(sink.reason.remote()):
        history.write()
        raise NonFiniteStep(reason)
    if result.checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    if margins := ray.get(sink.measured.remote()):
        folder.write_bytes(HELDOUT_MARGINS, "".join(json.dumps(margin) + "\n" for margin in margins).encode())
    with result.checkpoint.as_directory() as directory:
        folder.put(Path(directory) / EXPORT, EXPORT)
    return history.write()


def heldout_margins(folder: StageFolder) -> dict[str, float]:
    """The margins of held-out pairs by id, as training left them."""
    content = folder.read_bytes(HELDOUT_MARGINS).decode() if folder.exists(HELDOUT_MARGINS) else ""
    return {row["prompt_id"]: row["margin"] for row in map(json.loads, content.splitlines())}


def _torch_trainer(job: Job, run_dir: str, folder: StageFolder, sink: Any) -> TorchTrainer:
    training = job.training
    cores = worker_cores(training) if len(ray.nodes()) == 1 else training.cpus_per_worker or 1
    resources: dict[str, float] = {"CPU": cores}
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "run_dir": run_dir, "sink": sink, "cores": cores},
        torch_config=TorchConfig(backend="nccl" if training.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=training.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=folder.root,
            storage_filesystem=None if folder.on_disk else arrow_file_system(folder.fs),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=training.keep_checkpoints),
        ),
    )


class _History:
    """Metrics of all steps, on disk as they come; a step that is done again replaces its line."""

    def __init__(self, folder: StageFolder, on_step: Callable[[StepMetrics], None]):
        self.folder, self.on_step = folder, on_step
        stored = folder.read_bytes(METRICS).decode().splitlines() if folder.exists(METRICS) else []
        self.steps = {int(metrics["step"]): metrics for metrics in map(json.loads, stored)}
        self.written = time.monotonic()

    def following(self, sink: Any) -> _Follower:
        """Take the metrics from the sink while the context lasts."""
        return _Follower(self, sink)

    def take(self, sink: Any) -> None:
        """Keep what the sink has, and write it down now and then."""
        for metrics in ray.get(sink.take.remote()):
            self.steps[int(metrics["step"])] = metrics
            self.on_step(metrics)
        if time.monotonic() - self.written > WRITE_SECONDS:
            self.write()

    def write(self) -> list[StepMetrics]:
        """Write all steps in order; they are the return value."""
        ordered = [self.steps[step] for step in sorted(self.steps)]
        self.folder.write_bytes(METRICS, "".join(json.dumps(_finite(step)) + "\n" for step in ordered).encode())
        self.written = time.monotonic()
        return ordered


def _finite(metrics: StepMetrics) -> dict[str, float | None]:
    """Metrics with null for what is not a number, which JSON does not know."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


class _Follower:
    def __init__(self, history: _History, sink: Any):
        self.history, self.sink = history, sink
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self.history.take(self.sink)

    def _run(self) -> None:
        while not self.stop.wait(POLL_SECONDS):
            self.history.take(self.sink)
