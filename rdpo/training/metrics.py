"""Metrics of one optimizer step: sums on each worker, means over all pairs of the step.

Names are the field's: `loss`, `rewards/{chosen,rejected,margins,accuracies}`, `logps/{chosen,rejected}`
(sums per completion, nats), `grad_norm`, `learning_rate`. Ours: `offset/mean`, `offset/negative_share`,
`offset/zero_share`, `delta/mean`; of groups `groups/accuracies`, the share of all ordered pairs of answers that the
implicit rewards put the right way round, and `groups/tau`, Kendall's tau with the scores; with
`training.policy_weight` `weights/mean`, what pairs weigh on average; `tflops_per_worker`, the step's model FLOPs a
second in 1e12, and `mfu`, their share of what the GPU's datasheet promises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

StepMetrics = dict[str, float]
"""The metrics of one step by name, as they are written down."""

NAMES = (
    "loss",
    "sft_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "delta/mean",
    "offset/mean",
    "offset/negative_share",
    "offset/zero_share",
)
OF_GROUPS = ("groups/accuracies", "groups/tau")
OF_WEIGHTS = ("weights/mean",)


@dataclass
class PairOutcome:
    """What one micro-batch yields: each (P,), detached where it is only reported."""

    loss: Tensor
    sft_loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    delta: Tensor
    offset: Tensor
    order: tuple[Tensor, ...] = ()
    """Of groups: how far the policy agrees with their order, by OF_GROUPS."""
    weight: tuple[Tensor, ...] = ()
    """What pairs weigh, by OF_WEIGHTS, where the policy weighs them."""

    def sums(self) -> Tensor:
        """Sums over the pairs, in the order of NAMES, OF_GROUPS and OF_WEIGHTS, in fp64."""
        margins = self.chosen_rewards - self.rejected_rewards
        columns = (
            self.loss,
            self.sft_loss,
            self.chosen_rewards,
            self.rejected_rewards,
            margins,
            margins > 0,
            self.chosen_logps,
            self.rejected_logps,
            self.delta,
            self.offset,
            self.offset < 0,
            self.offset == 0,
            *self.order,
            *self.weight,
        )
        return torch.stack([column.detach().double().sum() for column in columns])


class MetricSums:
    """Adds up the micro-batches of a step on one worker, then over all workers; `further`: names beside NAMES."""

    def __init__(self, device: torch.device, *further: str):
        self.names = (*NAMES, *further)
        self.sums = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=device)

    def add(self, outcome: PairOutcome, tokens: int) -> None:
        """Count one micro-batch of `tokens` real tokens."""
        # They stay on the device until the step ends: each number read from a GPU waits for all its work.
        counts = self.sums.new_tensor([len(outcome.loss), tokens])
        self.sums += torch.cat([outcome.sums(), counts])

    def reduced(self) -> StepMetrics:
        """Means over the pairs of all workers, and the step's `pairs` and `tokens`."""
        # Sums, not means: workers have other numbers of pairs.
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        *sums, pairs, tokens = self.sums.tolist()
        means = {name: total / max(pairs, 1) for name, total in zip(self.names, sums, strict=True)}
        return {**means, "pairs": pairs, "tokens": tokens}
