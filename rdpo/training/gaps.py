"""The reward gaps of a data set: their scale, and whether the loss can reach what they ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rdpo.config import Loss

UNREACHABLE_NATS = 50.0


@dataclass(frozen=True)
class GapScale:
    """What every reward gap is divided by, fixed before training."""

    scale: float = 1.0

    @classmethod
    def fitted(cls, gaps: Sequence[float], norm: str) -> GapScale:
        """The scale from all gaps: 1, their standard deviation, or the largest size."""
        # 1 where all gaps are alike: there is nothing to divide by.
        if norm == "zscore":
            return cls(_spread(gaps) or 1.0)
        if norm == "range01":
            return cls(max((abs(gap) for gap in gaps), default=1.0) or 1.0)
        return cls()

    def __call__(self, gaps: Tensor) -> Tensor:
        """Scaled gaps (P,) of gaps (P,)."""
        return gaps / self.scale


def advice(gaps: Sequence[float], scale: GapScale, loss: Loss) -> str | None:
    """A warning if the mean offset asks for a log-ratio that training hardly reaches."""
    if not gaps or loss.reward_use != "offset":
        return None
    mean = loss.offset_coef / scale.scale * sum(abs(gap) for gap in gaps) / len(gaps)
    if mean / loss.beta <= UNREACHABLE_NATS:
        return None
    return (
        f"the mean offset {mean:.2f} at beta {loss.beta} asks for a log-ratio of {mean / loss.beta:.0f} nats; "
        f"lower training.offset_coef, or set training.reward_norm = 'zscore'"
    )


def _spread(gaps: Sequence[float]) -> float:
    mean = sum(gaps) / max(len(gaps), 1)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(len(gaps), 1))
