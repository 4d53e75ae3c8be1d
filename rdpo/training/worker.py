"""The training loop inside a Ray Train worker: where it left off, steps, checkpoints."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import ray
import torch
from ray.train.torch import get_device

from rdpo.config import Job
from rdpo.training.checkpoint import restore_checkpoint, save_checkpoint
from rdpo.training.loop import NonFiniteStep, PairTable, Trainer, step_pairs, total_steps


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        config: `job` (Job), `run_dir`, `cores`, and `sink`, an actor whose `record` takes steps' metrics, whose
            `measure` takes the margins of held-out pairs, and whose `give_up` takes the reason why training must not go
            on.
    """
    job: Job = config["job"]
    if not job.training.gpus_per_worker:
        torch.set_num_threads(config["cores"])
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    data = PairTable.load(config["run_dir"])
    trainer = Trainer(job, data, get_device())
    history, total = restore_checkpoint(trainer.engine), total_steps(len(data), job)
    trainer.skipped = sum(int(step["skipped"]) for step in history)
    if trainer.rank == 0:
        ray.get(config["sink"].record.remote(history))
    for index, pairs in islice(enumerate(step_pairs(len(data), job)), len(history), total):
        try:
            history.append(trainer.step(index, total, pairs))
        except NonFiniteStep as error:
            # Ray Train would do it again from the last checkpoint, with the same end.
            if trainer.rank == 0:
                ray.get(config["sink"].give_up.remote(str(error)))
            return
        if trainer.rank == 0:
            ray.get(config["sink"].record.remote(history[-1:]))
        if (index + 1) % job.training.checkpoint_every == 0 and index + 1 < total:
            save_checkpoint(trainer.engine, history)
    heldout = PairTable.load(config["run_dir"], heldout=True)
    if len(heldout):
        margins = trainer.margins(heldout)
        if trainer.rank == 0:
            ray.get(config["sink"].measure.remote(margins))
    save_checkpoint(trainer.engine, history, policy=trainer.engine.module)
