"""Who speaks which turns of a task: the teacher, or a voice of the job; and in which order their models are asked.

Each speaker is a pool of its own. The turns that one of them can speak at a stretch are a leg, and a row passes through
the legs one after the other. A turn may be spoken before an earlier one of the task, where it needs nothing of it: so a
model is loaded as few times as can be. What a template may use goes by the order of the task in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rdpo.config import Job
from rdpo.config.task import Task, Turn
from rdpo.errors import InputError, did_you_mean
from rdpo.records import unit_draw
from rdpo.synthesis.instructions import load_task, names_used

TEACHER = None
"""The speaker of turns that name no voice."""
LEAST = 2.0**-60
"""In place of a draw of exactly 0, which has no logarithm."""


@dataclass(frozen=True)
class Leg:
    """Turns, by name, that one speaker speaks at a stretch."""

    voice: str | None
    turns: tuple[str, ...]


def legs(task: Task) -> list[Leg]:
    """The legs of a task, each as long as can be."""
    needs = {turn.name: set(_needed(turn, task)) for turn in task.turns}
    waiting: dict[str, list[str | None]] = {turn.name: turn.voices for turn in task.turns}
    found: list[Leg] = []
    while any(waiting.values()):
        # The first turn that waits needs none that waits.
        voices = next(voices for voices in waiting.values() if voices)
        voice = found[-1].voice if found and found[-1].voice in voices else voices[0]
        spoken = []
        for name, by in waiting.items():
            if voice in by and not any(waiting[other] for other in needs[name]):
                by.remove(voice)
                spoken.append(name)
        found.append(Leg(voice, tuple(spoken)))
    return found


def _needed(turn: Turn, task: Task) -> Iterator[str]:
    """Names of the earlier turns that a turn cannot do without."""
    used = names_used(turn) | {turn.after}
    for earlier in task.turns[: task.turns.index(turn)]:
        if used & {*earlier.names}:
            yield earlier.name


def drawn_voices(turn: Turn, row_id: str, job: Job) -> dict[str, str | None]:
    """Who speaks each answer of a turn in one row, by the answer's name.

    Of several voices the order is drawn by their weights, without putting back (Efraimidis and Spirakis, 2006).
    """
    order = turn.voices
    if is_drawn(turn):
        keys: dict[str | None, float] = {voice: _key(turn, voice, row_id, job) for voice in order if voice}
        order = sorted(keys, key=keys.__getitem__, reverse=True)
    return {name: order[number % len(order)] for number, name in enumerate(turn.names)}


def _key(turn: Turn, voice: str, row_id: str, job: Job) -> float:
    draw = unit_draw(job.seed, row_id, f"{turn.name} by {voice}")
    return math.log(max(draw, LEAST)) / job.synthesis.voices[voice].weight


def is_drawn(turn: Turn) -> bool:
    """Whether each prompt has a speaker of its own for a turn."""
    return len(turn.voices) > 1


def table_of_voice(voice: str | None) -> str:
    """The job's table of a speaker, by name."""
    return "synthesis" if voice is TEACHER else f"synthesis.voices.{voice}"


def spoken_by(job: Job, voice: str | None) -> Job:
    """The job as if a voice were its teacher.

    Raises:
        InputError: it has no such voice.
    """
    if voice is TEACHER:
        return job
    known, common = job.synthesis.voices, job.synthesis
    if voice not in known:
        raise InputError(
            f"synthesis.task: {common.task} has turns of the voice {voice!r}{did_you_mean(voice, known)}, which the "
            f"job does not have; add a table [synthesis.voices.{voice}]"
        )
    own = known[voice]
    speaker = {
        "teacher": own.model,
        "adapter": own.adapter,
        "chat_template_kwargs": own.chat_template_kwargs,
        "endpoint": own.endpoint,
        "sampling": own.sampling or common.sampling,
        "engine": own.engine or common.engine,
        "voices": {},
    }
    return job.model_copy(update={"synthesis": common.model_copy(update=speaker)})


def speakers(job: Job) -> dict[str | None, Job]:
    """The job as each of those sees it who speak turns of its task."""
    return {voice: spoken_by(job, voice) for voice in speaking(load_task(job.synthesis.task or ""))}


def speaking(task: Task) -> list[str | None]:
    """Those who speak turns of a task, in the order in which they first may."""
    return list(dict.fromkeys(voice for turn in task.turns for voice in turn.voices))


def turns_of(task: Task, voice: str | None) -> list[Turn]:
    """The turns that a speaker may speak."""
    return [turn for turn in task.turns if voice in turn.voices]


def models_named(job: Job) -> list[str]:
    """The models that speak turns, for a person: that of the teacher, and those of voices with their names."""
    if not job.synthesis.task:
        return []
    try:
        speaking = speakers(job)
    except InputError:
        # A report is made of old runs too, whose task file has gone; then those that the job names.
        stated = [TEACHER] if job.synthesis.teacher or job.synthesis.endpoint or not job.synthesis.voices else []
        speaking = {voice: spoken_by(job, voice) for voice in (*stated, *job.synthesis.voices)}
    models = {voice: _model(seen) for voice, seen in speaking.items()}
    return [model if voice is TEACHER else f"{model} ({voice})" for voice, model in models.items()]


def _model(job: Job) -> str:
    synthesis = job.synthesis
    return synthesis.endpoint.model if synthesis.endpoint else synthesis.teacher or job.student.described


def check_voices(job: Job) -> None:
    """Hold the voices that the turns name against those that the job has.

    Raises:
        InputError: a turn names none of the job's, or one is there that no turn uses.
    """
    named, synthesis = list(speakers(job)), job.synthesis
    if unused := sorted(set(synthesis.voices) - set(named)):
        raise InputError(
            f"synthesis.voices.{unused[0]}: no turn of {synthesis.task} names this voice; remove the table, or "
            f'write voice = "{unused[0]}" into a turn'
        )
    if TEACHER not in named and (stated := _stated({"teacher": synthesis.teacher, "endpoint": synthesis.endpoint})):
        raise InputError(
            f"synthesis.{stated}: every turn of {synthesis.task} names a voice, so that the teacher speaks none; "
            f"remove {stated}"
        )


def _stated(fields: dict[str, object]) -> str | None:
    return next((name for name, value in fields.items() if value), None)


def engine_models(job: Job) -> set[str]:
    """Names of the models that speak with engines; the teacher's where there is no task."""
    speaking = speakers(job).values() if job.synthesis.task else [job]
    return {seen.synthesis.teacher or seen.student.model for seen in speaking if not seen.synthesis.endpoint}
