"""Running stages: each is made again exactly when something it depends on has changed.

A stage's key is a hash of its own settings, of the fingerprints of models and files it reads, and of
its inputs' content. A committed folder with that key is skipped; an unfinished one with that key is
continued; anything else is made anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rdpo.config import Job, to_toml
from rdpo.errors import InputError
from rdpo.lineage import stage_key, versions
from rdpo.storage import Manifest, StageFolder
from rdpo.tracking import Console, Meter

JOB_FILE = "config.toml"
LOCK = ".lock"


@dataclass
class Run:
    """One run: its job, its directory, and what has been done so far."""

    job: Job
    dir: str
    console: Console
    prepare: Callable[[Job], None]
    manifests: dict[str, Manifest] = field(default_factory=dict)
    prepared: bool = False

    def folder(self, stage: str) -> StageFolder:
        """Folder of a stage."""
        return StageFolder(self.dir, stage)

    def manifest(self, stage: str, wanted_by: str) -> Manifest:
        """Manifest of a committed stage.

        Raises:
            InputError: it is not finished.
        """
        manifest = self.manifests.get(stage) or self.folder(stage).manifest()
        if manifest is None:
            raise InputError(f"{wanted_by} needs the {stage} stage, which is not finished; `rdpo run` makes both")
        return manifest


@dataclass(frozen=True)
class Stage:
    """One stage: what it reads, what its output depends on, and what it does.

    `execute` returns the manifest's summary; `rows_in` in it is the number of rows that entered.
    """

    name: str
    inputs: tuple[str, ...]
    settings: Callable[[Job], dict[str, Any]]
    execute: Callable[[Run, StageFolder, Meter], dict[str, Any]]
    id_column: str | None = "prompt_id"
    unit: str = "rows"


def run_stages(run: Run, stages: Sequence[Stage]) -> None:
    """Bring stages up to date, in order."""
    for stage in stages:
        run_stage(run, stage)


def run_stage(run: Run, stage: Stage) -> Manifest:
    """Bring one stage up to date; its inputs must be committed.

    Raises:
        InputError: an input is missing, or something the job names cannot be used.
    """
    folder = run.folder(stage.name)
    inputs = {name: run.manifest(name, stage.name).digest for name in stage.inputs}
    settings = stage.settings(run.job)
    key = stage_key(stage.name, settings, inputs)
    manifest = folder.manifest()
    if manifest and manifest.key == key:
        run.console.say(f"{stage.name:<11}up to date")
    else:
        if not run.prepared:
            run.prepare(run.job)
            run.prepared = True
        folder.begin(key)
        manifest = _make(run, stage, folder, Manifest(stage.name, key, settings, inputs))
    run.manifests[stage.name] = manifest
    return manifest


def _make(run: Run, stage: Stage, folder: StageFolder, manifest: Manifest) -> Manifest:
    began = time.monotonic()
    with run.console.stage(stage.name, None, stage.unit) as meter:
        manifest.summary = stage.execute(run, folder, meter)
    expected = manifest.summary.pop("rows_in", None)
    manifest.tokens, manifest.seed, manifest.versions = meter.tokens, run.job.seed, versions()
    manifest.seconds = round(time.monotonic() - began, 1)
    folder.commit(manifest, stage.id_column, expected)
    for reason, count in sorted(manifest.dropped.items(), key=lambda item: -item[1]):
        run.console.say(f"{'':<11}dropped {count}: {reason}")
    return manifest


def planned(job: Job, run_dir: str, stages: Sequence[Stage]) -> dict[str, str]:
    """What `run_stages` would do with each stage: nothing, go on, or make it."""
    plan: dict[str, str] = {}
    digests: dict[str, str] = {}
    for stage in stages:
        folder = StageFolder(run_dir, stage.name)
        manifest, waiting = folder.manifest(), [name for name in stage.inputs if name not in digests]
        inputs = {name: digests[name] for name in stage.inputs if name in digests}
        key = "" if waiting else stage_key(stage.name, stage.settings(job), inputs)
        if manifest and manifest.key == key:
            plan[stage.name], digests[stage.name] = "up to date", manifest.digest
        else:
            plan[stage.name] = "would run" if manifest is None else "would run again"
    return plan


@contextmanager
def locked(job: Job, run_dir: str, fresh: bool = False) -> Iterator[None]:
    """Hold a run directory: one driver at a time; with `fresh`, emptied first. Writes the resolved job.

    Raises:
        InputError: it cannot be written, or another driver holds it.
    """
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(f"{run_dir}: another rdpo command works in this run; wait for it or end it") from None
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be written ({error.strerror}); choose another --run-dir") from None
    try:
        if fresh:
            _empty(path)
        (path / JOB_FILE).write_text(to_toml(job), encoding="utf-8")
        yield
    finally:
        lock.release()


def _empty(path: Path) -> None:
    for child in path.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != LOCK:
            child.unlink()
