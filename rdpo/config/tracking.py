"""Where a run tells of itself beside its own directory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rdpo.config.section import Section

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "opentelemetry"]


class Tracking(Section):
    """Trackers of experiments. They change no result, and one that fails is left with a warning. Addresses and
    keys they take from their own environment variables (`WANDB_API_KEY`, `MLFLOW_TRACKING_URI`, `TRACKIO_SPACE_ID`,
    `OTEL_EXPORTER_OTLP_ENDPOINT`, …).
    """

    to: list[Tracker] = Field(default_factory=list)
    """Who hears of every training step and every finished stage; none by default. Each is a package to install.
    TensorBoard's files are in `RUN_DIR/logs/tensorboard`, W&B's in `RUN_DIR/logs`. `opentelemetry` sends a trace, a
    span for each stage, by OTLP over HTTP; it is part of the trace that `TRACEPARENT` names, where that is set."""
    project: str = Field(default="rdpo", min_length=1)
    """The project of W&B and Trackio, the experiment of MLflow, the service of OpenTelemetry, that has the run."""
