"""Names of a run's stages, in the order in which data passes them."""

from __future__ import annotations

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
