"""Synthesis: what the teacher makes of the prompts, or the answers that come with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from rdpo.execution.stage import Make, RowWork, Source, Stage
from rdpo.records import ID_COLUMN, VOICE, Row
from rdpo.stages.prompts import split_source
from rdpo.stages.settings import SPEAKER, prefill_settings, speaker_settings

if TYPE_CHECKING:
    import ray.data

    from rdpo.cluster.pools import Pool
    from rdpo.config import Endpoint, Job
    from rdpo.config.task import Task
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.synthesis.voices import Leg

PROMPT_LENGTH = "_prompt_length"


def settings(job: Job) -> Settings:
    """Settings of the synthesis stage, with the task's wording and the weights of all that speak."""
    from rdpo.synthesis.instructions import load_task
    from rdpo.synthesis.voices import TEACHER, speakers

    if job.synthesis.task is None:
        return {"split": job.synthesis.split, "limit": job.synthesis.limit}
    task, speaking = load_task(job.synthesis.task).model_dump(), speakers(job)
    common = job.synthesis.model_dump(exclude={"voices", *(SPEAKER if TEACHER not in speaking else ())})
    found = {**common, "turns": task, "seed": job.seed, **prefill_settings(job)}
    if TEACHER in speaking:
        found |= speaker_settings(job)

    voices = {voice: seen for voice, seen in speaking.items() if voice is not TEACHER}
    if voices:
        # A list: in a table the names would be the user's, and what does not count is known by name.
        found["voices"] = [_voice_settings(job, voice, seen) for voice, seen in voices.items()]
    return found


def _voice_settings(job: Job, voice: str, seen: Job) -> Settings:
    own = seen.synthesis.model_dump(include=set(SPEAKER))
    return {"voice": voice, "share": job.synthesis.voices[voice].weight, **own, **speaker_settings(seen)}


def training_prompts(run: RunReader) -> Source:
    """The prompts that the teacher answers."""
    return split_source(run, run.job.synthesis.split, run.job.synthesis.limit)


def write_answers(run: Run) -> list[Make]:
    """The answers that come with the prompts, or the turns of the task: a step for each that speaks at a stretch."""
    from rdpo.synthesis.given import given_answers
    from rdpo.synthesis.instructions import load_task
    from rdpo.synthesis.voices import legs

    if not run.job.synthesis.task:
        return [lambda rows, run: given_answers(rows, run.job)]
    _check_task(run)
    return [partial(_speak, leg) for leg in legs(load_task(run.job.synthesis.task))]


def _speak(leg: Leg, rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    from rdpo.synthesis.teacher import synthesize

    return synthesize(rows, run.job, leg)


def _check_task(run: Run) -> None:
    """Hold the task against the columns of the prompts.

    Raises:
        InputError: they do not fit.
    """
    from rdpo.synthesis.instructions import check_apart, check_fields, check_turns_apart, load_task

    task, words = load_task(run.job.synthesis.task or ""), run.job.synthesis.values
    prompts = run.folder("prompts")
    if words:
        check_apart(words.keys(), _named_rows(prompts, words.keys()))
    check_turns_apart(task, _named_rows(prompts, ["prompt", *task.answers]))

    first = next(prompts.tables()).slice(0, 1)
    check_fields(task, first.to_pylist()[0], words)


def _named_rows(prompts: StageFolder, names: Iterable[str]) -> Iterator[Row]:
    """Id and other columns of the prompts that may have a column of one of these names."""
    import pyarrow.compute as pc

    # Other columns lie in one text of JSON: most are seen to have none of the names without reading it as such.
    keys = "|".join(re.escape(json.dumps(name, ensure_ascii=False)) for name in names)
    for part in prompts.tables(columns=[ID_COLUMN, "extra"]):
        yield from part.filter(pc.match_substring_regex(part["extra"], keys)).to_pylist()


def summary(run: Run, folder: StageFolder) -> Summary:
    """What the teacher's endpoint, or those of voices, read, wrote and cost, and what answers repeat; says so."""
    from rdpo.synthesis.instructions import load_task
    from rdpo.synthesis.lookup import proposals, repeated_shares
    from rdpo.synthesis.voices import TEACHER, speakers

    found: dict[str | None, Summary] = {}
    if not run.job.synthesis.task:
        return {}
    task = load_task(run.job.synthesis.task)
    for voice, seen in speakers(run.job).items():
        if seen.synthesis.endpoint:
            found[voice] = _spent(folder, task, voice, seen.synthesis.endpoint)
            read, price = found[voice]["tokens_read"], found[voice]["cost"]
            of = "" if voice is TEACHER else f" of {voice}"
            run.console.say(f"{'':<12}endpoint{of}: {read} tokens read, cost {price:.2f}")
    shares = repeated_shares(_first_rows(folder, task), task)
    for proposal in proposals(run.job, shares):
        run.console.say(f"{'':<12}{proposal}")
    teacher = {**found.pop(TEACHER, {}), **({"repeated": shares} if shares else {})}
    return {**teacher, "voices": found} if found else teacher


def _first_rows(folder: StageFolder, task: Task) -> Iterator[Row]:
    """The kept rows with their prompts and answers, a part at a time."""
    for part in folder.tables("", ["prompt"], task.answers):
        yield from part.to_pylist()


def _spent(folder: StageFolder, task: Task, voice: str | None, endpoint: Endpoint) -> Summary:
    """Tokens that a server has read and written for the turns of one speaker, and what they cost."""
    from rdpo.files.parts import TOKENS
    from rdpo.synthesis.endpoint import cost
    from rdpo.synthesis.voices import is_drawn, turns_of

    read = written = 0
    for turn in turns_of(task, voice):
        for name in turn.names:
            where = {f"{name}{VOICE}": voice} if is_drawn(turn) else {}
            counts = [f"{name}{PROMPT_LENGTH}", f"{name}{TOKENS}"]
            for below in ("", "dropped"):
                more = _totals(folder, below, counts, where)
                read, written = read + more[0], written + more[1]
    return {
        "tokens_read": read,
        "tokens_written": written,
        "cost": cost(read, written, endpoint.price_per_million),
    }


def _totals(folder: StageFolder, below: str, columns: list[str], where: dict[str, str | None]) -> list[int]:
    """Sums of columns over the rows that have some values; rows that were dropped before they had any count as 0."""
    import pyarrow.compute as pc

    sums = [0] * len(columns)
    for part in folder.tables(below, [], [*columns, *where]):
        for name, value in where.items():
            part = part.filter(pc.equal(part[name], value))
        there = [pc.sum(part[name]).as_py() or 0 if name in part.column_names else 0 for name in columns]
        sums = [one + other for one, other in zip(sums, there, strict=True)]
    return sums


def pools(job: Job) -> list[Pool]:
    """Who speaks, engines and clients of servers, in the order of the legs."""
    from rdpo.synthesis.instructions import load_task
    from rdpo.synthesis.teacher import speaker_pool
    from rdpo.synthesis.voices import legs

    return [speaker_pool(job, leg.voice) for leg in legs(load_task(job.synthesis.task))] if job.synthesis.task else []


STAGE = Stage(
    "synthesis",
    inputs=("prompts",),
    settings=settings,
    rows=RowWork(training_prompts, None, summary, generates=True, has_failed=bool, steps=write_answers, pools=pools),
    packages=("rdpo", "vllm", "torch", "transformers"),
    command="synthesize",
)
