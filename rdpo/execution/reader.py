"""A run seen from its files, by whoever looks at it: its job, the folders of its stages, and what is finished."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rdpo.config import Job, job_of, load_job
from rdpo.errors import InputError
from rdpo.execution.stage import Source
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import METRICS, StageFolder
from rdpo.records import ID_COLUMN

if TYPE_CHECKING:
    import pyarrow as pa

JOB_FILE = "config.toml"
MARKER = "rdpo.json"
STEPS = "steps"
"""Where the steps lie by which types of annotators are told apart."""
RUN_FORMAT = 1
"""Of a run directory: what this version writes, and the newest that it reads."""


class RunReader:
    """What a run directory holds, on disk or in an object store. It only reads, also while the run is being made.

    `dir` is the run directory, `job` its job with all defaults.
    """

    def __init__(self, run_dir: str, job: Job | None = None):
        """Look at a run; with `job` at one whose job is known already.

        Raises:
            InputError: there is no run in this directory.
        """
        self.dir = run_dir.rstrip("/")
        self.job = job or job_of_run(self.dir)

    def folder(self, stage: str) -> StageFolder:
        """Folder of a stage."""
        return StageFolder(self.dir, stage)

    def manifest(self, stage: str) -> Manifest | None:
        """Manifest of a stage; None while it is not finished."""
        return self.folder(stage).manifest()

    def job_of(self, stage: str) -> Job:
        """The job that made a stage, or makes it.

        It is not always the run's: another one may have been begun here since, and ended before it came so far.
        """
        manifest = self.manifest(stage)
        written = manifest.job if manifest else self.folder(stage).begun.get("job")
        return job_of(tomllib.loads(written), f"{self.dir}/{stage}") if written else self.job

    def finished(self, stages: Iterable[str]) -> dict[str, Manifest]:
        """The manifests of those of the stages that are finished, by name."""
        found = {name: self.manifest(name) for name in stages}
        return {name: manifest for name, manifest in found.items() if manifest}

    def require(self, stage: str, wanted_by: str | None = None) -> Manifest:
        """Manifest of a stage that has to be finished; `wanted_by` is what needs it.

        Raises:
            InputError: it is not finished.
        """
        if manifest := self.manifest(stage):
            return manifest
        if wanted_by:
            raise InputError(f"{wanted_by} needs the {stage} stage, which is not finished; `rdpo run` makes both")
        makes = "publishes the trained model" if stage == "model" else "makes it"
        raise InputError(f"{self.dir}: the {stage} stage is not finished; `rdpo run` {makes}")

    def source(self, stage: str) -> Source:
        """The kept rows of a stage, as another one takes them up."""
        folder = self.folder(stage)
        return Source(folder.dataset, folder.count(), lambda: folder.ids(ID_COLUMN))

    def table(self, stage: str, columns: list[str] | None = None, dropped: bool = False) -> pa.Table:
        """The rows of a stage in the order of their ids, as far as they are made; or those that it dropped."""
        return table_of_stage(self.dir, stage, columns, dropped)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The metrics of every optimizer step so far, in order."""
        return self.folder("training").read_lines(METRICS)


def table_of_stage(run_dir: str, stage: str, columns: list[str] | None = None, dropped: bool = False) -> pa.Table:
    """The rows of a stage as `RunReader.table` gives them, of a directory that need not hold the run's job."""
    table = StageFolder(run_dir, stage).table("dropped" if dropped else "", columns)
    return table.sort_by(ID_COLUMN) if ID_COLUMN in table.column_names else table


def job_of_run(run_dir: str) -> Job:
    """The resolved job of a run.

    Raises:
        InputError: there is no run in this directory.
    """
    folder = Folder(run_dir)
    check_format(folder)
    if not folder.exists(JOB_FILE):
        raise InputError(f"{run_dir}: no run here (no {JOB_FILE})")
    return load_job(f"{run_dir.rstrip('/')}/{JOB_FILE}")


def check_format(folder: Folder) -> None:
    """Whether this version reads a run directory; one without a marker is from before there were any.

    Raises:
        InputError: a newer version wrote it, or its marker is not to be understood.
    """
    if not folder.exists(MARKER):
        return

    marker = folder.read_json(MARKER)
    written = marker.get("format") if isinstance(marker, dict) else None
    if not isinstance(written, int):
        raise InputError(f"{folder.path}/{MARKER}: does not say the run's format; the directory is left as it is")
    if written > RUN_FORMAT:
        raise InputError(
            f"{folder.path}: written by rdpo {marker.get('rdpo')} in format {written}, and this version reads up to "
            f"{RUN_FORMAT}; install that version or a newer one"
        )


def inner_runs(job: Job) -> list[str]:
    """Where, below its directory, the runs of a job lie that has several, in their order: its rounds, or its types.

    Some of them may not be there yet. A job that is a single run has none.
    """
    if job.rounds.count > 1:
        return [round_dir("", number) for number in range(1, job.rounds.count + 1)]
    if not (job.fits_types and job.annotators):
        return []
    types = range(1, job.annotators.types + 1)
    steps = [step_dir("", step, number) for step in range(1, job.annotators.steps + 1) for number in types]
    return [step_dir("", 0, 1), *steps, *(type_dir("", number) for number in types)]


def step_dir(run_dir: str, step: int, number: int) -> str:
    """Run directory in which one step trains the policy of one type; of step 0 the one policy for all annotators."""
    return os.path.join(run_dir, STEPS, f"{step}-{number}")


def type_dir(run_dir: str, number: int) -> str:
    """Run directory of the policy of one type of annotators, evaluated and published."""
    return os.path.join(run_dir, "types", str(number))


def round_dir(run_dir: str, number: int) -> str:
    """Run directory of one round of a job that has several."""
    return os.path.join(run_dir, "rounds", str(number))
