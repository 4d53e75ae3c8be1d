"""Several ways to align one model, held against each other: each arm is a base job with changes of its own.

Every arm and seed has a run directory; a stage that an earlier one has made with the same settings on the same
inputs is taken over from there, not made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from rdpo.config import Job, Section, explained, job_of, read_toml
from rdpo.errors import InputError
from rdpo.pipeline import Run, Stage, locked, run_stages
from rdpo.stages import prepare, stages_of
from rdpo.storage import Folder, StageFolder
from rdpo.tracking import Console

LAST = "evaluation"


class Comparison(Section):
    """A comparison file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the comparison; its directory is `runs/NAME` unless `--run-dir` says otherwise."""
    job: str
    """The base job file, relative to this one."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds with which each arm is run."""
    baseline: str
    """The arm that the others are held against."""
    all: dict[str, Any] = Field(default_factory=dict)
    """Changes to the base job that all arms have, as tables like those of a job."""
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    """Changes of each arm, by its name."""

    @model_validator(mode="after")
    def _check_names(self) -> Comparison:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline = {self.baseline!r} is no arm; the arms are {', '.join(self.arms)}")
        wrong = [name for name in self.arms if not name.replace("-", "").replace("_", "").isalnum()]
        if wrong:
            raise ValueError(f"arm {wrong[0]!r}: a name has letters, digits, - and _")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands twice")
        return self


def load_comparison(path: str | Path) -> tuple[Comparison, dict[tuple[str, int], Job]]:
    """A comparison file and the job of each of its arms and seeds.

    Raises:
        InputError: the file or its base job is missing or wrong, or an arm's changes are.
    """
    path = Path(path)
    try:
        comparison = Comparison.model_validate(read_toml(path))
    except ValidationError as error:
        raise InputError(explained(path, error)) from None
    base = path.parent / comparison.job
    table = read_toml(base)
    jobs = {}
    for name, changes in comparison.arms.items():
        for seed in comparison.seeds:
            changed = merged(merged(table, comparison.all), {**changes, "seed": seed, "name": f"{name}-{seed}"})
            jobs[name, seed] = job = job_of(changed, f"{path}: arm {name}")
            if job.rounds.count > 1:
                raise InputError(f"{path}: arm {name}: several rounds are run by `rdpo run`, not compared; remove them")
    return comparison, jobs


def merged(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A table with the changes over it, section by section; the table itself stays as it is."""
    result = dict(table)
    for name, value in changes.items():
        known = result.get(name)
        result[name] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def arm_dir(run_dir: str, arm: str, seed: int) -> str:
    """Run directory of one arm and seed."""
    return os.path.join(run_dir, "arms", f"{arm}-{seed}")


def run_arms(jobs: dict[tuple[str, int], Job], run_dir: str, console: Console) -> None:
    """Bring every arm up to date, as far as its evaluation."""
    done: list[str] = []
    for (arm, seed), job in jobs.items():
        console.say(f"\n{arm}, seed {seed}")
        folder = os.path.abspath(arm_dir(run_dir, arm, seed))
        with locked(job, folder):
            run_stages(Run(job, folder, console, prepare, siblings=tuple(done)), list(_stages(job)))
        done.append(folder)


def compare_arms(comparison: Comparison, jobs: dict[tuple[str, int], Job], run_dir: str, console: Console) -> None:
    """Run all arms; print the table, write it as `comparison.csv` and as a report."""
    from rdpo.evaluation.arms import arm_results, table, to_csv
    from rdpo.evaluation.report import write_comparison

    run_arms(jobs, run_dir, console)
    evaluated = {(arm, seed): StageFolder(arm_dir(run_dir, arm, seed), LAST).table().to_pylist() for arm, seed in jobs}
    weights = {reward.name: reward.weight for reward in next(iter(jobs.values())).rewards}
    results = arm_results(evaluated, weights, comparison.baseline)
    for line in table(results, comparison.baseline):
        console.say(line)
    Folder(run_dir).write_bytes("comparison.csv", to_csv(results).encode())
    console.say(f"\nreport      {write_comparison(run_dir, comparison, results)}")


def _stages(job: Job) -> Iterator[Stage]:
    for stage in stages_of(job):
        yield stage
        if stage.name == LAST:
            return
