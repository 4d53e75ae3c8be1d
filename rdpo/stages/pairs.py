"""Pairs: two answers of each conversation, the preferred one and the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from rdpo.execution.stage import Reads, RowWork, Source, Stage
from rdpo.records import ID_COLUMN, OTHERS, QUESTION
from rdpo.stages.settings import question_settings

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.preference.shaping import Shaping


def settings(job: Job) -> Settings:
    """Settings of the pairs stage."""
    asked = question_settings(job, job.pairs.condition)
    reasoned = {"reasoned": True} if job.synthesis.trains_on_reasoning else {}
    own = {**asked, **reasoned, **unscored_settings(job)}
    drawn = bool(job.pairs.flip) or job.pairs.random_sides
    return {**job.pairs.model_dump(), **own, "seed": job.seed if drawn else None}


def unscored_settings(job: Job) -> Settings:
    """What becomes of pairs that nothing scored, where that is not what has always become of them."""
    from rdpo.preference.pairs import needs_scores

    return {"unscored": "dropped"} if not job.rewards and needs_scores(job) else {}


def scored(run: RunReader) -> Source:
    """The scored rows, each as often as it makes pairs."""
    from rdpo.preference.pairs import copies, copy_names

    source, count = run.source("rewards"), 1 + len(run.job.pairs.also)
    if count == 1:
        return source
    rows = partial(copies, count=count)
    return Source(
        lambda: source.rows().map_batches(rows, batch_format="pyarrow"),
        source.count * count,
        lambda: copy_names(source.ids(), count),
    )


def pair(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The preference pairs of scored rows."""
    from rdpo.preference.pairs import make_pairs

    shaping = _shaping(run)
    return make_pairs(rows, run.job, shaping.length_coef if shaping else 0.0, _drawn_together(run))


def _drawn_together(run: Run) -> dict[str, str]:
    from rdpo.preference.pairs import drawn_together

    folder, columns = run.folder("prompts"), [QUESTION, "prompt", "source", "line"]
    # Rows of earlier versions do not name their question.
    if not run.job.pairs.heldout_fraction or QUESTION not in folder.schema().names:
        return {}
    return drawn_together(folder.tables(columns=columns))


def _shaping(run: Run) -> Shaping | None:
    from rdpo.preference.pairs import shaping_of

    return shaping_of(run.folder("rewards").tables(), run.job.pairs)


def summary(run: Run, folder: StageFolder) -> Summary:
    """How far the rewards agree with the teacher, whose answers are chosen, defects, the price of length; says so."""
    from rdpo.preference.agreement import (
        COLUMNS,
        SWAPPED,
        VOICES,
        agreement,
        count_answers,
        count_defects,
        count_voices,
    )

    settings = run.job.pairs
    # Only the columns that count are read: the texts would stay in the driver's memory.
    agreed = agreement(_all_rows(folder, COLUMNS, [SWAPPED]), settings)
    found = count_defects(_all_rows(folder, ["defects"]))

    rows = folder.count() + folder.count("dropped")
    for defect, count in found.items():
        run.console.say(f"{'':<12}{count} of {rows} conversations: {defect}")
    for reward, sides in agreed.items():
        means = f"means {sides.chosen_mean:.2f} and {sides.rejected_mean:.2f}"
        run.console.say(
            f"{'':<12}{reward} prefers {settings.chosen} to {settings.rejected}: {sides.preferred:.2f}; {means}"
        )
        if sides.constant:
            run.console.warn(f"{reward} gives every answer the same score; it tells nothing here")

    groups = count_answers(folder.tables("", [], [OTHERS])) if settings.others else {}
    if groups:
        run.console.say(f"{'':<12}groups of " + ", ".join(f"{size} answers: {count}" for size, count in groups.items()))

    # Of the kept ones: those whose voices are trained on.
    voices = count_voices(folder.tables("", [], VOICES))
    for voice, times in voices.items():
        run.console.say(f"{'':<12}{voice}: chosen {times['chosen']} times, rejected {times['rejected']}")

    facts: dict[str, Any] = {"agreement": {reward: asdict(sides) for reward, sides in agreed.items()}}
    if voices:
        facts["voices"] = voices
    if groups:
        facts["groups"] = groups
    if shaping := _shaping(run):
        facts["shaping"] = asdict(shaping)
        gap = f"the best are {shaping.mean_length_gap:+.1f} characters longer than the worst"
        run.console.say(f"{'':<12}a character costs {shaping.length_coef:g}: {gap}")
    return {**facts, "defects": found} if run.job.synthesis.task else facts


def _all_rows(folder: StageFolder, columns: list[str], optional: Sequence[str] = ()) -> Iterator[pa.Table]:
    """The kept and the dropped rows, part by part."""
    return chain(folder.tables("", columns, optional), folder.tables("dropped", columns, optional))


STAGE = Stage(
    "pairs",
    inputs=("prompts", "rewards"),
    settings=settings,
    rows=RowWork(scored, pair, summary),
    # Of the prompts it reads what they ask: pairs of one question are held out together.
    reads={"prompts": Reads(columns=(ID_COLUMN, QUESTION, "prompt"))},
    packages=("rdpo",),
    command="pair",
)
