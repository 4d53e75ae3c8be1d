"""Ray Train wiring: workers, placement, failure and checkpoint policy, and the metrics on the driver."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rdpo.cluster.hardware import allocator_environment, worker_cores
from rdpo.cluster.pools import share_of
from rdpo.config import Job
from rdpo.files.stage_folder import METRICS, StageFolder
from rdpo.files.stores import absolute, arrow_file_system
from rdpo.modeling.weights import named_anywhere
from rdpo.records import ID_COLUMN
from rdpo.training.checkpoint import EXPORT, HELDOUT_MARGINS, ROW_LOSSES
from rdpo.training.fetching import parts_of
from rdpo.training.heldout import LOSS
from rdpo.training.loop import NonFiniteStep
from rdpo.training.metrics import StepMetrics
from rdpo.training.watchdog import Beat, Pulse
from rdpo.training.worker import train_worker

CHECKPOINTS = "checkpoints"
POLL_SECONDS = 0.5
WRITE_SECONDS = 10.0
GROUP_PATIENCE_S = 600
"""How much longer than the watchdog the process group waits for a worker."""


class MetricsSink:
    """An actor between the workers and the driver: it collects what the workers say until the driver takes it."""

    def __init__(self) -> None:
        self.pending: list[StepMetrics] = []
        self.warnings: dict[str, str] = {}
        self.given_up: str | None = None
        self.stopping = False
        self.pulse: Pulse | None = None

    def begin(self, hang_after_s: float, workers: int) -> None:
        """Training begins, or begins again: watch over its progress."""
        self.pulse = Pulse(hang_after_s, workers)

    def record(self, steps: list[StepMetrics]) -> bool:
        """Add steps; whether training is asked to stop after them."""
        self.pending.extend(steps)
        return self.stopping

    def beat(self, beat: Beat) -> str | None:
        """Hear a worker; what holds all of them up, if training hangs."""
        held_up = self.pulse.hear(beat, time.monotonic()) if self.pulse else None
        if held_up:
            self.warn("hang", held_up)
        return held_up

    def warn(self, topic: str, warning: str) -> None:
        """Keep what the person should hear, the last word on each topic."""
        self.warnings[topic] = warning

    def stop(self) -> None:
        """Ask training to stop after the present step."""
        self.stopping = True

    def give_up(self, reason: str) -> None:
        """Keep why training must not go on."""
        self.given_up = reason

    def reason(self) -> str | None:
        """Why training gave up, if it did."""
        return self.given_up

    def take(self) -> tuple[list[StepMetrics], list[str]]:
        """The steps since the last call, and the warnings."""
        taken = self.pending, list(self.warnings.values())
        self.pending, self.warnings = [], {}
        return taken


def train(
    job: Job,
    run_dir: str,
    folder: StageFolder,
    on_step: Callable[[StepMetrics], None],
    on_warning: Callable[[str], None] = lambda warning: None,
) -> list[StepMetrics]:
    """Train on the run's reference rows; leaves the policy in `training/policy`; metrics of all steps.

    Margins of pairs that were held out are left in `training/heldout.jsonl`.

    A run that was interrupted resumes from its last checkpoint in `training/checkpoints`.

    Raises:
        NonFiniteStep: a loss or gradient is not finite, once more than the job allows.
        KeyboardInterrupt: it was asked to stop (Ctrl-C, SIGTERM), and has left a checkpoint; a second request stops it
            at once.
    """
    history = _History(folder, on_step, on_warning)
    # Beside the driver: a node that is taken away must not take with it what the driver listens to.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    sink = ray.remote(num_cpus=0, scheduling_strategy=here)(MetricsSink).remote()
    result = _Fit(_torch_trainer(job, run_dir, folder, sink), history, sink).result()

    if reason := ray.get(sink.reason.remote()):
        history.write()
        raise NonFiniteStep(reason)
    if result.checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")

    leaving = _leaving(result, job)
    measured = [HELDOUT_MARGINS, *([ROW_LOSSES] if job.training.row_weights else [])]
    with parts_of(leaving.filesystem, leaving.path, (EXPORT, *measured)) as directory:
        folder.put(directory / EXPORT, EXPORT)
        for name in measured:
            folder.write_bytes(name, (directory / name).read_bytes())
    return history.write()


def _leaving(result: ray.train.Result, job: Job) -> ray.train.Checkpoint:
    """The checkpoint whose weights leave training."""
    if job.training.select == "last" or LOSS not in result.metrics:
        return result.checkpoint
    # The newer one of equals, as `best_step` takes it.
    return min(reversed(result.best_checkpoints), key=lambda kept: kept[1].get(LOSS, math.inf))[0]


def heldout_margins(folder: StageFolder) -> dict[str, float]:
    """The margins of held-out pairs by id, as training left them."""
    return {row[ID_COLUMN]: row["margin"] for row in folder.read_lines(HELDOUT_MARGINS)}


def row_losses(folder: StageFolder) -> dict[str, float]:
    """The losses of the rows by id, as a training with weights of rows left them."""
    return {row[ID_COLUMN]: row["loss"] for row in folder.read_lines(ROW_LOSSES)}


def _torch_trainer(job: Job, run_dir: str, folder: StageFolder, sink: ActorHandle) -> TorchTrainer:
    training = job.training

    # Ray Train's workers have a working directory of their own.
    named = {"model": named_anywhere(job.student.model)}
    if job.student.adapter:
        named["adapter"] = named_anywhere(job.student.adapter)
    student = job.student.model_copy(update=named)
    if training.row_weights:
        training = training.model_copy(update={"row_weights": absolute(training.row_weights)})
    job = job.model_copy(update={"student": student, "training": training})

    cores = worker_cores(training) if len(ray.nodes()) == 1 else training.cpus_per_worker or 1
    resources: dict[str, float] = {"CPU": cores, **(share_of(job.cluster.placement.trainer) or {})}
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker

    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "run_dir": run_dir, "sink": sink, "cores": cores},
        # The watchdog names who holds training up; the process group must not end it before, with a riddle.
        torch_config=TorchConfig(
            backend="nccl" if training.gpus_per_worker else "gloo",
            timeout_s=math.ceil(training.hang_after_s) + GROUP_PATIENCE_S,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=training.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            worker_runtime_env={"env_vars": allocator_environment()} if training.gpus_per_worker else None,
            storage_path=folder.root,
            storage_filesystem=None if folder.on_disk else arrow_file_system(folder.fs),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=training.keep_checkpoints,
                checkpoint_score_attribute=LOSS if training.select == "best" else None,
                checkpoint_score_order="min",
            ),
        ),
    )


class _History:
    """Metrics of all steps, on disk as they come; a step that is done again replaces its line."""

    def __init__(self, folder: StageFolder, on_step: Callable[[StepMetrics], None], on_warning: Callable[[str], None]):
        self.folder, self.on_step, self.on_warning = folder, on_step, on_warning
        self.steps = {int(metrics["step"]): metrics for metrics in folder.read_lines(METRICS)}
        self.written = time.monotonic()

    def take(self, sink: ActorHandle) -> None:
        """Keep what the sink has, and write it down now and then."""
        steps, warnings = ray.get(sink.take.remote())
        for metrics in steps:
            self.steps[int(metrics["step"])] = metrics
            self.on_step(metrics)
        for warning in warnings:
            self.on_warning(warning)
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


class _Fit:
    """Ray Train at work in a thread, while this one hears of the steps and of requests to stop.

    In the main thread Ray would end the process by itself when it is interrupted, without a checkpoint.
    """

    def __init__(self, trainer: TorchTrainer, history: _History, sink: ActorHandle):
        self.history, self.sink = history, sink
        self.future: Future[ray.train.Result] = Future()
        threading.Thread(target=self._run, args=(trainer,), daemon=True).start()

    def _run(self, trainer: TorchTrainer) -> None:
        try:
            self.future.set_result(trainer.fit())
        except BaseException as error:
            self.future.set_exception(error)

    def result(self) -> ray.train.Result:
        """What Ray Train returns, once it has ended."""
        try:
            self._follow()
        except KeyboardInterrupt as request:
            self.history.on_warning("stopping after the present step; interrupt again to stop at once")
            ray.get(self.sink.stop.remote())
            # It ends with a checkpoint of the step it is in, so there are metrics to come.
            self._follow()
            self.history.write()
            raise request
        return self.future.result()

    def _follow(self) -> None:
        while not self.future.done():
            wait([self.future], timeout=POLL_SECONDS)
            self.history.take(self.sink)
        self.history.take(self.sink)
