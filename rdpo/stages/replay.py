"""Replay: ready pairs of another source, mixed into the generated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdpo.errors import named
from rdpo.execution.stage import Stage
from rdpo.records import HELDOUT, ID_COLUMN, QUESTION
from rdpo.stages.settings import rendering_of_student

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter

DRAWN = 2
"""How the mix is drawn: it goes up when other pairs come out of the same ones."""


def settings(job: Job) -> Settings:
    """Settings of the replay stage, with the content of its source."""
    from rdpo.modeling.weights import ModelRef
    from rdpo.preference.replay import SOURCE
    from rdpo.synthesis.sources import content_hash

    if job.replay is None:
        return {}
    system: dict[str, Any] = {"system": job.prompts.system, "max_prompt_tokens": job.prompts.max_prompt_tokens}
    system |= rendering_of_student(job) | {"tokenizer": ModelRef.student(job).tokenizer_fingerprint()}
    with named(SOURCE):
        content = content_hash(job.replay.source)
    own = {**system, **({"unscored": "dropped"} if job.training.needs_scores else {})}
    return {**job.replay.model_dump(), **own, "content": content, "drawn": DRAWN, "seed": job.seed}


def draw_replay(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """The ready pairs that are trained on beside the generated ones; all others are dropped with the reason."""
    from rdpo.files.rows import write_rows
    from rdpo.preference.replay import draw_mix, keyed, keyed_ready, offline_pairs, usable, with_reasons

    if run.job.replay is None:
        raise RuntimeError("a job without [replay] has no such stage")
    folder.clear_parts()
    pairs, (questions, heldout) = run.folder("pairs"), _questions(run)
    ready = offline_pairs(run.job, run.job.replay).materialize()
    offline = keyed_ready(ready.map_batches(usable, batch_format="pyarrow").iter_batches(batch_format="pyarrow"))
    generated = keyed(pairs.tables(columns=[ID_COLUMN, HELDOUT]), questions)
    mix = draw_mix(generated, offline, heldout, run.job.replay.share, run.job.seed)
    schema = pairs.schema() if pairs.count() else ready.schema().base_schema
    rows = ready.map_batches(with_reasons, fn_kwargs={"reasons": mix.reasons, "schema": schema}, batch_format="pyarrow")
    write_rows(rows, folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped))
    run.console.say(f"{'':<12}{mix.generated} generated pairs and {mix.offline} ready ones")
    measured = pairs.count() - len(generated)
    return {"rows_in": ready.count(), "generated": mix.generated, "heldout": measured, "last": mix.last}


def _questions(run: Run) -> tuple[dict[str, str], frozenset[str]]:
    """The question of each prompt, by its id, and the questions that are held out for evaluation."""
    from rdpo.synthesis.prompts import question_of

    questions: dict[str, str] = {}
    heldout: set[str] = set()
    for part in run.folder("prompts").tables("", [ID_COLUMN, "split", "prompt", "extra"], [QUESTION]):
        for row in part.to_pylist():
            questions[row[ID_COLUMN]] = question = question_of(row, run.job.prompts)
            if row["split"] == HELDOUT:
                heldout.add(question)
    return questions, frozenset(heldout)


STAGE = Stage(
    "replay",
    inputs=("prompts", "pairs"),
    settings=settings,
    execute=draw_replay,
    unit="ready pairs",
    wanted=lambda job: job.replay is not None,
)
