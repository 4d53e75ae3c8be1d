"""The command line: one command from prompts to a published model, and one for each stage.

Exit codes: 0 done; 2 the job file or the input is wrong (one message, no traceback); 1 something
broke, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo import __version__
from rdpo.errors import InputError
from rdpo.interruption import heed_sigterm
from rdpo.records import visible

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.pipeline import Run

OUT_OF_MEMORY = "out of memory"
DISK_FULL = "No space left on device"
ENGINE_FAILED = "Engine core initialization failed"
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception): ")
STAGE_COMMANDS = {
    "calibrate": "calibration",
    "synthesize": "synthesis",
    "score": "rewards",
    "pair": "pairs",
    "reference": "reference",
    "train": "training",
    "evaluate": "evaluation",
    "publish": "model",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `rdpo` command; the exit code."""
    options = _parser().parse_args(arguments)
    heed_sigterm()
    try:
        return options.function(options)
    except InputError as error:
        print(f"rdpo: {visible(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print("\nrdpo: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 1
    except Exception as error:
        return _broken(options, error)


def _broken(options: argparse.Namespace, error: Exception) -> int:
    """Say what broke in one line, keep the details in a file, and return the exit code."""
    cause = _input_error_within(error)
    if cause:
        print(f"rdpo: {visible(str(cause))}", file=sys.stderr)
        return 2
    from rdpo.stores import store_trouble
    from rdpo.tracking import log_dir

    trouble = store_trouble(error)
    print(f"rdpo: {visible(trouble or _in_one_line(error))}", file=sys.stderr)
    run_dir = getattr(options, "run_dir", None)
    if run_dir and log_dir(run_dir).is_dir():
        details = _written(log_dir(run_dir) / "error.log", error)
        print(f"rdpo: the same command goes on where it stopped{details}", file=sys.stderr)
    elif not trouble:
        print(visible("".join(traceback.format_exception(error))), file=sys.stderr)
    return 1


def _written(path: Path, error: Exception) -> str:
    """Write the details of an error; where they are, unless the disk does not take them."""
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return ""
    return f"; details in {path}"


def _in_one_line(error: Exception) -> str:
    if ENGINE_FAILED in str(error):
        return "a vLLM engine did not start; what it said is in libraries.log, beside the details"
    if DISK_FULL in str(error):
        return f"{DISK_FULL}: free some space on the disk of the run directory, of the temporary files or of Ray"
    if OUT_OF_MEMORY in str(error).lower():
        what = "a GPU" if "cuda out of memory" in str(error).lower() else "a worker was killed: its machine"
        return (
            f"{what} ran out of memory; lower tokens_per_batch (reference, training), "
            "logprob_chunk or engine.kv_cache_gib, or set training.gradient_checkpointing; `rdpo plan` says what takes "
            "how much"
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    # What a worker raised comes with its traceback: the first error named there is the cause of the others.
    named = next((line for line in lines if ERROR_LINE.match(line)), None)
    return named or f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def _input_error_within(error: BaseException | None) -> InputError | None:
    """The bad input behind an error that a worker raised, if there is one."""
    while error is not None:
        cause = getattr(error, "cause", None)
        if isinstance(error, InputError):
            return error
        if isinstance(cause, InputError):
            return cause
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rdpo",
        description="Refined Direct Preference Optimization: prompts, a student, a teacher and a reward in, "
        "an aligned model out.",
    )
    parser.add_argument("--version", action="version", version=f"rdpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_compare(commands)
    for command, stage in STAGE_COMMANDS.items():
        one = commands.add_parser(command, help=f"bring the {stage} stage of an existing run up to date")
        one.add_argument("run_dir", metavar="RUN_DIR")
        one.set_defaults(function=_stage, stage=stage)
    report = commands.add_parser("report", help="write RUN_DIR/report.html")
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.set_defaults(function=_report)
    _add_show(commands)
    _add_plan(commands)
    env = commands.add_parser("env", help="versions and devices, for bug reports")
    env.set_defaults(function=_env)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser("run", help="run a job file from prompts to the published model; resumes by itself")
    run.add_argument("job", metavar="JOB.toml")
    run.add_argument("--set", metavar="section.key=value", action="append", default=[], dest="overrides")
    run.add_argument("--run-dir", metavar="DIR", help="where the run lives (default: runs/NAME)")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.add_argument("--dry-run", action="store_true", help="print the resolved job and what would run")
    run.add_argument("--fresh", action="store_true", help="start over: remove the run directory first")
    run.set_defaults(function=_run)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser("compare", help="run arms and seeds of a job and compare them")
    compare.add_argument("comparison", metavar="COMPARE.toml")
    compare.add_argument("--run-dir", metavar="DIR", help="where the arms live (default: runs/NAME)")
    compare.set_defaults(function=_compare)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="memory and speed of a job's training, before anything runs")
    plan.add_argument("job", metavar="JOB.toml")
    plan.add_argument("--set", metavar="section.key=value", action="append", default=[], dest="overrides")
    plan.add_argument("--gpu", metavar="TYPE", help="a GPU type, for example H100")
    plan.add_argument(
        "--run-dir",
        metavar="DIR",
        dest="lengths_from",
        help="a run whose reference stage is done: its pairs' lengths count",
    )
    plan.add_argument("--workers", type=int, help="how many (default: training.num_workers, of two the smallest)")
    plan.set_defaults(function=_plan)


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = commands.add_parser("show", help="look at the rows of a stage")
    show.add_argument("run_dir", metavar="RUN_DIR")
    show.add_argument("stage", metavar="STAGE")
    show.add_argument("--row", metavar="ID", help="one row, by (the beginning of) its id")
    show.add_argument("--limit", type=int, default=3, help="how many rows (default 3)")
    show.add_argument("--dropped", action="store_true", help="the dropped rows, with their reasons")
    show.set_defaults(function=_show)


def _run(options: argparse.Namespace) -> int:
    from rdpo.config import load_job
    from rdpo.stages import stages_of

    job = load_job(options.job, options.overrides)
    options.run_dir = options.run_dir or os.path.join("runs", job.name)
    names = [stage.name for stage in stages_of(job)]
    if options.until and options.until not in names:
        raise InputError(f"--until {options.until}: the stages are {', '.join(names)}")
    if options.dry_run:
        return _dry_run(job, options.run_dir)
    if job.rounds.count > 1:
        return _rounds(job, options)
    return _execute(job, options.run_dir, fresh=options.fresh, until=options.until)


def _rounds(job: Job, options: argparse.Namespace) -> int:
    from rdpo.cluster import ray_stopped_after
    from rdpo.pipeline import locked
    from rdpo.rounds import run_rounds
    from rdpo.stores import absolute
    from rdpo.tracking import run_console

    if options.until:
        raise InputError("--until: a job of several rounds is run whole; add --set rounds.count=1")
    run_dir = options.run_dir
    with locked(job, run_dir, options.fresh), run_console(run_dir) as console, ray_stopped_after():
        run_rounds(job, absolute(run_dir), console)
    return 0


def _dry_run(job: Job, run_dir: str) -> int:
    from rdpo.config import to_toml
    from rdpo.pipeline import planned
    from rdpo.stages import stages_of

    print(visible(to_toml(job)))
    if job.rounds.count > 1:
        from rdpo.rounds import job_of_round, round_dir

        print(f"# round 1 of {job.rounds.count}")
        job, run_dir = job_of_round(job, 1, [job.student.model]), round_dir(run_dir, 1)
    for name, state in planned(job, run_dir, stages_of(job)).items():
        print(f"# {name:<12}{state}")
    return 0


def _stage(options: argparse.Namespace) -> int:
    from rdpo.pipeline import job_of_run

    job = job_of_run(options.run_dir)
    _check_one_round(job, options.run_dir)
    return _execute(job, options.run_dir, only=options.stage)


def _check_one_round(job: Job, run_dir: str) -> None:
    if job.rounds.count > 1:
        raise InputError(f"{run_dir}: holds several rounds; name one of them, as in {run_dir}/rounds/1")


def _execute(job, run_dir: str, fresh: bool = False, until: str | None = None, only: str | None = None) -> int:  # type: ignore[no-untyped-def]
    from rdpo.cluster import ray_stopped_after
    from rdpo.evaluation.report import report_so_far, write_report
    from rdpo.pipeline import Run, locked, run_stages
    from rdpo.stages import prepare, stages_of
    from rdpo.stores import absolute
    from rdpo.tracking import run_console

    stages = stages_of(job)
    names = [stage.name for stage in stages]
    last = names.index(until or only or names[-1])
    with locked(job, run_dir, fresh), run_console(run_dir) as console, ray_stopped_after():
        run = Run(job, absolute(run_dir), console, prepare, on_stage=report_so_far)
        run_stages(run, stages[last if only else 0 : last + 1])
        if only or until:
            write_report(run.dir)
        else:
            _finish(run)
    return 0


def _finish(run: Run) -> None:
    from rdpo.evaluation.report import headline, write_report

    path = write_report(run.dir)
    for line in headline(run.dir):
        run.console.say(line)
    run.console.say(f"model       {run.folder('model').address()}")
    run.console.say(f"report      {path}")


def _compare(options: argparse.Namespace) -> int:
    from rdpo.cluster import ray_stopped_after
    from rdpo.comparison import compare_arms, load_comparison
    from rdpo.tracking import run_console

    comparison, jobs = load_comparison(options.comparison)
    options.run_dir = options.run_dir or os.path.join("runs", comparison.name)
    with run_console(options.run_dir) as console, ray_stopped_after():
        compare_arms(comparison, jobs, options.run_dir, console)
    return 0


def _report(options: argparse.Namespace) -> int:
    from rdpo.evaluation.report import write_report
    from rdpo.pipeline import job_of_run

    _check_one_round(job_of_run(options.run_dir), options.run_dir)
    print(write_report(options.run_dir))
    return 0


def _show(options: argparse.Namespace) -> int:
    from rdpo.evaluation.show import show_rows

    show_rows(options.run_dir, options.stage, options.row, options.limit, options.dropped)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from rdpo.config import load_job
    from rdpo.training.loop import PairTable
    from rdpo.training.plan import plan

    sizes = PairTable.load(options.lengths_from).sizes if options.lengths_from else ()
    for line in plan(load_job(options.job, options.overrides), options.gpu, options.workers, sizes):
        print(line)
    return 0


def _env(options: argparse.Namespace) -> int:
    from rdpo.lineage import environment

    for name, value in environment().items():
        print(f"{name:<14}{value}")
    return 0
