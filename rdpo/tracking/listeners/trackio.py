"""A run in Trackio: on this machine, in a Space of the hub, or on a server of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rdpo.config import Job
from rdpo.files.manifest import Manifest
from rdpo.files.stores import absolute
from rdpo.records import digest
from rdpo.tracking.console import Listener
from rdpo.tracking.listeners.figures import stage_figures, step_figures


class Trackio(Listener):
    """Curves over the optimizer steps, figures of the stages at step 0, and the job as the configuration.

    A run that resumes is the same one there: part of its name is made of its directory.
    """

    def __init__(self, job: Job, run_dir: str, logs: Path):
        import trackio

        self.run = trackio.init(
            project=job.tracking.project,
            name=f"{job.name}-{digest(absolute(run_dir))[:8]}",
            resume="allow",
            config=job.model_dump(mode="json", exclude_none=True),
            embed=False,
            # Of the driver's machine alone, which need not be one that works; Ray's metrics have all of them.
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def step(self, metrics: Mapping[str, float]) -> None:
        """One optimizer step; after a fault some come again."""
        self.run.log(step_figures(metrics), step=int(metrics["step"]))

    def made(self, manifest: Manifest) -> None:
        """One stage is finished."""
        self.run.log(dict(stage_figures(manifest)), step=0)

    def close(self) -> None:
        """Nothing more comes."""
        self.run.finish()
