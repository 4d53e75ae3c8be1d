"""The training loop inside a Ray Train worker: where it left off, steps, checkpoints."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.train.torch import get_device

from rdpo.config import Job
from rdpo.tracking.trace import join, span
from rdpo.training.backend import backend_of
from rdpo.training.checkpoint import (
    HELDOUT_MARGINS,
    ROW_LOSSES,
    last_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from rdpo.training.heldout import HeldoutPairs, best_step, json_lines
from rdpo.training.loop import NonFiniteStep, PairTable, Trainer, step_pairs
from rdpo.training.metrics import StepMetrics
from rdpo.training.schedule import total_steps
from rdpo.training.watchdog import Watchdog


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        config: `job` (Job), `run_dir`, `cores`, and `sink`, the actor that hears of all that happens (see
            `rdpo.training.trainer.MetricsSink`).
    """
    job: Job = config["job"]
    join("training worker")
    if not job.training.gpus_per_worker:
        torch.set_num_threads(config["cores"])
        # By itself DeepSpeed goes by what the machine has, not by what Ray gave this worker.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    with span("pairs are read"):
        data, backend = PairTable.weighted(config["run_dir"], job), backend_of(job)
    with last_checkpoint(backend) as saved:
        with span("engine is built"):
            trainer = Trainer(job, data, get_device(), saved is not None and saved.converted, backend)
        history = restore_checkpoint(trainer.engine, saved)
    # The allowance is the whole run's, not one attempt's.
    trainer.skipped = sum(int(step["skipped"]) for step in history)

    heldout = HeldoutPairs(config["run_dir"])
    try:
        ended = _all_steps(trainer, history, heldout, config["sink"])
    except NonFiniteStep as error:
        # Ray Train would do it again from the last checkpoint, with the same end.
        if trainer.rank == 0:
            ray.get(config["sink"].give_up.remote(str(error)))
        return

    if ended and not heldout.margins:
        heldout.measure(trainer)
    _save(trainer, history, heldout, ended, last=True)


def _all_steps(trainer: Trainer, history: list[StepMetrics], heldout: HeldoutPairs, sink: ActorHandle) -> bool:
    """Take the steps that are left, with a checkpoint now and then; false if training was asked to stop before."""
    job, pairs = trainer.job, len(trainer.data)
    total, taken = total_steps(pairs, job), len(history)
    if trainer.rank == 0:
        ray.get(sink.begin.remote(job.training.hang_after_s, trainer.workers))
    stop, noticed = _tell(trainer, sink, history), False

    with Watchdog(trainer.rank, job.training.hang_after_s, lambda beat: ray.get(sink.beat.remote(beat))) as watchdog:
        for index, batch in islice(enumerate(step_pairs(pairs, job)), taken, total):
            if stop:
                return False
            watchdog.steps = index
            with span("step", step=index + 1, pairs=len(batch)):
                history.append(trainer.step(index, total, batch))

            notice = not noticed and _notice(trainer, sink, index + 1)
            noticed = noticed or notice
            due = notice or (index + 1) % job.training.checkpoint_every == 0
            if due or index + 1 == total:
                history[-1] |= heldout.measure(trainer)

            stop = _tell(trainer, sink, history[-1:])
            if due and index + 1 < total and not stop:
                _save(trainer, history, heldout, ended=False)
    return True


def _save(trainer: Trainer, history: list[StepMetrics], heldout: HeldoutPairs, ended: bool, last: bool = False) -> None:
    """Save a checkpoint, with the weights if they are to leave training as far as is known by now."""
    by_likelihood = trainer.job.training.select == "best" and heldout.pairs
    leaves = best_step(history) == len(history) if by_likelihood else ended
    with span("checkpoint"):
        save_checkpoint(trainer.engine, history, _measured(trainer, heldout) if leaves else None, last)


def _measured(trainer: Trainer, heldout: HeldoutPairs) -> dict[str, str]:
    """What is known of the present weights beside themselves, as texts by the names of their files."""
    files = {HELDOUT_MARGINS: heldout.lines()}
    if trainer.job.training.row_weights:
        files[ROW_LOSSES] = json_lines(trainer.row_losses())
    return files


def _notice(trainer: Trainer, sink: ActorHandle, step: int) -> bool:
    """Whether a node of this training is about to be taken away, as Ray heard from its cloud; says so."""
    preemption = ray.train.get_preemption_info()
    if preemption and trainer.rank == 0:
        ranks = ", ".join(map(str, preemption.preempted_ranks))
        warning = f"the node of rank {ranks} is about to be taken away; checkpoint after step {step}"
        ray.get(sink.warn.remote("notice", warning))
    return preemption is not None


def _tell(trainer: Trainer, sink: ActorHandle, steps: list[StepMetrics]) -> bool:
    """Tell the driver of some steps; whether it wants training to stop. All workers hear the same answer."""
    stop = trainer.rank == 0 and ray.get(sink.record.remote(steps))
    answer = torch.tensor([float(stop)], device=trainer.device)
    torch.distributed.broadcast(answer, src=0)
    return bool(answer.item())
