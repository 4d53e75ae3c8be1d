"""Names of a run's stages, in the order in which data passes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from rdpo.config import Job

STAGES = (
    "prompts",
    "calibration",
    "synthesis",
    "rewards",
    "pairs",
    "replay",
    "reference",
    "training",
    "policy",
    "retention",
    "evaluation",
    "model",
)
WITHOUT_ROWS = ("training", "policy", "model")
STAGE_COMMANDS = {
    "calibrate": "calibration",
    "synthesize": "synthesis",
    "score": "rewards",
    "pair": "pairs",
    "reference": "reference",
    "train": "training",
    "merge": "policy",
    "evaluate": "evaluation",
    "publish": "model",
}
"""What is typed to bring one stage of a run up to date."""


def known_stage(name: str) -> str:
    """The name of a stage, as a person gives it.

    Raises:
        InputError: there is no such stage.
    """
    if name not in STAGES:
        raise InputError(f"no stage {name}{did_you_mean(name, STAGES)}; the stages are {', '.join(STAGES)}")
    return name


def job_stages(job: Job) -> tuple[str, ...]:
    """Names of a job's stages, in order: all but those that it leaves out."""
    left_out = {name for name, wanted in (("replay", job.replay), ("retention", job.retention)) if wanted is None}
    return tuple(name for name in STAGES if name not in left_out)
