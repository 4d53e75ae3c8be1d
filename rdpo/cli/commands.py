"""What each command does; what it needs is imported when it is called, so that `rdpo --help` is quick."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.errors import InputError
from rdpo.records import visible

if TYPE_CHECKING:
    from rdpo.config import Job


def run(options: argparse.Namespace) -> int:
    """Run a job from prompts to the published model."""
    from rdpo.api import check_until, default_dir, execute
    from rdpo.config import load_job
    from rdpo.tracking.console import Console, JsonConsole, QuietConsole

    job = load_job(options.job, options.overrides)
    # In the options too: an error that nobody expected is written down there.
    options.run_dir = options.run_dir or default_dir(job)
    check_until(job, options.until)
    if options.dry_run:
        return _dry_run(job, options.run_dir)
    console_class = QuietConsole if options.quiet else JsonConsole if options.json else Console
    execute(job, options.run_dir, console_class, options.fresh, options.until, trace=options.trace)
    return 0


def dpo(options: argparse.Namespace) -> int:
    """Train on a preference data set, without a job file."""
    given = {"prompts": options.dataset, "column": options.column, "student": options.model, "gpus": options.gpus}
    return _direct(options, {**given, "pairs": "yes"}, {"training.loss": options.loss}, None)


def synth(options: argparse.Namespace) -> int:
    """Let a teacher answer, critique and revise prompts, without a job file."""
    given = {"prompts": options.prompts, "column": options.column, "student": options.model, "gpus": options.gpus}
    return _direct(options, {**given, "pairs": "no", "task": options.task, "teacher": options.teacher}, {}, "synthesis")


def score(options: argparse.Namespace) -> int:
    """Score the answers of a run, or those of a preference data set without a job file."""
    from rdpo.cli.init import gpus_here, reward_table

    if options.dataset is None:
        if options.run_dir is None:
            raise InputError("give the directory of a run; or --dataset with --reward and --model")
        return stage(options)
    if options.reward is None or options.model is None:
        raise InputError("--dataset: scoring it takes --reward, and --model whose chat template measures the prompts")
    given = {"prompts": options.dataset, "column": options.column, "student": options.model, "gpus": options.gpus}
    reward = reward_table(options.reward, on_gpu=(options.gpus or gpus_here()) != "0")
    return _direct(options, {**given, "pairs": "yes"}, {"rewards": [reward]}, "rewards")


def _direct(
    options: argparse.Namespace, given: dict[str, str | None], changes: dict[str, object], until: str | None
) -> int:
    """Print the job that these options make, and run it."""
    from rdpo.api import default_dir, execute
    from rdpo.cli.direct import direct_job

    text, job = direct_job(options.name, given, changes, options.overrides)
    print(visible(f"# this job as a file: `rdpo run FILE` does the same\n{text}"), flush=True)
    options.run_dir = options.run_dir or default_dir(job)
    if not options.dry_run:
        execute(job, options.run_dir, until=until)
    return 0


def _dry_run(job: Job, run_dir: str) -> int:
    from rdpo.config import to_toml
    from rdpo.execution.pipeline import planned
    from rdpo.stages.checks import check_named
    from rdpo.stages.table import stages_of

    check_named(job)
    print(visible(to_toml(job)))
    if job.rounds.count > 1:
        from rdpo.execution.reader import round_dir
        from rdpo.experiments.rounds import job_of_round

        # What the next round starts from is only known once this one is made.
        print(f"# round 1 of {job.rounds.count}")
        job, run_dir = job_of_round(job, 1, [job.student.model]), round_dir(run_dir, 1)
    for name, state in planned(job, run_dir, stages_of(job)).items():
        print(f"# {name:<12}{state}")
    if job.fits_types and job.annotators:
        print(f"# then {job.annotators.work}")
    return 0


def stage(options: argparse.Namespace) -> int:
    """Bring one stage of a run up to date."""
    from rdpo.api import execute
    from rdpo.execution.reader import job_of_run

    job = job_of_run(options.run_dir)
    _check_one_run(job, options.run_dir, options.stage)
    execute(job, options.run_dir, only=options.stage)
    return 0


def prove(options: argparse.Namespace) -> int:
    """Measure start model and trained model on suites of other prompts, and print what was found."""
    from rdpo.api import execute
    from rdpo.config import SUITE_KINDS, Suite
    from rdpo.evaluation.suites.findings import table
    from rdpo.execution.reader import RunReader

    run = RunReader(options.run_dir)
    _check_one_run(run.job, options.run_dir)
    job = run.job
    if options.kinds or not job.suites:
        suites = [Suite(kind=kind) for kind in dict.fromkeys(options.kinds or SUITE_KINDS)]
        job = job.model_copy(update={"suites": suites})
    execute(job, options.run_dir, only="suites")
    print("\n".join(map(visible, table(run.require("suites").summary["findings"]))))
    return 0


def _check_one_run(job: Job, run_dir: str, stage: str | None = None) -> None:
    """Whether a directory holds a single run, or a job's several runs have this stage in common."""
    from rdpo.stages.table import names_of

    if job.rounds.count > 1:
        raise InputError(f"{run_dir}: holds several rounds; name one of them, as in {run_dir}/rounds/1")
    if job.fits_types and stage not in names_of(job):
        raise InputError(f"{run_dir}: holds several types of annotators; name one of them, as in {run_dir}/types/1")


def submit(options: argparse.Namespace) -> int:
    """Send a job to a Ray cluster."""
    from rdpo.cluster.submission import submit as send
    from rdpo.config import load_job
    from rdpo.files.stores import is_remote

    job = load_job(options.job, options.overrides)
    if not (is_remote(options.run_dir) or os.path.isabs(options.run_dir)):
        where = "s3://… or an absolute path on a shared disk"
        raise InputError(f"--run-dir {options.run_dir}: it would go with the job; give {where}")
    name = options.id or f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    changes = list(chain.from_iterable(("--set", override) for override in options.overrides))
    extent = ["--until", options.until] * bool(options.until) + ["--fresh"] * options.fresh
    send(options.address, name, [options.job, "--run-dir", options.run_dir, *changes, *extent], options.runtime_env)
    print(f"job:  {name}")
    for title, command in (("logs", "logs --follow"), ("stop", "stop")):
        print(f"{title}: RAY_AUTH_MODE=token ray job {command} --address {options.address} {name}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Run the arms of a comparison and hold them against each other."""
    from rdpo.cluster.connection import ray_stopped_after
    from rdpo.config.comparison import Part
    from rdpo.experiments.comparison import check_heldout, compare_arms, load_comparison, run_arms
    from rdpo.tracking.console import run_console

    comparison, jobs = load_comparison(options.comparison, Part(options.arms, options.values, options.until))
    options.run_dir = options.run_dir or os.path.join("runs", comparison.name)
    if options.dry_run:
        from rdpo.experiments.foreseen import foreseen, totals

        runs = foreseen(comparison, jobs, options.run_dir, options.seeds)
        print("\n".join([*map(visible, map(str, runs)), totals(runs)]))
        return 0
    with run_console(options.run_dir) as console, ray_stopped_after():
        if options.seeds:
            # Other commands may be at work on the other seeds, so there is no table yet.
            check_heldout(comparison, jobs, options.run_dir, console, options.seeds)
            run_arms(comparison, jobs, options.run_dir, console, options.seeds)
            console.say("\nthe table: the same command without --seed, once all seeds are done")
        else:
            compare_arms(comparison, jobs, options.run_dir, console)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the report of a run."""
    from rdpo.execution.reader import job_of_run
    from rdpo.report.report import write_report

    _check_one_run(job_of_run(options.run_dir), options.run_dir)
    print(write_report(options.run_dir))
    return 0


def show(options: argparse.Namespace) -> int:
    """Print rows of a stage."""
    from rdpo.inspection.show import show_rows

    show_rows(options.run_dir, options.stage, options.row, options.limit, options.dropped, options.logps)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a run's pairs or answers for other programs."""
    from rdpo.inspection.export import export

    for line in export(options.run_dir, options.what, options.target):
        print(visible(line))
    return 0


def review(options: argparse.Namespace) -> int:
    """Write a run's pairs for people to judge."""
    from rdpo.inspection.review import ASKED, write_review

    print(visible(write_review(options.run_dir, options.target, options.limit, options.question or ASKED)))
    return 0


def reviewed(options: argparse.Namespace) -> int:
    """Write what people said of a run's pairs as a preference data set."""
    from rdpo.inspection.review import read_review, write_pairs

    found = read_review(options.run_dir, options.records)
    for line in found.lines():
        print(visible(line))
    write_pairs(found, options.target)
    print(visible(f"{len(found.rows)} pairs -> {options.target}"))
    return 0


def harness(options: argparse.Namespace) -> int:
    """Print what both models score in tasks of lm-evaluation-harness."""
    from rdpo.inspection.harness import changes, table

    found = changes(options.run_dir, options.tasks, options.include, options.limit, options.chat)
    for line in table(found):
        print(visible(line))
    return 0


def push(options: argparse.Namespace) -> int:
    """Put a run's model or pairs on the Hugging Face hub."""
    from rdpo.inspection.hub import push

    print(visible(push(options.run_dir, options.what, options.repository, options.public)))
    return 0


def status(options: argparse.Namespace) -> int:
    """Print how far a run has come."""
    from rdpo.inspection.status import as_json, as_text, statuses

    for found in statuses(options.run_dir):
        for line in [as_json(found)] if options.json else as_text(found):
            print(visible(line))
    return 0


def watch(options: argparse.Namespace) -> int:
    """Serve the live page of a run, or of two, until it is interrupted."""
    # The one command that is meant to be ended so.
    with suppress(KeyboardInterrupt):
        from rdpo.report.server import WatchServer
        from rdpo.report.site import site_of

        with WatchServer(site_of(options.run_dirs), options.host, options.port) as server:
            print(visible(f"{server.url}  (Ctrl-C ends it)"), flush=True)
            server.serve_forever()
    return 0


def diff(options: argparse.Namespace) -> int:
    """Print what differs between two runs."""
    from rdpo.execution.reader import job_of_run
    from rdpo.inspection.diff import diff_runs

    for run_dir in options.run_dirs:
        _check_one_run(job_of_run(run_dir), run_dir)
    for line in diff_runs(tuple(options.run_dirs)):
        print(visible(line))
    return 0


def chat(options: argparse.Namespace) -> int:
    """Talk to the start model and the trained model of a run."""
    from rdpo.inspection.chat import chat_with

    chat_with(options.run_dir)
    return 0


def init(options: argparse.Namespace) -> int:
    """Write a first job file."""
    from rdpo.cli.init import QUESTIONS, write_job

    given = {question.name: getattr(options, question.name) for question in QUESTIONS}
    for line in write_job(Path(options.file), given, options.yes):
        print(visible(line))
    return 0


def plan(options: argparse.Namespace) -> int:
    """Print where a job runs, what that costs, and the memory and speed of its training."""
    from rdpo.cluster.placement import placement_table
    from rdpo.config import load_job
    from rdpo.stages.pools import pools_of

    job = load_job(options.job, options.overrides)
    lines = (
        _power(job, options.power)
        if options.power is not None
        else chain(placement_table(pools_of(job)), _costs(job, options), _training(job, options))
    )
    for line in lines:
        print(visible(line))
    return 0


def _power(job: Job, effect: float) -> Iterator[str]:
    from rdpo.planning.power import power_lines

    yield from power_lines(job, effect)


def _costs(job: Job, options: argparse.Namespace) -> Iterator[str]:
    from rdpo.planning.costs import cost_table, load_prices, load_rates

    if options.prices and not options.rates:
        raise InputError("--prices: dollars need hours; give --rates, a finished smaller run or rows a second by stage")
    if options.rates:
        prices = load_prices(options.prices) if options.prices else {}
        yield ""
        yield from cost_table(job, options.prompts, load_rates(options.rates), prices)


def _training(job: Job, options: argparse.Namespace) -> Iterator[str]:
    from rdpo.planning.plan import plan
    from rdpo.training.loop import PairTable

    sizes = PairTable.load(options.lengths_from).sizes if options.lengths_from else ()
    yield ""
    yield from plan(job, options.gpu, options.workers, sizes, options.network)


def schema(options: argparse.Namespace) -> int:
    """Print the JSON schema of a kind of file."""
    from rdpo.config.schema import schema_text

    print(schema_text(options.kind), end="")
    return 0


def completion(options: argparse.Namespace) -> int:
    """Print what makes a shell complete the command line."""
    import shtab

    print(shtab.complete(options.parser, options.shell))
    return 0


def env(options: argparse.Namespace) -> int:
    """Print versions and devices."""
    from rdpo.cluster.installed import environment

    for name, value in environment().items():
        print(f"{name:<14}{value}")
    return 0
