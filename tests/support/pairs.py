"""Pairs as the reference stage leaves them, and trainers on them in this process."""

import math

import pyarrow as pa
import pytest
import torch

from rdpo.config import Job
from rdpo.modeling.packing import PairSize
from rdpo.training.loop import NonFiniteStep, PairTable, Trainer
from tests.support.jobs import valid_job

PAIRS = 4


def pairs(poisoned=(), count=PAIRS):
    """Pairs of equal lengths; a poisoned one has an infinite reference log-prob, which makes its loss infinite."""
    rows = [
        {
            "prompt_id": f"p{index}",
            "prompt_ids": [10 + index, 20, 30],
            "chosen_ids": [40, 50 + index],
            "rejected_ids": [60, 70, 80 + index],
            "reference_chosen_logps": math.inf if index in poisoned else -11.0,
            "reference_rejected_logps": -16.0,
            "reward_gap": 0.5,
        }
        for index in range(count)
    ]
    return PairTable(pa.Table.from_pylist(rows), [PairSize(3, 2, 3)] * count)


def trainer_of(model, place, data, backend=None, dtype="float32", quantization="none", **training):
    """A trainer with a constant rate; `backend`: the class of its engine, by default the one that ships."""
    table = valid_job(model, place)
    table["student"] |= {"dtype": dtype, "quantization": quantization}
    table["reference"]["max_length"] = 64
    settings = {"zero_stage": 0, "num_workers": 1, "warmup_ratio": 0.0, "schedule": "constant", "learning_rate": 1e-2}
    job = Job.model_validate({**table, "training": {**table["training"], **settings, **training}})
    return Trainer(job, data, torch.device("cpu"), backend=backend)


def weights(trainer):
    """All that is trained, by name."""
    return trainer.engine.gathered_state()


def changed(before, after):
    """How many of the weights are not the same."""
    return sum(not torch.equal(before[name], after[name]) for name in before)


def check_steps_that_are_not_finite(trainer):
    """Of a trainer whose pair 2 is poisoned: one such step is left out and changes nothing, a second ends training."""
    start = weights(trainer)
    skipped = trainer.step(0, 9, [0, 2])
    assert (skipped["skipped"], trainer.skipped) == (1.0, 1)
    assert not math.isfinite(skipped["loss"])
    assert changed(start, weights(trainer)) == 0
    taken = trainer.step(1, 9, [0, 1])
    assert taken["skipped"] == 0
    assert 0 < taken["grad_norm"] < math.inf
    assert taken["tflops_per_worker"] > 0 and "mfu" not in taken
    after = weights(trainer)
    assert changed(start, after) > 5
    with pytest.raises(NonFiniteStep, match="rows of the batch: p3, p2"):
        trainer.step(2, 9, [3, 2])
    assert changed(after, weights(trainer)) == 0
