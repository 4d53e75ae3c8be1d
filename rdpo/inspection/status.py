"""How far a run has come, as its files say: from another terminal, or from another machine that sees them.

Nothing is computed anew and no model is touched; whether a change of settings has a stage made again,
`rdpo run --dry-run` says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import fmean

import pyarrow.compute as pc

from rdpo.errors import InputError
from rdpo.execution.lock import holder
from rdpo.execution.reader import JOB_FILE, RunReader, inner_runs, job_of_run
from rdpo.execution.stage import Stage
from rdpo.execution.streaming import steps_kept
from rdpo.files.folder import IN_PROGRESS, Folder
from rdpo.files.manifest import Manifest
from rdpo.records import HELDOUT
from rdpo.stages.table import stages_of
from rdpo.training.schedule import total_steps

RECENT_STEPS = 20

Made = dict[str, Manifest]
"""Manifests of the finished stages, by name."""


@dataclass
class StageStatus:
    """A stage: `done`, `outdated` (its inputs were made again since), `in progress`, `interrupted` or `not begun`.

    `stored` rows, steps or texts (`unit`) of `total`, where that is known; `seconds` that it took, or since it was
    begun; `left_s` by the pace of the last steps; `earlier`: rows that its first, second, … step but the last has
    stored, where it has several.
    """

    stage: str
    state: str
    unit: str
    stored: int = 0
    total: int | None = None
    dropped: int = 0
    seconds: float | None = None
    loss: float | None = None
    margin: float | None = None
    left_s: float | None = None
    earlier: list[int] = field(default_factory=list)


@dataclass
class RunStatus:
    """A run: who works in it, and its stages in order."""

    name: str
    run_dir: str
    driver: str | None
    stages: list[StageStatus] = field(default_factory=list)


def statuses(run_dir: str) -> Iterator[RunStatus]:
    """The state of a run, or of each of its rounds so far; of one with types of annotators, of all its runs so far.

    Raises:
        InputError: there is no run in this directory.
    """
    job = job_of_run(run_dir)
    folders = [f"{run_dir}/{name}" for name in inner_runs(job)]
    # What the types have in common lies in the directory itself.
    for folder in [run_dir, *folders] if job.fits_types or not folders else folders:
        if Folder(folder).exists(JOB_FILE):
            yield status_of(RunReader(folder))


def status_of(run: RunReader) -> RunStatus:
    """The state of one run, or of one round."""
    stages, driver = stages_of(run.job), holder(run.dir)
    made = run.finished(stage.name for stage in stages)
    return RunStatus(run.job.name, run.dir, driver, [_stage(run, made, stage, driver is not None) for stage in stages])


def _stage(run: RunReader, made: Made, stage: Stage, driven: bool) -> StageStatus:
    folder, manifest = run.folder(stage.name), made.get(stage.name)
    if manifest:
        return _finished(run, made, stage, manifest)
    begun = folder.read_json(IN_PROGRESS)
    if not begun:
        return StageStatus(stage.name, "not begun", stage.unit)

    status = StageStatus(stage.name, "in progress" if driven else "interrupted", stage.unit)
    status.seconds = round(time.time() - begun["began"], 1) if driven else None
    if stage.name == "training":
        return _trained(run, made, status)
    status.dropped = folder.count("dropped")
    status.stored, status.total = folder.count() + status.dropped, _expected(run, made, stage)
    status.earlier = [step.count() for step in steps_kept(folder)]
    return status


def _finished(run: RunReader, made: Made, stage: Stage, manifest: Manifest) -> StageStatus:
    current = set(manifest.inputs) <= set(made) and not stage.outdated_inputs(manifest, made)
    status = StageStatus(stage.name, "done" if current else "outdated", stage.unit, seconds=manifest.seconds)
    if stage.name == "training":
        return _trained(run, made, status)
    status.dropped = sum(manifest.dropped.values())
    status.stored = status.total = manifest.rows_out + status.dropped
    return status


def _expected(run: RunReader, made: Made, stage: Stage) -> int | None:
    """How many rows a stage will have stored; None while its inputs are made, or if it has none to take."""
    if stage.rows is None or not all(name in made for name in stage.inputs):
        return None
    try:
        return stage.rows.source(run).count
    except InputError:
        return None


def _trained(run: RunReader, made: Made, status: StageStatus) -> StageStatus:
    """The status with the last optimizer step that is on file, and the time that the others will take."""
    steps = run.metrics
    if "reference" in made and (reference := run.folder("reference")).parts():
        heldout = pc.fill_null(reference.table(columns=[HELDOUT])[HELDOUT], False)
        status.total = total_steps(len(heldout) - (pc.sum(heldout).as_py() or 0), run.job)
    if not steps:
        return status

    last = steps[-1]
    status.stored, status.loss, status.margin = int(last["step"]), last["loss"], last["rewards/margins"]
    if status.state == "in progress" and status.total:
        # Of the last ones: the first steps also fill caches and compile.
        pace = fmean(step["seconds"] for step in steps[-RECENT_STEPS:])
        status.left_s = round(pace * (status.total - last["step"]), 1)
    return status


def as_json(status: RunStatus) -> str:
    """One JSON object on one line."""
    return json.dumps(asdict(status))


def as_text(status: RunStatus) -> list[str]:
    """Lines for a terminal."""
    held = f"held by {status.driver}" if status.driver else "nobody works in it"
    return [f"{status.name}, {status.run_dir}: {held}", *map(_line, status.stages)]


def _line(status: StageStatus) -> str:
    return f"{status.stage:<12}{status.state:<13}{'  '.join(facts(status))}".rstrip()


def facts(status: StageStatus) -> list[str]:
    """What is known of a stage beside its state, in words."""
    finished = status.state in ("done", "outdated")
    of = f"/{status.total}" if status.total is not None and not finished else ""
    parts = [f"{status.stored}{of} {status.unit}"] if status.stored or of else []
    if status.dropped:
        parts.append(f"{status.dropped} dropped")
    if status.earlier:
        parts.append(f"{', '.join(map(str, status.earlier))} in the steps before")

    if status.loss is not None and status.margin is not None:
        parts += [f"loss {status.loss:.4f}", f"margin {status.margin:.3f}"]
    if status.left_s is not None:
        parts.append(f"{status.left_s:.0f} s left")
    if status.seconds is not None:
        parts.append(f"{status.seconds:.0f} s" if finished else f"begun {status.seconds:.0f} s ago")
    return parts
