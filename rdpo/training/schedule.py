"""How many optimizer steps there are, and the learning rate of each."""

from __future__ import annotations

import math

from rdpo.config import Job
from rdpo.modeling.packing import epoch_steps


def total_steps(num_pairs: int, job: Job) -> int:
    """Optimizer steps of the whole training."""
    training = job.training
    steps = training.epochs * epoch_steps(num_pairs, training.batch_size)
    return min(steps, training.max_steps or steps)


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Learning rate of a step (from 0): linear warm-up, then linear or cosine decay to 0, or constant."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        # So that the first step moves the weights, and the first after the warm-up has the whole rate.
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    shapes = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    return peak * shapes[schedule]
