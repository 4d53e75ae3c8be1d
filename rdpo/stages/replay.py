"""Replay: ready pairs of another source, mixed into the generated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rdpo.execution.stage import Stage
from rdpo.records import HELDOUT, ID_COLUMN
from rdpo.stages.prompts import split_ids
from rdpo.stages.settings import rendering_of_student

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter


def settings(job: Job) -> dict[str, Any]:
    """Settings of the replay stage, with the content of its source."""
    from rdpo.synthesis.sources import content_hash

    if job.replay is None:
        return {}
    system: dict[str, Any] = {"system": job.prompts.system, "max_prompt_tokens": job.prompts.max_prompt_tokens}
    system |= rendering_of_student(job)
    return {**job.replay.model_dump(), **system, "content": content_hash(job.replay.source), "seed": job.seed}


def draw_replay(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    """The ready pairs that are trained on beside the generated ones; all others are dropped with the reason."""
    from rdpo.files.stage_folder import write_rows
    from rdpo.preference.replay import draw_mix, keyed, offline_pairs, usable, with_reasons

    assert run.job.replay is not None
    folder.clear_parts()
    pairs, heldout = run.folder("pairs"), split_ids(run.folder("prompts"), HELDOUT).to_pylist()
    ready = offline_pairs(run.job, run.job.replay).materialize()
    offline = keyed(ready.map_batches(usable, batch_format="pyarrow").iter_batches(batch_format="pyarrow"))
    generated = keyed(pairs.tables(columns=[ID_COLUMN, "prompt"]))
    mix = draw_mix(generated, offline, frozenset(heldout), run.job.replay.share, run.job.seed)
    schema = pairs.schema() if generated else ready.schema().base_schema
    rows = ready.map_batches(with_reasons, fn_kwargs={"reasons": mix.reasons, "schema": schema}, batch_format="pyarrow")
    write_rows(rows, folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped))
    run.console.say(f"{'':<12}{mix.generated} generated pairs and {mix.offline} ready ones")
    return {"rows_in": ready.count(), "generated": mix.generated, "last": mix.last}


STAGE = Stage(
    "replay",
    inputs=("prompts", "pairs"),
    settings=settings,
    execute=draw_replay,
    unit="ready pairs",
    wanted=lambda job: job.replay is not None,
)
