"""Where a run tells of itself beside its own directory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rdpo.config.section import Section

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class Tracking(Section):
    """Trackers of experiments. They change no result, and one that fails is left with a warning. Addresses and
    keys they take from their own environment variables (`WANDB_API_KEY`, `MLFLOW_TRACKING_URI`, …).
    """

    to: list[Tracker] = Field(default_factory=list)
    """Who hears of every training step and every finished stage; none by default. Each is a package to install.
    TensorBoard's files are in `RUN_DIR/logs/tensorboard`, W&B's in `RUN_DIR/logs`."""
    project: str = Field(default="rdpo", min_length=1)
    """The project of W&B, or the experiment of MLflow, that the run belongs to."""
