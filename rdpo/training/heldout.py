"""Pairs that are held out of training: how likely the policy makes their preferences, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from rdpo.training.loop import PairTable, Trainer
from rdpo.training.metrics import StepMetrics

LOSS = "heldout/loss"


class HeldoutPairs:
    """The held-out pairs of a run, and their margins at the step they were last measured at."""

    def __init__(self, run_dir: str):
        self.pairs = PairTable.load(run_dir, heldout=True)
        self.margins: list[dict[str, Any]] = []

    def measure(self, trainer: Trainer) -> StepMetrics:
        """The mean DPO loss -log sigmoid(margin) of the pairs, in nats.

        Nothing where no pairs are held out. All workers must call it, and all get the same.
        """
        if not len(self.pairs):
            return {}
        self.margins = trainer.margins(self.pairs)
        margins = torch.tensor([row["margin"] for row in self.margins], dtype=torch.float64)
        return {LOSS: float(-logsigmoid(margins).mean())}

    def lines(self) -> str:
        """The margins as JSON lines, a pair in each."""
        return json_lines(self.margins)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def best_step(history: list[StepMetrics]) -> int:
    """The step after which the held-out pairs were most likely, the later one of equals; 0 if none was measured."""
    measured = [step for step in history if LOSS in step]
    return int(min(reversed(measured), key=lambda step: step[LOSS])["step"]) if measured else 0


def correct(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Which margins are on the right side; a tie is half."""
    right: NDArray[np.float64] = (margins > 0) + 0.5 * (margins == 0)
    return right
