"""Several ways to align one model, held against each other: each arm is a base job with changes of its own.

Every arm and seed has a run directory; a stage that an earlier one has made with the same settings on the same
inputs is taken over from there, not made again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from rdpo.config import Job, Section, explained, job_of, read_toml, with_changes
from rdpo.errors import InputError
from rdpo.folder import Folder
from rdpo.pipeline import Run, Stage, locked, run_stages
from rdpo.stages import prepare, stages_of
from rdpo.storage import StageFolder, finished
from rdpo.stores import absolute
from rdpo.suggestion import did_you_mean
from rdpo.tracking import Console


class Vary(Section):
    """A setting that every arm is run with in several values."""

    key: str = Field(pattern=r"^[a-z_]+(\.[a-z_0-9]+)+$")
    """The setting, as in `--set`: `pairs.flip`."""
    values: list[float] = Field(min_length=2)
    """Its values, in order."""


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
    until: Literal["training", "evaluation"] = "evaluation"
    """The last stage. `training` is enough where `pairs.heldout_fraction` holds out pairs to measure on."""
    vary: Vary | None = None
    """A setting (a `[vary]` table) in whose values each arm is run, held against the baseline with the same value."""
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

    def of(self, part: Part) -> Comparison:
        """That part of the comparison, with the baseline in any case.

        Raises:
            InputError: there is no such arm, or no such value.
        """
        for arm in part.arms:
            if arm not in self.arms:
                meant = did_you_mean(arm, self.arms)
                raise InputError(f"--arm {arm}: no such arm{meant}; the arms are {', '.join(self.arms)}")
        changes: dict[str, Any] = {"until": part.until or self.until}
        if part.arms:
            kept = {*part.arms, self.baseline}
            changes["arms"] = {name: own for name, own in self.arms.items() if name in kept}
        if part.values:
            changes["vary"] = self._varying(part.values)
        return self.model_copy(update=changes)

    def _varying(self, values: Collection[float]) -> Vary:
        known = self.vary.values if self.vary else []
        for value in values:
            if value not in known:
                told = f"the values are {', '.join(f'{one:g}' for one in known)}" if known else "nothing varies"
                raise InputError(f"--value {value:g}: {told}")
        assert self.vary
        return self.vary.model_copy(update={"values": [value for value in known if value in values]})

    @property
    def variants(self) -> list[Variant]:
        """The arms, each in every value of what varies."""
        values: list[float | None] = [*self.vary.values] if self.vary else [None]
        return [Variant(arm, value) for value in values for arm in self.arms]

    @property
    def rivals(self) -> dict[str, str]:
        """Names of the variants, each with that of the baseline it is held against."""
        return {str(variant): str(Variant(self.baseline, variant.value)) for variant in self.variants}


@dataclass(frozen=True)
class Variant:
    """An arm with one value of the setting that varies, if one does."""

    arm: str
    value: float | None = None

    def __str__(self) -> str:
        return self.arm if self.value is None else f"{self.arm}@{self.value:g}"

    def of(self, table: dict[str, Any], comparison: Comparison) -> dict[str, Any]:
        """The base job's tables with its changes."""
        changed = merged(merged(table, comparison.all), comparison.arms[self.arm])
        return with_changes(changed, {comparison.vary.key: self.value}) if comparison.vary else changed


Jobs = dict[tuple[str, int], Job]
"""The job of each arm and seed."""


@dataclass(frozen=True)
class Part:
    """What of a comparison is wanted: all of it unless said."""

    arms: Collection[str] = ()
    """Only these and the baseline."""
    values: Collection[float] = ()
    """Only these of what varies."""
    until: Literal["training", "evaluation"] | None = None
    """Another last stage than the file's."""


def load_comparison(path: str | Path, part: Part | None = None) -> tuple[Comparison, Jobs]:
    """A comparison file, or a part of it, and the job of each of its arms and seeds.

    Raises:
        InputError: the file or its base job is missing or wrong, an arm's changes are, or there is no such part.
    """
    path = Path(path)
    try:
        comparison = Comparison.model_validate(read_toml(path))
    except ValidationError as error:
        raise InputError(explained(path, error)) from None
    if part:
        comparison = comparison.of(part)
    base = path.parent / comparison.job
    table = read_toml(base)
    jobs = {}
    for variant in comparison.variants:
        for seed in comparison.seeds:
            own = {"seed": seed, "name": f"{str(variant).replace('@', '-')}-{seed}"}
            job = job_of({**variant.of(table, comparison), **own}, f"{path}: arm {variant}")
            if job.rounds.count > 1:
                raise InputError(f"{path}: arm {variant}: several rounds are run by `rdpo run`, not compared")
            jobs[str(variant), seed] = job
    if comparison.until == "evaluation":
        _check_rewards(jobs, str(path))
    return comparison, jobs


def _check_rewards(jobs: Jobs, path: str) -> None:
    """Whether all arms are measured by the same rewards, whatever weight each gives them."""
    (first, of_first), *others = ((arm, _measures(job)) for (arm, _), job in jobs.items())
    for arm, of_arm in others:
        if different := [name for name in {**of_first, **of_arm} if of_first.get(name) != of_arm.get(name)]:
            raise InputError(
                f"{path}: arms {first} and {arm} do not have the same reward {different[0]!r}; give all arms the same "
                "rewards, with weight = 0 where one is only measured"
            )


def _measures(job: Job) -> dict[str, dict[str, Any]]:
    return {reward.name: {**reward.model_dump(), "weight": None} for reward in job.rewards}


def merged(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A table with the changes over it, section by section; the table itself stays as it is."""
    result = dict(table)
    for name, value in changes.items():
        known = result.get(name)
        result[name] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def arm_dir(run_dir: str, arm: str, seed: int) -> str:
    """Run directory of one arm and seed."""
    return os.path.join(run_dir, "arms", f"{arm.replace('@', '-')}-{seed}")


def run_arms(
    comparison: Comparison, jobs: Jobs, run_dir: str, console: Console, seeds: Collection[int] | None = None
) -> None:
    """Bring every arm up to date with all its seeds, or with some.

    Other commands may do so at the same time with other seeds of the same comparison.

    Raises:
        InputError: a seed is none of the comparison's.
    """
    if unknown := set(seeds or ()) - set(comparison.seeds):
        raise InputError(f"--seed {min(unknown)}: the comparison's seeds are {', '.join(map(str, comparison.seeds))}")
    folders = {run: absolute(arm_dir(run_dir, *run)) for run in jobs}
    for (arm, seed), job in jobs.items():
        if seeds is None or seed in seeds:
            console.say(f"\n{arm}, seed {seed}")
            folder = folders[arm, seed]
            siblings = tuple(other for other in folders.values() if other != folder)
            with locked(job, folder, say=console.say):
                run_stages(Run(job, folder, console, prepare, siblings), list(_stages(job, comparison.until)))


def compare_arms(comparison: Comparison, jobs: Jobs, run_dir: str, console: Console) -> None:
    """Run all arms; print the tables, write them as CSV and as a report."""
    from rdpo.evaluation import arms, heldout, retention
    from rdpo.evaluation.comparison_report import write_comparison
    from rdpo.training.trainer import heldout_margins

    run_arms(comparison, jobs, run_dir, console)
    found, until = [], comparison.until
    if until == "evaluation":
        evaluated = {run: StageFolder(arm_dir(run_dir, *run), "evaluation").table().to_pylist() for run in jobs}
        weights = {arm: {reward.name: reward.weight for reward in job.rewards} for (arm, _), job in jobs.items()}
        found = arms.arm_results(evaluated, weights, comparison.rivals)
    made = {
        run: finished(arm_dir(run_dir, *run), (stage.name for stage in _stages(job, until)))
        for run, job in jobs.items()
    }
    # An arm that trains nothing measures no margins.
    trained = [run for run in jobs if "training" in made[run]]
    left = {run: heldout_margins(StageFolder(arm_dir(run_dir, *run), "training")) for run in trained}
    measured = heldout.heldout_results({run: of_run for run, of_run in left.items() if of_run}, comparison.rivals)
    lost = retention.table({run: of["retention"].summary for run, of in made.items() if "retention" in of})
    for line in [*arms.table(found, comparison.baseline), *heldout.table(measured, comparison.baseline), *lost]:
        console.say(line)
    for name, content in (
        ("comparison", found and arms.to_csv(found)),
        ("heldout", measured and heldout.to_csv(measured)),
    ):
        if content:
            Folder(run_dir).write_bytes(f"{name}.csv", content.encode())
    console.say(f"\nreport      {write_comparison(run_dir, comparison, found, measured)}")


def _stages(job: Job, until: str) -> Iterator[Stage]:
    for stage in stages_of(job):
        yield stage
        if stage.name == until:
            return
