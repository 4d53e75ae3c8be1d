"""Synthesis: what the teacher makes of the prompts, or the answers that come with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rdpo.execution.stage import RowWork, Source, Stage
from rdpo.records import ID_COLUMN, Row
from rdpo.stages.prompts import split_source
from rdpo.stages.settings import prefill_settings

if TYPE_CHECKING:
    import ray.data

    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder

PROMPT_LENGTH = "_prompt_length"


def settings(job: Job) -> Settings:
    """Settings of the synthesis stage, with the task's wording and the teacher's weights."""
    from rdpo.modeling.chat import rendering_settings, teacher_chat
    from rdpo.modeling.weights import ModelRef, adapter_fingerprint
    from rdpo.synthesis.engine import engine_settings
    from rdpo.synthesis.instructions import load_task

    if job.synthesis.task is None:
        return {"split": job.synthesis.split, "limit": job.synthesis.limit}
    task = load_task(job.synthesis.task).model_dump()
    teacher = None if job.synthesis.endpoint else ModelRef.of(job, job.synthesis.teacher)
    weights = teacher.fingerprint() if teacher else None
    found = {**job.synthesis.model_dump(), "turns": task, "weights": weights, "seed": job.seed}
    found |= prefill_settings(job)
    if teacher:
        found |= rendering_settings(teacher_chat(job))
        found["engine"] = engine_settings(job.synthesis.engine, teacher)
    if job.synthesis.adapter:
        found["adapter_weights"] = adapter_fingerprint(job.synthesis.adapter)
    if endpoint := job.synthesis.endpoint:
        # How it is asked does not change what it says.
        found |= {"endpoint": {"url": endpoint.url, "model": endpoint.model}, "engine": None}
    return found


def training_prompts(run: RunReader) -> Source:
    """The prompts that the teacher answers."""
    return split_source(run, run.job.synthesis.split, run.job.synthesis.limit)


def write_answers(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The teacher's turns, or the answers that come with the prompts."""
    from rdpo.synthesis.given import given_answers
    from rdpo.synthesis.instructions import check_apart, check_fields, check_turns_apart, load_task
    from rdpo.synthesis.teacher import synthesize

    if not run.job.synthesis.task:
        return given_answers(rows, run.job)
    task, words = load_task(run.job.synthesis.task), run.job.synthesis.values
    prompts = run.folder("prompts")
    if words:
        check_apart(words.keys(), _named_rows(prompts, words.keys()))
    check_turns_apart(task, _named_rows(prompts, ["prompt", *task.answers]))

    first = next(prompts.tables()).slice(0, 1)
    check_fields(task, first.to_pylist()[0], words)
    return synthesize(rows, run.job)


def _named_rows(prompts: StageFolder, names: Iterable[str]) -> Iterator[Row]:
    """Id and other columns of the prompts that may have a column of one of these names."""
    import pyarrow.compute as pc

    # Other columns lie in one text of JSON: most are seen to have none of the names without reading it as such.
    keys = "|".join(re.escape(json.dumps(name, ensure_ascii=False)) for name in names)
    for part in prompts.tables(columns=[ID_COLUMN, "extra"]):
        yield from part.filter(pc.match_substring_regex(part["extra"], keys)).to_pylist()


def summary(run: Run, folder: StageFolder) -> Summary:
    """What an endpoint read, wrote and cost; says so."""
    from rdpo.files.parts import TOKENS
    from rdpo.synthesis.endpoint import cost

    if not (run.job.synthesis.endpoint and run.job.synthesis.task):
        return {}
    read, written = (folder.total(of) + folder.total(of, "dropped") for of in (PROMPT_LENGTH, TOKENS))
    price = cost(read, written, run.job.synthesis.endpoint.price_per_million)
    run.console.say(f"{'':<12}endpoint: {read} tokens read, cost {price:.2f}")
    return {"tokens_read": read, "tokens_written": written, "cost": price}


STAGE = Stage(
    "synthesis",
    inputs=("prompts",),
    settings=settings,
    rows=RowWork(training_prompts, write_answers, summary, generates=True, has_failed=bool),
    packages=("rdpo", "vllm", "torch", "transformers"),
    command="synthesize",
)
