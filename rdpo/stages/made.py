"""Made: prompts that a model writes, where the job names no source of any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.errors import named
from rdpo.execution.stage import RowWork, Source, Stage
from rdpo.records import ID_COLUMN
from rdpo.stages.settings import SPEAKER, speaker_settings

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data
    from ray import ObjectRef

    from rdpo.cluster.pools import Pool
    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings
    from rdpo.synthesis.personas import Combinations

BLOCK_ROWS = 4096


def settings(job: Job) -> Settings:
    """Settings of the prompts that are made, with the model that writes them and what they are made of."""
    from rdpo.modeling.chat import teacher_arguments
    from rdpo.modeling.template import date_settings
    from rdpo.modeling.weights import ModelRef
    from rdpo.synthesis.made import as_teacher, made_of, seed_of
    from rdpo.synthesis.personas import texts_of
    from rdpo.synthesis.sources import content_hash

    made, seen = made_of(job), as_teacher(job)
    found: Settings = {
        **made.model_dump(include={"kind", "count", "system", "template"}),
        **seen.synthesis.model_dump(include=set(SPEAKER)),
        "seed": seed_of(job),
    }
    if made.kind == "magpie":
        # Not as a teacher is asked: its template may fit no answer.
        model = ModelRef.of(seen, seen.synthesis.teacher)
        found["chat_template_kwargs"] = teacher_arguments(seen)
        return {**found, **speaker_settings(seen, date_settings(model, job.date))}

    sources = []
    for setting, texts in texts_of(made).items():
        with named(setting):
            sources.append({"setting": setting, **texts.model_dump(), "content": content_hash(texts.source)})
    return {**found, **speaker_settings(seen), "sources": sources}


def numbers(run: RunReader) -> Source:
    """The numbers of the prompts, each with the persona and the topic that are drawn for it, if there are such."""
    import pyarrow as pa

    from rdpo.synthesis.made import made_of

    count = made_of(run.job).count

    def ids() -> pa.ChunkedArray:
        return pa.chunked_array([[name_of(number) for number in range(1, count + 1)]], pa.string())

    return Source(lambda: _rows(run.job, count), count, ids)


def _rows(job: Job, count: int) -> ray.data.Dataset:
    import ray
    import ray.data

    from rdpo.synthesis.made import made_of, seed_of
    from rdpo.synthesis.personas import combinations

    made = made_of(job)
    drawn = ray.put(combinations(made, seed_of(job))) if made.kind == "personas" else None
    places = ray.data.range(count, override_num_blocks=-(-count // BLOCK_ROWS))
    return places.map_batches(_numbered, fn_kwargs={"drawn": drawn}, batch_format="pyarrow")


def _numbered(places: pa.Table, drawn: ObjectRef[Combinations] | None) -> pa.Table:
    import pyarrow as pa
    import ray

    found = ray.get(drawn) if drawn is not None else None
    rows = []
    for place in places["id"].to_pylist():
        number = place + 1
        rows.append({ID_COLUMN: name_of(number), "number": number, **(found.of(number) if found else {})})
    return pa.Table.from_pylist(rows)


def name_of(number: int) -> str:
    """The id of a prompt while it is made, and its place in messages; in the order of the numbers."""
    return f"made:{number:07}"


def write(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The prompts of some numbers."""
    from rdpo.synthesis.made import write_prompts

    return write_prompts(rows, run.job)


def pools(job: Job) -> list[Pool]:
    """Who writes."""
    from rdpo.synthesis.made import writer_pool

    return [writer_pool(job)]


STAGE = Stage(
    "made",
    inputs=(),
    settings=settings,
    rows=RowWork(numbers, write, generates=True, has_failed=bool, pools=pools),
    packages=("rdpo", "vllm", "torch", "transformers"),
    wanted=lambda job: job.prompts.made is not None,
)
