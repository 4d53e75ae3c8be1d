"""Bringing a run up to date, for the command line and for Python programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.config import Job, job_of, read_toml, to_table, with_changes
from rdpo.errors import InputError, input_error_within
from rdpo.records import visible
from rdpo.suggestion import did_you_mean
from rdpo.tracking import Console, run_console

if TYPE_CHECKING:
    from rdpo.pipeline import Run
    from rdpo.view import RunView


def run(
    job: Job | Mapping[str, Any] | str | Path,
    run_dir: str | Path | None = None,
    *,
    until: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> RunView:
    """Run a job from its prompts to the published model, or as far as a stage; what is done already is skipped.

    Args:
        job: a job, its tables, or the path of a job file.
        run_dir: where the run lives, `runs/NAME` if not given; a folder, or an address in an object store.
        until: the last stage to run.
        overrides: changed settings by their names, as in `{"training.beta": 0.2}`.
        fresh: start over; the run directory is emptied first.

    Raises:
        InputError: the job, or something that it names, is wrong.
    """
    checked = _job(job, overrides or {})
    check_until(checked, until)
    place = str(run_dir) if run_dir else default_dir(checked)
    try:
        execute(checked, place, fresh=fresh, until=until)
    except Exception as error:
        if bad_input := input_error_within(error):
            raise bad_input from None
        raise
    return load_run(place)


def load_run(run_dir: str | Path) -> RunView:
    """What a run directory holds.

    Raises:
        InputError: there is no run in it.
    """
    from rdpo.view import RunView

    return RunView(str(run_dir))


def _job(job: Job | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> Job:
    if isinstance(job, str | Path):
        return job_of(with_changes(read_toml(job), overrides), str(job))
    return job_of(with_changes(to_table(job) if isinstance(job, Job) else job, overrides), "job")


def default_dir(job: Job) -> str:
    """Where a job's run lives that is not told where to."""
    return os.path.join("runs", job.name)


def check_until(job: Job, until: str | None) -> None:
    """Check that a job has the stage at which its run is to stop.

    Raises:
        InputError: it has no such stage, or is run whole.
    """
    if until and until not in job.stages:
        meant = did_you_mean(until, job.stages)
        raise InputError(f"--until {until}: no such stage{meant}; the job's stages are {', '.join(job.stages)}")
    if until and job.rounds.count > 1:
        raise InputError("--until: a job of several rounds is run whole; add --set rounds.count=1")


def execute(
    job: Job,
    run_dir: str,
    voice: type[Console] = Console,
    fresh: bool = False,
    until: str | None = None,
    only: str | None = None,
) -> None:
    """Bring a run up to date: all its rounds or stages, those up to `until`, or `only` one; `voice` tells of it."""
    from rdpo.cluster import ray_stopped_after
    from rdpo.evaluation.report import ReportSoFar, write_report
    from rdpo.pipeline import Run, locked, run_stages
    from rdpo.rounds import run_rounds
    from rdpo.stages import prepare, stages_of
    from rdpo.stores import absolute

    stages = stages_of(job)
    last = job.stages.index(until or only or job.stages[-1])
    with locked(job, run_dir, fresh, _aside), run_console(run_dir, voice) as console, ray_stopped_after():
        if job.rounds.count > 1:
            run_rounds(job, absolute(run_dir), console)
            return
        run = Run(job, absolute(run_dir), console, prepare, on_stage=ReportSoFar())
        run_stages(run, stages[last if only else 0 : last + 1])
        if only or until:
            write_report(run.dir)
        else:
            _finish(run)


def _aside(text: str) -> None:
    """Say what is no part of the output."""
    print(f"rdpo: {visible(text)}", file=sys.stderr)


def _finish(run: Run) -> None:
    from rdpo.evaluation.alerts import alerts
    from rdpo.evaluation.report import headline, write_report
    from rdpo.storage import finished

    path, model = write_report(run.dir), run.folder("model").address()
    for alert in alerts(finished(run.dir, run.job.stages), None):
        run.console.warn(alert)
    for line in [*headline(run.dir), f"model       {model}", f"report      {path}"]:
        run.console.conclude(line)
    run.console.tell("result", model=model, report=path, evaluation=run.manifest("evaluation", "result").summary)
