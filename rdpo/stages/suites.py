"""Suites: further prompts on which start model and trained model are measured without a judge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rdpo.errors import InputError, named
from rdpo.execution.stage import Reads, Stage
from rdpo.records import HELDOUT, ID_COLUMN, Row, alive, rows_of, table_of
from rdpo.stages.settings import rendering_of_student, student_settings

if TYPE_CHECKING:
    from rdpo.config import Job, Suite
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter

MEASURED = 2
"""How answers are measured: it goes up when other values are read off the same ones."""


def settings(job: Job) -> Settings:
    """Settings of the suites stage, with the content of their sources."""
    from rdpo.evaluation.suites.rows import SAMPLING
    from rdpo.modeling.weights import ModelRef
    from rdpo.synthesis.engine import engine_settings

    return {
        "suites": [{**suite.model_dump(), "content": _content(job, suite)} for suite in job.suites],
        "sampling": SAMPLING.model_dump(),
        "measured": MEASURED,
        "engine": engine_settings(job.evaluation.engine, ModelRef.student(job)),
        "system": job.prompts.system,
        "max_prompt_tokens": job.prompts.max_prompt_tokens,
        "student": student_settings(job),
        **rendering_of_student(job),
        "seed": job.seed,
    }


def _content(job: Job, suite: Suite) -> str:
    from rdpo.evaluation.suites.rows import suite_source
    from rdpo.synthesis.sources import content_hash

    prompts, reading = suite_source(job, suite)
    with named(reading.setting):
        return content_hash(prompts.name)


def measure_suites(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """Both models' answers to the prompts of the suites, and what is read off them.

    Raises:
        InputError: no prompt of a suite can be used.
    """
    import ray.data

    from rdpo.evaluation.suites.findings import findings
    from rdpo.evaluation.suites.kinds import KINDS
    from rdpo.evaluation.suites.rows import answered, measured, suite_rows
    from rdpo.files.rows import write_rows
    from rdpo.training.checkpoint import MERGED

    folder.clear_parts()
    trained_on = list(_trained_on(run))
    rows: list[Row] = []
    for suite in run.job.suites:
        of_suite = suite_rows(run.job, suite, trained_on)
        if not any(map(alive, of_suite)):
            reason = of_suite[0]["dropped"] if of_suite else "it is empty"
            raise InputError(f"suites.{suite.named}: no usable prompt; {reason}")
        rows += of_suite

    usable = [row for row in rows if alive(row)]
    answers = answered(usable, run.job, run.folder("policy").address(MERGED))
    kinds = {suite.named: KINDS[suite.kind] for suite in run.job.suites}
    done = [measured(row, kinds[row["suite"]]) for row in [*answers, *(row for row in rows if not alive(row))]]
    write_rows(
        ray.data.from_arrow(table_of(done)), folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped)
    )

    kept = list(rows_of(folder.tables()))
    found = []
    for suite in run.job.suites:
        found += findings(suite, [row for row in kept if row["suite"] == suite.named])
    return {"rows_in": len(rows), "findings": found}


def _trained_on(run: Run) -> Iterator[str]:
    """The words of the prompts that the run was trained on."""
    from rdpo.evaluation.suites.kinds import asked

    for row in rows_of(run.folder("prompts").tables(columns=["split", "prompt"])):
        if row["split"] != HELDOUT:
            yield asked(row)


STAGE = Stage(
    "suites",
    inputs=("prompts", "policy"),
    settings=settings,
    execute=measure_suites,
    reads={"prompts": Reads(columns=(ID_COLUMN, "split", "prompt")), "policy": Reads(below="merged/")},
    unit="prompts",
    wanted=lambda job: bool(job.suites),
)
