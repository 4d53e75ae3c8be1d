"""Retention: how much likelihood texts that the training is not about have lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdpo.errors import InputError, named
from rdpo.execution.stage import Reads, Stage
from rdpo.records import ID_COLUMN, alive
from rdpo.stages.settings import rendering_of_student

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter


def settings(job: Job) -> Settings:
    """Settings of the retention stage, with the content of its source."""
    from rdpo.evaluation.retention import SOURCE
    from rdpo.synthesis.sources import content_hash

    if job.retention is None:
        return {}
    system: dict[str, Any] = {"system": job.prompts.system, "max_prompt_tokens": job.prompts.max_prompt_tokens}
    system |= rendering_of_student(job)
    with named(SOURCE):
        content = content_hash(job.retention.source)
    return {**job.retention.model_dump(), **system, "content": content}


def measure_retention(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """How much likelihood other texts have lost; says so.

    Raises:
        InputError: none of them can be used.
    """
    from rdpo.evaluation.retention import SOURCE, measured, summary, texts
    from rdpo.files.rows import write_rows
    from rdpo.training.checkpoint import MERGED

    if run.job.retention is None:
        raise RuntimeError("a job without [retention] has no such stage")
    folder.clear_parts()
    rows = texts(run.job, run.job.retention)
    if not any(map(alive, rows)):
        raise InputError(f"{SOURCE}: no usable conversation in {run.job.retention.source}; {rows[0]['dropped']}")
    trained = run.folder("policy").address(MERGED)
    write_rows(
        measured(rows, run.job, trained), folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped)
    )
    facts = summary(folder.table().sort_by(ID_COLUMN).to_pylist())
    factor = facts["perplexity_factor"]
    interval = f"{factor['low']:.3f} to {factor['high']:.3f}"
    run.console.say(f"{'':<12}perplexity of {facts['texts']} other texts: {factor['mean']:.3f} times ({interval})")
    return {"rows_in": len(rows), **facts}


STAGE = Stage(
    "retention",
    inputs=("policy",),
    settings=settings,
    execute=measure_retention,
    reads={"policy": Reads(below="merged/")},
    unit="texts",
    wanted=lambda job: job.retention is not None,
)
