"""Names of a run's stages, in the order in which data passes them."""

from __future__ import annotations

from rdpo.errors import InputError
from rdpo.suggestion import did_you_mean

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
