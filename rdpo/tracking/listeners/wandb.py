"""A run at Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rdpo.config import Job
from rdpo.files.manifest import Manifest
from rdpo.files.stores import absolute
from rdpo.records import digest
from rdpo.tracking.console import Listener
from rdpo.tracking.listeners.figures import stage_figures, step_figures

LOGIN_S = 60


class WandB(Listener):
    """Curves over the optimizer steps, figures of the stages as the summary, and the job as the configuration.

    A run that resumes is the same one there: its id is made of its directory.
    """

    def __init__(self, job: Job, run_dir: str, logs: Path):
        import wandb

        self.run = wandb.init(
            project=job.tracking.project,
            name=job.name,
            id=digest(absolute(run_dir))[:16],
            resume="allow",
            dir=str(logs),
            config=job.model_dump(mode="json", exclude_none=True),
            # The console is the run's own; and nobody may be there to type a key.
            settings=wandb.Settings(console="off", silent=True, login_timeout=LOGIN_S),
        )
        self.run.define_metric("train/*", step_metric="train/step")

    def step(self, metrics: Mapping[str, float]) -> None:
        """One optimizer step; after a fault some come again."""
        self.run.log({**step_figures(metrics), "train/step": int(metrics["step"])})

    def made(self, manifest: Manifest) -> None:
        """One stage is finished."""
        self.run.summary.update(stage_figures(manifest))

    def close(self) -> None:
        """Nothing more comes."""
        self.run.finish()
