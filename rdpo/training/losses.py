"""The refined DPO loss as pure functions of (P,) log-probs.

    L = phi(beta * delta - offset),   phi(z) = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)
    delta = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]
    offset = lambda * (r(x, y_w) - r(x, y_l))

with y_w chosen, y_l rejected, r the external reward, lambda = `offset_coef`, eps = `label_smoothing`.

Where this stands against the literature:
1. DPO (arXiv 2305.18290, Eq. 7) is lambda = 0, eps = 0. Conservative DPO is eps > 0.
2. The offset of refined DPO (arXiv 2402.08005) is derived, not copied: the paper's training code was
   never released. Maximising E[r_latent + lambda * r] - beta * KL(pi || ref) gives r_latent =
   beta * log(pi / ref) - lambda * r + const(x); put into Bradley-Terry, that is the loss above. With
   the minus sign the optimum is ref * exp((r_latent + lambda * r) / beta), and a pair that the reward
   contradicts weighs less; a plus sign would train against the reward. It is MODPO (arXiv 2310.03708)
   with weights (1, lambda), and ODPO (arXiv 2402.10571) with identity for f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

UNREACHABLE_NATS = 50.0


def log_ratio_gap(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Tensor:
    """Delta (P,): how much further the policy moved towards chosen than towards rejected, in nats."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return chosen - rejected


def preference_loss(delta: Tensor, offset: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss (P,) of each pair from delta (P,) and offset (P,); see the equation above."""
    logits = beta * delta - offset
    if label_smoothing == 0.0:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def sft_loss(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood (P,) of each pair's chosen tokens, in nats per token."""
    return -policy_chosen_logps / chosen_lengths


@dataclass(frozen=True)
class Offset:
    """The offset of every pair of a data set: `coef * gap / scale`, with the scale fixed beforehand."""

    coef: float
    scale: float

    @classmethod
    def fitted(cls, gaps: Sequence[float], coef: float, norm: str) -> Offset:
        """The scale from all reward gaps: 1, their standard deviation, or the largest size."""
        if norm == "zscore":
            return cls(coef, _spread(gaps) or 1.0)
        if norm == "range01":
            return cls(coef, max((abs(gap) for gap in gaps), default=1.0) or 1.0)
        return cls(coef, 1.0)

    def __call__(self, gap: Tensor) -> Tensor:
        """Offsets (P,) of reward gaps (P,)."""
        return self.coef * gap / self.scale

    def advice(self, gaps: Sequence[float], beta: float) -> str | None:
        """A warning if the mean offset asks for a log-ratio that training hardly reaches."""
        if not gaps:
            return None
        mean = self.coef / self.scale * sum(abs(gap) for gap in gaps) / len(gaps)
        if mean / beta <= UNREACHABLE_NATS:
            return None
        return (
            f"the mean offset {mean:.2f} at beta {beta} asks for a log-ratio of {mean / beta:.0f} nats; "
            f"lower training.offset_coef, or set training.offset_norm = 'zscore'"
        )


def _spread(gaps: Sequence[float]) -> float:
    mean = sum(gaps) / max(len(gaps), 1)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(len(gaps), 1))


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """DPO's implicit reward (P,): beta * log(pi / ref)."""
    return (beta * (policy_logps - reference_logps)).detach()


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Learning rate of a step (from 0): linear warm-up, then linear or cosine decay to 0, or constant."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    shapes = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    return peak * shapes[schedule]
