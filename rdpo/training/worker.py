"""The training loop inside a Ray Train worker: where it left off, steps, checkpoints."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import ray
import torch
from ray.train.torch import get_device

from rdpo.config import Job
from rdpo.training.checkpoint import StepMetrics, last_checkpoint, restore_checkpoint, save_checkpoint
from rdpo.training.loop import NonFiniteStep, PairTable, Trainer, step_pairs
from rdpo.training.schedule import total_steps
from rdpo.training.watchdog import Watchdog


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        config: `job` (Job), `run_dir`, `cores`, and `sink`, the actor that hears of all that happens (see
            `rdpo.training.trainer.MetricsSink`).
    """
    job: Job = config["job"]
    if not job.training.gpus_per_worker:
        torch.set_num_threads(config["cores"])
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    data = PairTable.load(config["run_dir"])
    with last_checkpoint() as saved:
        trainer = Trainer(job, data, get_device(), saved is not None and saved.universal)
        history = restore_checkpoint(trainer.engine, saved)
    trainer.skipped = sum(int(step["skipped"]) for step in history)
    try:
        ended = _all_steps(trainer, history, config["sink"])
    except NonFiniteStep as error:
        # Ray Train would do it again from the last checkpoint, with the same end.
        if trainer.rank == 0:
            ray.get(config["sink"].give_up.remote(str(error)))
        return
    if ended:
        _measure(trainer, config)
    save_checkpoint(trainer.engine, history, policy=trainer.engine.module if ended else None)


def _all_steps(trainer: Trainer, history: list[StepMetrics], sink: Any) -> bool:
    """Take the steps that are left, with a checkpoint now and then; false if training was asked to stop before."""
    job, pairs = trainer.job, len(trainer.data)
    total, taken = total_steps(pairs, job), len(history)
    if trainer.rank == 0:
        ray.get(sink.begin.remote(job.training.hang_after_s, trainer.workers))
    stop = _tell(trainer, sink, history)
    with Watchdog(trainer.rank, job.training.hang_after_s, lambda beat: ray.get(sink.beat.remote(beat))) as watchdog:
        for index, batch in islice(enumerate(step_pairs(pairs, job)), taken, total):
            if stop:
                return False
            watchdog.steps = index
            history.append(trainer.step(index, total, batch))
            stop = _tell(trainer, sink, history[-1:])
            if (index + 1) % job.training.checkpoint_every == 0 and index + 1 < total and not stop:
                save_checkpoint(trainer.engine, history)
    return True


def _tell(trainer: Trainer, sink: Any, steps: list[StepMetrics]) -> bool:
    """Tell the driver of some steps; whether it wants training to stop. All workers hear the same answer."""
    told = trainer.rank == 0 and ray.get(sink.record.remote(steps))
    answer = torch.tensor([float(told)], device=trainer.device)
    torch.distributed.broadcast(answer, src=0)
    return bool(answer.item())


def _measure(trainer: Trainer, config: dict[str, Any]) -> None:
    """Measure the margins of held-out pairs, if there are any."""
    heldout = PairTable.load(config["run_dir"], heldout=True)
    if len(heldout):
        margins = trainer.margins(heldout)
        if trainer.rank == 0:
            ray.get(config["sink"].measure.remote(margins))
