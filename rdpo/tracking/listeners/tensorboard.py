"""TensorBoard's files of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rdpo.config import Job, to_toml
from rdpo.files.manifest import Manifest
from rdpo.tracking.console import Listener
from rdpo.tracking.listeners.figures import stage_figures, step_figures


class TensorBoard(Listener):
    """Curves over the optimizer steps, figures of the stages, and the job as text."""

    def __init__(self, job: Job, run_dir: str, logs: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(logs / "tensorboard"))
        self.writer.add_text("job", f"```toml\n{to_toml(job)}```")

    def step(self, metrics: Mapping[str, float]) -> None:
        """One optimizer step."""
        self._add(step_figures(metrics), int(metrics["step"]))

    def made(self, manifest: Manifest) -> None:
        """One stage is finished."""
        self._add(stage_figures(manifest), 0)

    def close(self) -> None:
        """Nothing more comes."""
        self.writer.close()

    def _add(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        # It writes when its buffer is full, which takes many steps.
        self.writer.flush()
