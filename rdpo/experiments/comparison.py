"""Several ways to align one model, held against each other: each arm is a base job with changes of its own.

Every arm and seed has a run directory; a stage that an earlier one has made with the same settings on the same
inputs is taken over from there, not made again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rdpo.config import Job, check_kind, explained, job_of, read_tables
from rdpo.config.comparison import Comparison, Part
from rdpo.errors import InputError
from rdpo.execution.pipeline import locked, run_stages
from rdpo.execution.reader import RunReader
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.experiments.measured import Measured, added_up, comparable, from_the_first, left_out, rivals_of, runs_of
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest
from rdpo.files.stores import absolute
from rdpo.records import HELDOUT, ID_COLUMN, Row, prompt_id, rows_of
from rdpo.stages.checks import prepare
from rdpo.stages.evaluation import heldout_prompts
from rdpo.stages.table import stages_of
from rdpo.tracking.console import Console

Jobs = dict[tuple[str, int], Job]
"""The job of each arm and seed."""


def load_comparison(path: str | Path, part: Part | None = None) -> tuple[Comparison, Jobs]:
    """A comparison file, or a part of it, and the job of each of its arms and seeds.

    Raises:
        InputError: the file or its base job is missing or wrong, an arm's changes are, or there is no such part.
    """
    path = Path(path)
    content = read_tables(path)
    check_kind(content, "comparison", path)
    try:
        comparison = Comparison.model_validate(content)
    except ValidationError as error:
        raise InputError(explained(path, error)) from None
    if part:
        comparison = comparison.of(part)

    base = path.parent / comparison.job
    table = read_tables(base)
    jobs: Jobs = {}
    for variant in comparison.variants:
        for seed in comparison.seeds:
            own = {"seed": seed, "name": run_name(str(variant), seed)}
            job = job_of({**variant.of(table, comparison), **own}, f"{path}: arm {variant}")
            if job.rounds.count > 1 and comparison.until != "evaluation":
                raise InputError(
                    f"{path}: arm {variant}: each of several rounds has pairs of its own, so that arms are compared by "
                    'their answers; set until = "evaluation"'
                )
            if variant.arm in comparison.controls:
                _check_control(job, f"{path}: arm {variant}")
            if job.fits_types:
                raise InputError(f"{path}: arm {variant}: types of annotators are run by `rdpo run`, not compared")
            if job.prompts.made and job.prompts.made.seed is None and len(comparison.seeds) > 1:
                raise InputError(
                    f"{path}: arm {variant}: every seed would make prompts of its own, so that the seeds could not be "
                    "compared; give prompts.made.seed"
                )
            jobs[str(variant), seed] = job

    _check_directories(jobs, str(path))
    if comparison.until == "evaluation":
        _check_rewards(jobs, str(path))
    return comparison, jobs


def _check_control(job: Job, where: str) -> None:
    """Whether sides that are drawn stay so; a filter by scores leaves out the pairs that were turned round."""
    pairs = job.pairs
    bounds = {"min_gap": pairs.min_gap, "max_gap": pairs.max_gap, "min_score": pairs.min_score}
    if pairs.flip and (found := [name for name, bound in bounds.items() if bound is not None]):
        raise InputError(
            f"{where}: pairs.flip turns pairs round before pairs.{found[0]} looks at them, which then leaves them out, "
            "so that the control would train on right pairs; set pairs.random_sides = true instead"
        )


def run_name(arm: str, seed: int) -> str:
    """Name of the run of one arm and seed, and of its directory."""
    return f"{arm.replace('@', '-')}-{seed}"


def _check_directories(jobs: Jobs, path: str) -> None:
    """Whether every run has a directory of its own."""
    owners: dict[str, tuple[str, int]] = {}
    for run in jobs:
        name = run_name(*run)
        if name in owners:
            arms = f"{owners[name][0]} and {run[0]}"
            raise InputError(f"{path}: arms {arms} would share the directory arms/{name}; give them other names")
        owners[name] = run


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
    # Each arm may weigh a reward as it likes; what it measures must be the same.
    return {reward.name: {**reward.model_dump(), "weight": None} for reward in job.rewards}


def arm_dir(run_dir: str, arm: str, seed: int) -> str:
    """Run directory of one arm and seed."""
    return os.path.join(run_dir, "arms", run_name(arm, seed))


def run_arms(
    comparison: Comparison, jobs: Jobs, run_dir: str, console: Console, seeds: Collection[int] | None = None
) -> None:
    """Bring every arm up to date with all its seeds, or with some.

    Other commands may do so at the same time with other seeds of the same comparison.

    Raises:
        InputError: a seed is none of the comparison's.
    """
    check_seeds(comparison, seeds)
    runs = runs_in(jobs, run_dir)
    for one in runs:
        if seeds is None or one.seed in seeds:
            console.say(f"\n{one.label}, seed {one.seed}")
            with _driven(one, jobs[one.arm, one.seed], runs, console) as run:
                run_stages(run, stages_of_round(one, comparison.until))


def runs_in(jobs: Jobs, run_dir: str) -> list[Measured]:
    """The runs of all arms and seeds, in the order in which they are made, in the comparison's directory."""
    made = []
    for (arm, seed), job in jobs.items():
        made += runs_of(arm, seed, job, absolute(arm_dir(run_dir, arm, seed)))
    return made


def stages_of_round(run: Measured, until: str) -> list[Stage]:
    """The stages of a run: all of them where another round goes on from its model."""
    return list(stages_of(run.job) if run.number < run.rounds else stages_until(run.job, until))


def check_seeds(comparison: Comparison, seeds: Collection[int] | None) -> None:
    """Look whether these seeds are the comparison's.

    Raises:
        InputError: one is not.
    """
    if unknown := set(seeds or ()) - set(comparison.seeds):
        raise InputError(f"--seed {min(unknown)}: the comparison's seeds are {', '.join(map(str, comparison.seeds))}")


@contextmanager
def _driven(run: Measured, job: Job, runs: Collection[Measured], console: Console) -> Iterator[Run]:
    """One run of the comparison, held by this driver; what the others have made it may take over.

    `job` is the arm's, of which the run may be a round.
    """
    siblings = tuple(other.folder for other in runs if other.folder != run.folder)
    with ExitStack() as holding:
        if run.rounds > 1:
            # The arm's directory is that of a run with rounds, as `rdpo run` makes it.
            holding.enter_context(locked(job, run.home, say=console.say))
        check = holding.enter_context(locked(run.job, run.folder, say=console.say))
        yield Run(run.job, run.folder, console, prepare, siblings, stages=stages_of(run.job), check=check)


def check_heldout(
    comparison: Comparison, jobs: Jobs, run_dir: str, console: Console, seeds: Collection[int] | None = None
) -> None:
    """Bring the prompts of every run up to date, and look whether all are evaluated on the same ones.

    Raises:
        InputError: they are not, so that the runs could not be compared.
    """
    if comparison.until != "evaluation":
        return

    found: dict[tuple[str, int], set[str]] = {}
    runs = runs_in(jobs, run_dir)
    for one in runs:
        # Later rounds have the prompts of the first.
        if one.number > 1 or (seeds is not None and one.seed not in seeds):
            continue
        console.say(f"\nprompts of {one.arm}, seed {one.seed}")
        with _driven(one, jobs[one.arm, one.seed], runs, console) as run:
            run_stages(run, list(stages_until(one.job, "prompts")))
            found[one.arm, one.seed] = set(heldout_prompts(run).ids().to_pylist())
    # Only prompts have been made so far, in minutes; the arms may take days.
    _check_same(found)


def _check_same(heldout: Mapping[tuple[str, int], Collection[str]]) -> None:
    (first, of_first), *others = ((run, {*ids}) for run, ids in heldout.items())
    for run, ids in others:
        if ids != of_first:
            names = [f"{arm} (seed {seed})" for arm, seed in (first, run)]
            raise InputError(
                f"comparison: {names[0]} would be evaluated on {len(of_first)} held-out prompts and {names[1]} on "
                f"{len(ids)}, of which {len(of_first & ids)} are the same; give all arms the same prompts, templates, "
                "system message and evaluation.limit, or the source a `split` column"
            )


def compare_arms(comparison: Comparison, jobs: Jobs, run_dir: str, console: Console) -> None:
    """Run all arms; print the tables, write them as CSV and as a report."""
    from rdpo.evaluation import retention
    from rdpo.experiments import arms, heldout
    from rdpo.experiments.comparison_report import write_comparison
    from rdpo.experiments.controls import control_lines
    from rdpo.training.trainer import heldout_margins

    check_heldout(comparison, jobs, run_dir, console)
    run_arms(comparison, jobs, run_dir, console)

    runs = runs_in(jobs, run_dir)
    rivals = rivals_of(comparison, runs)
    readers = {run: RunReader(run.folder, run.job) for run in runs}
    made = {run: _finished(reader, comparison.until) for run, reader in readers.items()}
    answered = {run: _rows(readers[run], "evaluation") for run in runs if "evaluation" in made[run]}
    evaluated = dict(from_the_first(answered))
    found = arms.arm_results(evaluated, comparable(runs), rivals) if evaluated else []

    # An arm that trains nothing measures no margins; the rounds of one measure those of other pairs.
    alone = [run for run in runs if "training" in made[run] and run.rounds == 1]
    left = {run: heldout_margins(readers[run].folder("training")) for run in alone}
    margins = {(run.label, run.seed): of_run for run, of_run in left.items() if of_run}
    prompts = _prompts_of_pairs(readers[next(run for run in alone if left[run])]) if margins else {}
    selected = {run.label for run in runs if run.job.training.select == "best"}
    measured = heldout.heldout_results(margins, rivals, prompts, selected)

    texts = {run: _rows(readers[run], "retention") for run in runs if "retention" in made[run]}
    lost = dict(added_up(texts))
    lines = arms.coverage("prompts", {run: _ids(rows) for run, rows in evaluated.items()})
    lines += arms.coverage("pairs", {run: list(of_run) for run, of_run in margins.items()})
    lines += left_out(runs)
    lines += arms.table(found, comparison.baseline) + heldout.table(measured, comparison.baseline)
    lines += retention.table(lost)
    controls = list(control_lines(comparison, found, measured))
    for line in [*lines, *([""] if controls else []), *controls]:
        console.say(line)

    if found:
        Folder(run_dir).write_bytes("comparison.csv", arms.to_csv(found).encode())
    if measured:
        Folder(run_dir).write_bytes("heldout.csv", heldout.to_csv(measured).encode())
    console.say(f"\nreport      {write_comparison(run_dir, comparison, found, measured, controls)}")


def _rows(run: RunReader, stage: str) -> list[Row]:
    rows: list[Row] = run.folder(stage).table().to_pylist()
    return rows


def _finished(run: RunReader, until: str) -> dict[str, Manifest]:
    return run.finished(stage.name for stage in stages_until(run.job, until))


def _ids(rows: list[Row]) -> list[str]:
    return [row[ID_COLUMN] for row in rows]


def _prompts_of_pairs(run: RunReader) -> dict[str, str]:
    """Which prompt each held-out pair belongs to, by the pair's id."""
    rows = rows_of(run.folder("pairs").tables(columns=[ID_COLUMN, "prompt", HELDOUT]))
    return {row[ID_COLUMN]: prompt_id(row["prompt"]) for row in rows if row[HELDOUT]}


def stages_until(job: Job, until: str) -> Iterator[Stage]:
    """The stages of a job, up to one."""
    for stage in stages_of(job):
        yield stage
        if stage.name == until:
            return
