"""A run in MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rdpo.config import Job
from rdpo.files.manifest import Manifest
from rdpo.files.stores import absolute
from rdpo.tracking.console import Listener
from rdpo.tracking.listeners.figures import stage_figures, step_figures

PLACE = "rdpo.run_dir"
LONGEST = 500
"""Characters of a parameter."""


class MLflow(Listener):
    """Metrics over the optimizer steps and of the stages; the job's settings as parameters.

    A run that resumes is the same one there: it is found by its directory.
    """

    def __init__(self, job: Job, run_dir: str, logs: Path):
        import mlflow

        self.client, place = mlflow.MlflowClient(), absolute(run_dir)
        experiment = mlflow.set_experiment(job.tracking.project).experiment_id
        # MLflow's filters are a language of their own, in which a quote would end the text.
        quoted = place.replace("'", "\\'")
        found = self.client.search_runs([experiment], f"tags.`{PLACE}` = '{quoted}'", max_results=1)
        run = found[0] if found else self.client.create_run(experiment, run_name=job.name, tags={PLACE: place})
        self.id = run.info.run_id
        for name, value in _flat(job.model_dump(mode="json", exclude_none=True)):
            if name not in run.data.params:
                self.client.log_param(self.id, name, str(value)[:LONGEST])

    def step(self, metrics: Mapping[str, float]) -> None:
        """One optimizer step."""
        self._log(step_figures(metrics), int(metrics["step"]))

    def made(self, manifest: Manifest) -> None:
        """One stage is finished."""
        self._log(stage_figures(manifest), 0)

    def close(self) -> None:
        """Nothing more comes."""
        self.client.set_terminated(self.id)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.id, name, value, step=step)


def _flat(settings: Mapping[str, object], under: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{under}{name}.")
        else:
            yield f"{under}{name}", value
