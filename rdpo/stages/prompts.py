"""Prompts: the rows of the source, each once, in splits."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rdpo.errors import InputError, named
from rdpo.execution.stage import Reads, Source, Stage
from rdpo.records import HELDOUT, ID_COLUMN
from rdpo.stages.settings import tokenizer_settings

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter

GIVEN = 2
"""How ready pairs are read: it goes up when other conversations come out of the same file."""


def settings(job: Job) -> Settings:
    """Settings of the prompts stage, with the content of its source."""
    from rdpo.synthesis.prompts import SEED

    # Counting them changes no prompt; how prompts are made counts by what was made.
    counted = {"near_duplicates"} if job.prompts.near_duplicates == "count" else set()
    return {
        **job.prompts.model_dump(exclude={"made", *counted}),
        **_contents(job),
        # Pairs that are ready are read in another way than prompts.
        "given": job.synthesis.task is None and GIVEN,
        **({"reasoned": True} if job.synthesis.reasoning != "off" else {}),
        **({"train_on": job.reference.train_on} if job.reference.train_on != "last" else {}),
        # Only rows that are trained on need an annotator.
        **({"annotators": [job.annotators.column, job.synthesis.split]} if job.annotators else {}),
        **tokenizer_settings(job),
        # Splits and templates are drawn alike for every seed of a job.
        "seed": SEED,
    }


def _contents(job: Job) -> Settings:
    """What the source holds; or each of several sources, with its settings."""
    from rdpo.synthesis.columns import PROMPTS
    from rdpo.synthesis.sources import content_hash

    if job.prompts.made:
        return {}
    if job.prompts.source:
        with named(PROMPTS):
            return {"content": content_hash(job.prompts.source)}

    tables = []
    for number, one in enumerate(job.prompts.sources):
        with named(f"prompts.sources.{number}"):
            tables.append({**one.model_dump(), "content": content_hash(one.source)})
    # Shares are of the prompts that are trained on.
    return {"sources": tables} | ({"split": job.synthesis.split} if job.prompts.has_shares else {})


def take_prompts(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """The source's rows as prompts, each once.

    Raises:
        InputError: no usable prompt is left to train on or to evaluate with.
    """
    from rdpo.files.rows import write_rows
    from rdpo.synthesis.prompts import distinguishing, drop_duplicates, drop_heldout_questions

    folder.clear_parts()
    write_rows(_prompts_of(run), folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped))
    drop_duplicates(folder, distinguishing(run.job))
    drop_heldout_questions(folder)
    # Who is dropped is dropped before others are drawn; only what is left is counted.
    drops = run.job.prompts.near_duplicates == "drop"
    near = _near_duplicates(run, folder) if drops else 0
    _draw(run, folder)
    near = near if drops else _near_duplicates(run, folder)
    found = _of_sources(run, folder)

    splits = _splits(folder)
    for split in (run.job.synthesis.split, HELDOUT):
        if split not in splits:
            reason = next((table["dropped"][0] for table in folder.tables("dropped")), None)
            why = f"; {reason}" if reason else ""
            raise InputError(f"prompts: no usable prompt in the {split} split of {run.job.prompts.name}{why}")
    return {"rows_in": meter.done, "splits": splits, "near_duplicates": near, **found}


def _prompts_of(run: Run) -> ray.data.Dataset:
    """All rows of the source, or of the prompts that were made."""
    from rdpo.preference.rewards import reward_columns
    from rdpo.synthesis.made import read_made
    from rdpo.synthesis.prompts import read_prompts

    if run.job.prompts.made:
        return read_made(run.folder("made").dataset(), run.job)
    return read_prompts(run.job, also=reward_columns(run.job))


def _draw(run: Run, folder: StageFolder) -> None:
    """Drop what is more than the shares of several sources."""
    from rdpo.synthesis.mixture import places_of
    from rdpo.synthesis.prompts import drop_not_drawn

    if run.job.prompts.has_shares:
        drop_not_drawn(folder, run.job, places_of(run.job.prompts))


def _of_sources(run: Run, folder: StageFolder) -> Summary:
    """Of several sources how many rows came of each; says so."""
    from rdpo.synthesis.mixture import counts, places_of

    sources = run.job.prompts.sources
    if not sources:
        return {}

    found = []
    for number, counted in counts(folder, places_of(run.job.prompts)).items():
        name = sources[number].source
        run.console.say(f"{'':<12}{name}: {', '.join(f'{count} {what}' for what, count in counted.items())}")
        found.append({"source": name, "rows": counted})
    return {"sources": found}


def _near_duplicates(run: Run, folder: StageFolder) -> int:
    """How many training prompts nearly repeat a held-out one; says so, and drops them where the job asks for it."""
    from rdpo.synthesis.near_duplicates import near_heldout
    from rdpo.synthesis.prompts import drop_near_duplicates

    settings = run.job.prompts
    near = near_heldout(folder, any(one.templates or one.heldout_templates for one in settings.each()))
    if near and settings.near_duplicates == "drop":
        drop_near_duplicates(folder, near)
    elif near:
        run.console.say(
            f"{'':<12}training prompts that nearly repeat a held-out one: {len(near)}; "
            'prompts.near_duplicates = "drop" leaves them out'
        )
    return len(near)


def _splits(folder: StageFolder) -> dict[str, int]:
    import pyarrow.compute as pc

    counted: Counter[str] = Counter()
    for table in folder.tables(columns=["split"]):
        counted.update({entry["values"]: entry["counts"] for entry in pc.value_counts(table["split"]).to_pylist()})
    return dict(sorted(counted.items()))


def split_source(run: RunReader, split: str, limit: int | None) -> Source:
    """The prompts of one split, at most so many: the first by id."""
    import pyarrow.compute as pc

    folder = run.folder("prompts")
    count, last = _splits(folder).get(split, 0), None
    if limit is not None and limit < count:
        ids = split_ids(folder, split)
        count, last = limit, ids[pc.sort_indices(ids)[limit - 1].as_py()].as_py()

    def chosen(batch: pa.Table) -> pa.Table:
        wanted = pc.equal(batch["split"], split)
        return batch.filter(wanted if last is None else pc.and_(wanted, pc.less_equal(batch[ID_COLUMN], last)))

    def ids_of() -> pa.ChunkedArray:
        ids = split_ids(folder, split)
        return ids if last is None else ids.filter(pc.less_equal(ids, last))

    return Source(lambda: folder.dataset().map_batches(chosen, batch_format="pyarrow"), count, ids_of)


def split_ids(folder: StageFolder, split: str) -> pa.ChunkedArray:
    """Ids of the prompts of one split."""
    import pyarrow as pa
    import pyarrow.compute as pc

    chunks: list[pa.Array] = []
    for part in folder.tables(columns=[ID_COLUMN, "split"]):
        chunks += part.filter(pc.equal(part["split"], split))[ID_COLUMN].chunks
    return pa.chunked_array(chunks, pa.string())


STAGE = Stage(
    "prompts",
    inputs=("made",),
    settings=settings,
    execute=take_prompts,
    reads={"made": Reads(columns=(ID_COLUMN, "prompt", "persona", "topic"))},
)
