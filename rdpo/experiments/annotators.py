"""Types of annotators who disagree: a policy for each type, and which type each annotator is of (EM-DPO, 2405.15065).

The stages up to the reference are made once, in the run's directory. Then, step by step, a policy is trained for each
type from the start model, each row weighed by how far its annotator is of that type (the M step), and who is of which
type is found anew by how likely each policy makes each row's order (the E step, `rdpo.experiments.responsibilities`).
The policies of the last step are evaluated and published, each in a run of its own in `types/K`.

Every training is a run of its own in `steps/STEP-TYPE`, which takes over the stages that all have in common. Nothing
is noted of how far the steps have come: each is known by its settings and weights, and those follow from the one before
it, so that the same command goes on where it was ended, to the same responsibilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdpo.config import Annotators, Job
from rdpo.errors import InputError
from rdpo.evaluation.intervals import Estimate, groups_of, mean_interval, with_interval
from rdpo.execution.lock import Check
from rdpo.execution.pipeline import locked, run_stages
from rdpo.execution.reader import STEPS, RunReader, step_dir, type_dir
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.experiments.comparison import stages_until
from rdpo.experiments.responsibilities import (
    Expectation,
    Floats,
    Integers,
    doubt,
    expectation,
    first_responsibilities,
    row_weights,
    shares,
)
from rdpo.files.folder import Folder
from rdpo.records import ID_COLUMN, Row, annotator_of, extra_of, rows_of
from rdpo.stages.checks import prepare
from rdpo.stages.table import stages_of
from rdpo.tracking.console import Console
from rdpo.training.row_weights import write_weights

UNSURE = 0.9
"""Share of the largest possible entropy from which on the annotators' types count as not told apart."""
ONE_ROW = (
    "annotators: there are only pairs, and one of each annotator. Two opposed types explain these as well as a coin "
    "does, whatever they prefer, so the types cannot be told apart; give groups of three answers or more "
    "(pairs.others), or several rows of each annotator"
)


@dataclass(frozen=True)
class AnnotatedRows:
    """The rows that are trained on, in the order of their ids, and whose they are.

    `owners` has the number of each row's annotator, its place in `annotators`, which are in alphabetical order.
    """

    ids: Sequence[str]
    annotators: Sequence[str]
    owners: Integers
    has_groups: bool

    @classmethod
    def of(cls, run: RunReader, column: str) -> AnnotatedRows:
        """Those of a run whose reference stage is done."""
        from rdpo.training.loop import PairTable

        data = PairTable.load(run.dir)
        ids: list[str] = data.table[ID_COLUMN].to_pylist()
        known = annotators_of(run, column)
        names = sorted({known[name] for name in ids})
        numbers = {name: number for number, name in enumerate(names)}
        owners = np.array([numbers[known[name]] for name in ids], dtype=np.int64)
        return cls(ids, names, owners, data.has_groups)

    @property
    def only_single_pairs(self) -> bool:
        """Whether each annotator has one row, and each row two answers."""
        return not self.has_groups and len(self.ids) == len(self.annotators)


def annotators_of(run: RunReader, column: str) -> dict[str, str]:
    """Whose each prompt of a run is, by its id; empty of a held-out one that names nobody."""
    rows = rows_of(run.folder("prompts").tables(columns=[ID_COLUMN, "extra"]))
    return {row[ID_COLUMN]: annotator_of(extra_of(row), column) for row in rows}


@dataclass(frozen=True)
class Fitted:
    """What the last step found: the policies' number of step, and whose type is which.

    `responsibilities` (annotator, type) are by the policies; `single` is the log-likelihood of one policy for all.
    """

    step: int
    rows: AnnotatedRows
    responsibilities: Floats
    log_likelihood: float
    single: float


def run_annotators(job: Job, run_dir: str, console: Console, check: Check = lambda: None) -> None:
    """Bring all steps and types up to date.

    `check` asks whether the run directory is still this driver's.

    Raises:
        InputError: there are fewer annotators than types.
    """
    fitted = fit_types(job, run_dir, console, check)
    runs = [_published(job, run_dir, fitted, number, console) for number in _numbers(job)]
    console.conclude("")
    for number, run in zip(_numbers(job), runs, strict=True):
        for line in _result(fitted, number, run):
            console.conclude(line)
        console.tell("result", type=number, model=run.folder("model").address())


def fit_types(job: Job, run_dir: str, console: Console, check: Check = lambda: None) -> Fitted:
    """The stages that all types have in common, then step after step until the responsibilities stay.

    Raises:
        InputError: there are fewer annotators than types.
    """
    from rdpo.report.report import ReportSoFar

    settings, stages = _settings(job), stages_of(job)
    run = Run(job, run_dir, console, prepare, on_stage=ReportSoFar(), stages=stages, check=check)
    run_stages(run, stages)
    rows = AnnotatedRows.of(run, settings.column)
    _check_rows(rows, settings, console)

    console.say("\none policy for all annotators")
    single = float(_row_logps(job, run_dir, 0, 1, rows, np.ones(len(rows.ids)), console).sum())
    before = first_responsibilities(len(rows.annotators), settings.types, job.seed)
    for step in range(1, settings.steps + 1):
        found = _step(job, run_dir, step, rows, before, console)
        moved = float(np.abs(found.responsibilities - before).max())
        check()
        _write(run_dir, step, rows, found, before, single, moved)
        _say_step(console, step, found, single, moved)
        before = found.responsibilities
        if moved <= settings.tolerance:
            break

    fitted = Fitted(step, rows, found.responsibilities, found.log_likelihood, single)
    for warning in _doubts(fitted):
        console.warn(warning)
    return fitted


def _settings(job: Job) -> Annotators:
    if job.annotators is None:
        raise InputError("annotators: the job has no such table")
    return job.annotators


def _numbers(job: Job) -> range:
    """The types, from 1."""
    return range(1, _settings(job).types + 1)


def _check_rows(rows: AnnotatedRows, settings: Annotators, console: Console) -> None:
    count = len(rows.annotators)
    if count < settings.types:
        raise InputError(
            f"annotators: {count} in the rows that are trained on, and types = {settings.types}; give rows of more "
            f"annotators, or fewer types (column {settings.column!r})"
        )
    console.say(f"\n{len(rows.ids)} rows of {count} annotators, {settings.types} types")
    if rows.only_single_pairs:
        console.warn(ONE_ROW)


def _step(job: Job, run_dir: str, step: int, rows: AnnotatedRows, before: Floats, console: Console) -> Expectation:
    """One M step and the E step after it."""
    weights = row_weights(before, rows.owners)
    columns = []
    for number in _numbers(job):
        console.say(f"\nstep {step}, type {number}")
        columns.append(_row_logps(job, run_dir, step, number, rows, weights[:, number - 1], console))
    return expectation(np.stack(columns, axis=1), rows.owners, shares(before), len(rows.annotators))


def _row_logps(
    job: Job, run_dir: str, step: int, number: int, rows: AnnotatedRows, weights: Floats, console: Console
) -> Floats:
    """log-likelihood (row,) of the order of each row under the policy that is trained with these weights."""
    from rdpo.training.trainer import row_losses

    known = dict(zip(rows.ids, weights.tolist(), strict=True))
    address = write_weights(Folder(f"{run_dir}/{STEPS}"), f"{step}-{number}.jsonl", known)
    folder, of_type = step_dir(run_dir, step, number), _job_of(job, f"{step}-{number}", address)
    with locked(of_type, folder, say=console.say) as check:
        stages = list(stages_until(of_type, "training"))
        run = _run(of_type, folder, (run_dir,), stages, console, check)
        run_stages(run, stages)
    losses = row_losses(run.folder("training"))
    return -np.array([losses[name] for name in rows.ids])


def _job_of(job: Job, suffix: str, weights: str) -> Job:
    """The job of one policy that is trained with these weights of rows."""
    training = job.training.model_copy(update={"row_weights": weights})
    return job.model_copy(update={"name": f"{job.name}-{suffix}", "training": training})


def _run(
    job: Job, folder: str, siblings: Sequence[str], stages: Sequence[Stage], console: Console, check: Check
) -> Run:
    return Run(job, folder, console, prepare, siblings, stages=stages, check=check)


def _published(job: Job, run_dir: str, fitted: Fitted, number: int, console: Console) -> Run:
    """The run of one type: the last step's policy, evaluated and published."""
    from rdpo.report.report import headline, write_report

    console.say(f"\ntype {number}")
    folder = type_dir(run_dir, number)
    # The start model's answers to the held-out prompts are the same for all types.
    others = (type_dir(run_dir, other) for other in _numbers(job) if other != number)
    siblings = (step_dir(run_dir, fitted.step, number), run_dir, *others)
    weights = Folder(f"{run_dir}/{STEPS}").address(f"{fitted.step}-{number}.jsonl")
    of_type = _job_of(job, f"type-{number}", weights)
    with locked(of_type, folder, say=console.say) as check:
        stages = stages_of(of_type)
        run = _run(of_type, folder, siblings, stages, console, check)
        run_stages(run, stages)
        path = write_report(folder)
    for line in [*headline(folder), f"report      {path}"]:
        console.say(line)
    return run


def _write(
    run_dir: str, step: int, rows: AnnotatedRows, found: Expectation, before: Floats, single: float, moved: float
) -> None:
    """Write down what a step found, whole or not at all."""
    what = {
        "step": step,
        "log_likelihood": found.log_likelihood,
        "log_likelihood_of_one_policy": single,
        "moved": moved,
        "shares_in_training": shares(before).tolist(),
        "shares": shares(found.responsibilities).tolist(),
        "annotators": list(rows.annotators),
        "responsibilities": found.responsibilities.tolist(),
    }
    Folder(f"{run_dir}/{STEPS}").write_json(f"{step}.json", what)


def _say_step(console: Console, step: int, found: Expectation, single: float, moved: float) -> None:
    eta = shares(found.responsibilities)
    console.say(
        f"\nstep {step}: log-likelihood {found.log_likelihood:.2f} of all orders (one policy for all: {single:.2f}); "
        f"shares {', '.join(f'{share:.2f}' for share in eta)}; an annotator moved by at most {moved:.3f}"
    )
    console.tell(
        "em_step", step=step, log_likelihood=found.log_likelihood, single=single, shares=eta.tolist(), moved=moved
    )


def _doubts(fitted: Fitted) -> Iterator[str]:
    """Why the types may be none, as warnings."""
    if fitted.log_likelihood <= fitted.single:
        yield (
            f"annotators: the types' log-likelihood {fitted.log_likelihood:.2f} is not above that of one policy for "
            f"all, {fitted.single:.2f}: these rows show no types"
        )
    unsure = doubt(fitted.responsibilities)
    if unsure > UNSURE:
        yield (
            f"annotators: the mean entropy of who is of which type is {unsure:.2f} of its largest value: the types are "
            "not told apart"
        )
    if fitted.rows.only_single_pairs:
        yield ONE_ROW


def _result(fitted: Fitted, number: int, run: RunReader) -> Iterator[str]:
    """What came of a type, in lines of text."""
    eta = shares(fitted.responsibilities)[number - 1]
    likeliest = fitted.responsibilities.argmax(1) == number - 1
    count = len(fitted.rows.annotators)
    yield f"type {number}      share {eta:.2f}, the likeliest type of {likeliest.sum()} of {count} annotators"
    if line := _own_prompts(fitted, likeliest, run):
        yield f"{'':<12}{line}"
    yield f"{'':<12}model {run.folder('model').address()}"


def _own_prompts(fitted: Fitted, likeliest: NDArray[np.bool_], run: RunReader) -> str:
    """What a type's policy gained on the held-out prompts of its annotators; empty where there are none.

    Prompts of annotators of another taste say nothing of it.
    """
    own = {name for name, is_own in zip(fitted.rows.annotators, likeliest, strict=True) if is_own}
    known = annotators_of(run, _settings(run.job).column)
    evaluated = run.folder("evaluation")
    if not (run.job.rewards and evaluated.parts()):
        return ""

    rows: list[Row] = evaluated.table().sort_by(ID_COLUMN).to_pylist()
    rows = [row for row in rows if known.get(row[ID_COLUMN]) in own]
    if not rows:
        return "held-out prompts of its annotators: none"
    gains = np.array([row["trained_score"] - row["start_score"] for row in rows])
    gain: Estimate = mean_interval(gains, groups_of(rows))
    moved = with_interval(gain, "+.3f")
    return f"held-out prompts of its annotators: {len(rows)}, on which the reward moved by {moved}"
