"""A run's progress among Ray's own metrics, which every node's endpoint has for Prometheus.

Ray puts `ray_` before each name: `ray_rdpo_rows`, `ray_rdpo_train_loss` and so on, by `run` and `stage`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rdpo.files.manifest import Manifest
from rdpo.tracking.console import Listener, Meter
from rdpo.tracking.listeners.figures import step_figures

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

MEANINGS = {
    "rows": "Rows, or optimizer steps of training, that a stage has done",
    "rows_expected": "Rows, or optimizer steps of training, that a stage will have done",
    "tokens": "Tokens that a stage has written, or that training has read",
    "tokens_per_second": "Tokens a second since the stage began",
    "dropped_rows": "Rows that a finished stage has dropped",
    "stage_seconds": "Seconds that a finished stage took",
}


class RayMetrics(Listener):
    """Gauges of Ray; silent as long as the run has not needed Ray."""

    def __init__(self, run: str):
        self.run, self.gauges = run, dict[str, "Gauge"]()

    def progress(self, meter: Meter) -> None:
        """How far a stage is."""
        self._set("rows", meter.done, meter.stage)
        self._set("rows_expected", meter.total or 0, meter.stage)
        if meter.tokens:
            self._set("tokens", meter.tokens, meter.stage)
            self._set("tokens_per_second", meter.tokens / max(meter.seconds, 1e-9), meter.stage)

    def step(self, metrics: Mapping[str, float]) -> None:
        """One optimizer step."""
        for name, value in step_figures(metrics).items():
            self._set(re.sub(r"\W", "_", name), value, "training")

    def made(self, manifest: Manifest) -> None:
        """One stage is finished."""
        self._set("dropped_rows", sum(manifest.dropped.values()), manifest.stage)
        self._set("stage_seconds", manifest.seconds, manifest.stage)

    def _set(self, name: str, value: float, stage: str) -> None:
        # To look is not to import: a run that needs no Ray starts none.
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            return
        if name not in self.gauges:
            from ray.util.metrics import Gauge

            meaning = MEANINGS.get(name, f"{name.removeprefix('train_')} of the last optimizer step")
            self.gauges[name] = Gauge(f"rdpo_{name}", meaning, ("run", "stage"))
        self.gauges[name].set(value, {"run": self.run, "stage": stage})
