"""What every completion token of a pair is worth to the trained policy, beside the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdpo.cluster.hardware import take_device
from rdpo.execution.reader import RunReader
from rdpo.files.stage_folder import StageFolder
from rdpo.modeling.student import frozen_student
from rdpo.records import SIDES, Row

if TYPE_CHECKING:
    from rdpo.modeling.model import Policy


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs in nats of one completion's tokens that count; `policy` is None before training ends."""

    positions: list[int]
    """Where each stands in the sequence, whose first token has 0."""
    reference: list[float]
    policy: list[float] | None


class TokenReader:
    """The reference and the trained policy of a run, which read pairs of its reference stage."""

    def __init__(self, run: RunReader):
        """Load both models.

        Raises:
            InputError: the start model cannot be had, or not as the run read it (bitsandbytes is missing).
        """
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        device = take_device(torch.cuda.is_available())
        trained = _merged(run.folder("policy")) if run.manifest("policy") else None
        self.reference, _ = frozen_student(run.job_of("reference")).open(device)
        self.policy = frozen_student(run.job_of("policy"), trained).open(device)[0] if trained else None

    def read(self, row: Row) -> dict[str, TokenLogps]:
        """Of a row with `prompt_ids`, `chosen_ids` and `rejected_ids`: each side's log-probs by its name."""
        reference, policy = _by_side(self.reference, row), _by_side(self.policy, row) if self.policy else {}
        return {side: TokenLogps(_positions(row, side), reference[side], policy.get(side)) for side in SIDES}


def _positions(row: Row, side: str) -> list[int]:
    start = len(row["prompt_ids"])
    return [start + place for place, token in enumerate(row[f"{side}_ids"]) if token >= 0]


def _merged(folder: StageFolder) -> str:
    from rdpo.training.checkpoint import MERGED

    return str(folder.local(MERGED))


def _by_side(policy: Policy, row: Row) -> dict[str, list[float]]:
    import torch

    # One pair: its first sequence is the chosen answer, its second the rejected one.
    batch = policy.batch([row["prompt_ids"]], *([row[f"{side}_ids"]] for side in SIDES))
    device = next(policy.parameters()).device
    with torch.inference_mode():
        logps = policy.token_logps(batch.to(device)).cpu()
    return {side: logps[batch.sequence == index].tolist() for index, side in enumerate(SIDES)}
