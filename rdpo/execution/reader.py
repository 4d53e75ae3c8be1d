"""A run as its files say: its job, and the manifests of its finished stages."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rdpo.config import Job, load_job
from rdpo.errors import InputError
from rdpo.files.folder import Folder
from rdpo.files.stage_folder import Manifest, StageFolder

JOB_FILE = "config.toml"


def job_of_run(run_dir: str) -> Job:
    """The resolved job of a run.

    Raises:
        InputError: there is no run in this directory.
    """
    if not Folder(run_dir).exists(JOB_FILE):
        raise InputError(f"{run_dir}: no run here (no {JOB_FILE})")
    return load_job(f"{run_dir.rstrip('/')}/{JOB_FILE}")


def finished(run_dir: str, stages: Iterable[str]) -> dict[str, Manifest]:
    """The manifests of those of the stages that are finished, by name."""
    found = {name: StageFolder(run_dir, name).manifest() for name in stages}
    return {name: manifest for name, manifest in found.items() if manifest}


def round_dir(run_dir: str, number: int) -> str:
    """Run directory of one round."""
    return os.path.join(run_dir, "rounds", str(number))
