"""What a program calls: running a job, and looking at what a run holds. The command line uses the same functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from rdpo.cluster.connection import ray_stopped_after
from rdpo.config import Job, job_of, read_tables, to_table, with_changes
from rdpo.errors import InputError, did_you_mean, input_error_within
from rdpo.execution.pipeline import locked, run_stages
from rdpo.execution.reader import RunReader, round_dir, type_dir
from rdpo.execution.run import Run
from rdpo.experiments.annotators import run_annotators
from rdpo.experiments.rounds import run_rounds
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest
from rdpo.files.stores import absolute
from rdpo.inspection.export import export
from rdpo.records import visible
from rdpo.report.alerts import alerts
from rdpo.report.page import REPORT
from rdpo.report.report import ReportSoFar, headline, write_report
from rdpo.stages.checks import prepare
from rdpo.stages.table import known_stage, names_of, stages_of
from rdpo.tracking.console import Console, log_dir, run_console
from rdpo.tracking.trace import FILE as TRACE
from rdpo.tracking.trace import span, tracing

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

TABLE = Markup("<table><tr><th>stage</th><th>rows</th><th>dropped</th><th>seconds</th></tr>{}</table>")
LINE = Markup("<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.0f}</td></tr>")
PAGE = Markup("<div><b>{}</b> <code>{}</code>{}<pre>{}</pre></div>")


def run(
    job: Job | Mapping[str, Any] | str | Path,
    run_dir: str | Path | None = None,
    *,
    until: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    fresh: bool = False,
    trace: bool = False,
) -> RunView:
    """Run a job from its prompts to the published model, or as far as a stage; what is done already is skipped.

    Args:
        job: a job, its tables, or the path of a job file.
        run_dir: where the run lives, `runs/NAME` if not given; a folder, or an address in an object store.
        until: the last stage to run.
        overrides: changed settings by their names, as in `{"training.beta": 0.2}`.
        fresh: start over; the run directory is emptied first.
        trace: leave a Chrome trace of where the time goes with the run's logs.

    Raises:
        InputError: the job, or something that it names, is wrong.
    """
    checked = _job(job, overrides or {})
    check_until(checked, until)

    place = str(run_dir) if run_dir else default_dir(checked)
    try:
        execute(checked, place, fresh=fresh, until=until, trace=trace)
    except Exception as error:
        # Ray wraps what a worker raised in errors of its own.
        if bad_input := input_error_within(error):
            raise bad_input from None
        raise
    return load_run(place)


def load_run(run_dir: str | Path) -> RunView:
    """What a run directory holds.

    Raises:
        InputError: there is no run in it.
    """
    return RunView(str(run_dir))


def _job(job: Job | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> Job:
    if isinstance(job, str | Path):
        return job_of(with_changes(read_tables(job), overrides), str(job))
    return job_of(with_changes(to_table(job) if isinstance(job, Job) else job, overrides), "job")


def default_dir(job: Job) -> str:
    """Where a job's run lives where no other place is given."""
    return os.path.join("runs", job.name)


def check_until(job: Job, until: str | None) -> None:
    """Check that a job has the stage at which its run is to stop.

    Raises:
        InputError: it has no such stage, or is run whole.
    """
    if until and until not in names_of(job):
        meant = did_you_mean(until, names_of(job))
        raise InputError(f"--until {until}: no such stage{meant}; the job's stages are {', '.join(names_of(job))}")
    if until and job.rounds.count > 1:
        raise InputError("--until: a job of several rounds is run whole; add --set rounds.count=1")


def execute(
    job: Job,
    run_dir: str,
    console_class: type[Console] = Console,
    fresh: bool = False,
    until: str | None = None,
    only: str | None = None,
    trace: bool = False,
) -> None:
    """Bring a run up to date: all its rounds, types or stages, those up to `until`, or `only` one.

    `console_class` says how a person, or a program that reads its output, hears of it. `trace`: a Chrome trace of where
    the time goes is left with the run's logs.
    """
    stages = stages_of(job)
    last = names_of(job).index(until or only or names_of(job)[-1])
    with (
        locked(job, run_dir, fresh, _aside) as check,
        run_console(run_dir, console_class) as console,
        ray_stopped_after(),
        tracing(log_dir(run_dir) / TRACE if trace else None, console.conclude),
    ):
        if job.rounds.count > 1:
            run_rounds(job, absolute(run_dir), console, check)
            return
        if job.fits_types and not (only or until):
            run_annotators(job, absolute(run_dir), console, check)
            return
        run = Run(job, absolute(run_dir), console, prepare, on_stage=ReportSoFar(), stages=stages, check=check)
        # Stages before `only` are not looked at: what is there is taken as it is.
        run_stages(run, stages[last if only else 0 : last + 1])
        if only or until:
            write_report(run.dir)
        else:
            _finish(run)


def _aside(text: str) -> None:
    """Say what is no part of the output."""
    print(f"rdpo: {visible(text)}", file=sys.stderr)


def _finish(run: Run) -> None:
    with span("report"):
        path = write_report(run.dir)
    model = run.folder("model").address()
    for alert in alerts(run.finished(names_of(run.job)), None):
        run.console.warn(alert)
    for line in [*headline(run.dir), f"model       {model}", f"report      {path}"]:
        run.console.conclude(line)
    run.console.tell("result", model=model, report=path, evaluation=run.require("evaluation", "result").summary)


class RunView(RunReader):
    """What a run directory holds, on disk or in an object store. It only reads, also while the run is at work.

    `dir` is the run directory, `job` its job with all defaults.
    """

    def __init__(self, run_dir: str):
        """Look at a run.

        Raises:
            InputError: there is none in this directory.
        """
        super().__init__(run_dir)

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Of each finished stage, by its name: settings, rows, dropped rows by reason, tokens, seconds."""
        return self.finished(names_of(self.job))

    @property
    def rounds(self) -> list[RunView]:
        """The rounds of a job that has several, each a run of its own."""
        folders = (round_dir(self.dir, number) for number in range(1, self.job.rounds.count + 1))
        return [RunView(folder) for folder in folders if Folder(folder).files()]

    @property
    def types(self) -> list[RunView]:
        """The runs of the types of annotators of a job that fits some, with a model each."""
        count = self.job.annotators.types if self.job.fits_types and self.job.annotators else 0
        folders = (type_dir(self.dir, number) for number in range(1, count + 1))
        return [RunView(folder) for folder in folders if Folder(folder).files()]

    @property
    def headline(self) -> list[str]:
        """The result in a few lines of text; none before the evaluation."""
        return headline(self.dir)

    @property
    def model(self) -> str | None:
        """Where the published model is: a folder, or an address in an object store; None before there is one."""
        return self.folder("model").address() if self.manifest("model") else None

    @property
    def report(self) -> str | None:
        """Where the report is; None before there is one."""
        folder = Folder(self.dir)
        return folder.address(REPORT) if folder.exists(REPORT) else None

    def table(self, stage: str, columns: list[str] | None = None, dropped: bool = False) -> pa.Table:
        """The rows of a stage in the order of their ids, as far as they are made; or those that it dropped.

        Raises:
            InputError: there is no such stage, or it has not begun.
        """
        self._check_begun(stage)
        return super().table(stage, columns, dropped)

    def dataset(self, stage: str) -> ray.data.Dataset:
        """The rows of a stage as a Ray Dataset.

        Raises:
            InputError: there is no such stage, or it has not begun.
        """
        self._check_begun(stage)
        return self.folder(stage).dataset()

    def export(self, what: Literal["pairs", "groups", "answers"], target: str) -> None:
        """Write pairs as a preference data set, groups as they are, or evaluated answers as AlpacaEval's outputs.

        Raises:
            InputError: they are not made yet or there are none, or the folder is not empty.
        """
        export(self.dir, what, target)

    def _check_begun(self, stage: str) -> None:
        if not self.folder(known_stage(stage)).files():
            raise InputError(f"{self.dir}: the {stage} stage has not begun")

    def __repr__(self) -> str:
        return f"RunView({self.dir!r}: {', '.join(self.manifests) or 'no stage finished'})"

    def _repr_html_(self) -> str:
        """The stages and the result, for a notebook."""
        rows = [LINE.format(stage, *_counts(manifest), manifest.seconds) for stage, manifest in self.manifests.items()]
        result = visible("\n".join(self.headline))
        return str(PAGE.format(visible(self.job.name), visible(self.dir), TABLE.format(Markup("").join(rows)), result))


def _counts(manifest: Manifest) -> tuple[int | str, int | str]:
    """Rows and dropped rows of a stage that has rows."""
    return (manifest.rows_out, sum(manifest.dropped.values())) if manifest.rows_in else ("", "")
