"""Prompts that a model writes, where a user has none.

In: numbers; to be asked for, with a persona and a topic each. Out: `prompt`, `made_finish_reason` and `made_tokens`. A
prompt's words depend on the seed and its number alone, whatever is written beside it. One that is cut off or empty is
dropped.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from rdpo.cluster.pools import Pool, engine_pool
from rdpo.config import Job, Made
from rdpo.errors import InputError
from rdpo.modeling.chat import load_chat, teacher_arguments, teacher_chat
from rdpo.modeling.template import Template
from rdpo.modeling.user_turn import UserTurn, unspoken_ids, user_turn
from rdpo.modeling.weights import ModelRef, local_adapter
from rdpo.records import ID_COLUMN, Messages, Row, clean, draw_seed, drop, table_of
from rdpo.synthesis.asking import ask
from rdpo.synthesis.columns import Needed
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts
from rdpo.synthesis.engine import Engine, Generation
from rdpo.synthesis.instructions import render
from rdpo.synthesis.personas import NUMBER, PERSONA, TOPIC, check_question, check_texts
from rdpo.synthesis.prompts import MESSAGES, rendered
from rdpo.synthesis.sources import RAW
from rdpo.synthesis.teacher import REASON_CHARS, open_engine, typed

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

MADE = "made"
"""The stage, and in place of a file what such prompts are from."""
ADDED = {"prompt": MESSAGES, "made_finish_reason": pa.string(), "made_tokens": pa.int64(), "dropped": pa.string()}
"""The columns that are added, with their types."""
CUT_OFF = "the prompt is cut off by the token limit"
EMPTY = "the prompt is empty"
BROKEN = "a special token stands within the prompt"


def made_of(job: Job) -> Made:
    """The job's table of prompts that are made."""
    assert job.prompts.made is not None  # Only jobs with such a table come here.
    return job.prompts.made


def seed_of(job: Job) -> int:
    """The seed of what is drawn for these prompts."""
    own = made_of(job).seed
    return job.seed if own is None else own


def as_teacher(job: Job) -> Job:
    """The job as if the model that writes its prompts were its teacher."""
    made, common = made_of(job), job.synthesis
    writer = {
        "teacher": made.model or common.teacher,
        "adapter": None if made.model else common.adapter,
        "chat_template_kwargs": made.chat_template_kwargs or ({} if made.model else common.chat_template_kwargs),
        "endpoint": None,
        "sampling": made.sampling or common.sampling,
        "engine": made.engine or common.engine,
        "voices": {},
    }
    return job.model_copy(update={"synthesis": common.model_copy(update=writer)})


def writer_named(job: Job) -> str:
    """The model that writes the prompts, for a person; nothing where they are read."""
    if job.prompts.made is None:
        return ""
    return as_teacher(job).synthesis.teacher or job.student.described


def writer_pool(job: Job) -> Pool:
    """The engines that write prompts."""
    seen, nodes = as_teacher(job), job.cluster.placement.teacher
    model = ModelRef.of(seen, seen.synthesis.teacher)
    return engine_pool(MADE, "prompts.made.engine", seen.synthesis.engine, nodes, model)


def check_made_named(job: Job) -> None:
    """Look at the words of the question for a prompt.

    Raises:
        InputError: they are no template, or use what there is not.
    """
    if made_of(job).kind == "personas":
        check_question(made_of(job))


def check_made(job: Job) -> None:
    """Look at the sources, and at the chat template of the model that writes.

    Raises:
        InputError: one cannot be read, or the template has no place for what is asked of it.
    """
    check_made_named(job)
    made, seen = made_of(job), as_teacher(job)
    check_texts(made)
    if seen.synthesis.adapter:
        local_adapter(seen.synthesis.adapter)
    if made.kind == "magpie":
        magpie_turn(seen)
        return
    try:
        teacher_chat(seen).prompt_ids(_asked(made, "x"))
    except ValueError as error:
        raise InputError(f"prompts.made: the chat template does not take the question: {error}") from None


def check_made_columns(job: Job, needed: list[Needed]) -> None:
    """Whether the prompts that a job makes have the columns that something reads.

    Raises:
        InputError: they lack one.
    """
    known = {PERSONA, TOPIC} if made_of(job).kind == "personas" else set()
    for one in needed:
        if not known & {*one.names}:
            has = f"only `{PERSONA}` and `{TOPIC}`" if known else "none beside the prompt"
            raise InputError(
                f"{one.setting}: prompts that are made have no column `{one.names[0]}`, {has}; read prompts with that "
                "column from a source (prompts.source)"
            )


def magpie_turn(job: Job) -> UserTurn:
    """The place where a user begins to speak, by the chat template of the job's teacher.

    Raises:
        InputError: it has none.
    """
    teacher, arguments = ModelRef.of(job, job.synthesis.teacher), teacher_arguments(job)
    # Nothing is trained on what is written here, so that a template which fits no answer will do.
    chat = load_chat(teacher, job.date, json.dumps(arguments, sort_keys=True), "free")
    try:
        return user_turn(Template(chat.tokenizer, job.date, arguments), made_of(job).system)
    except ValueError as error:
        raise InputError(
            f"prompts.made: the chat template of {teacher.name} does not fit: {error}; name another model, or set "
            'kind = "personas"'
        ) from None


def write_prompts(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Add a prompt to each number."""
    return writer_pool(job).map(rows, Writer, job=job, crash_counts=open_crash_counts())


class Draft(Protocol):
    """How a prompt is drawn from an engine. `unspoken` are tokens that none may have within it."""

    unspoken: frozenset[int]

    async def draw(self, engine: Engine, row: Row, seed: int) -> Generation:
        """What the model writes.

        Raises:
            ValueError: it cannot be asked.
        """


class Magpie:
    """The model is let speak where a user would; it ends where the user's message does, or the whole conversation."""

    def __init__(self, job: Job):
        self.turn, sampling = magpie_turn(job), job.synthesis.sampling
        teacher = ModelRef.of(job, job.synthesis.teacher)
        chat = load_chat(teacher, job.date, json.dumps(teacher_arguments(job), sort_keys=True), "free")
        ends = () if self.turn.end_id is None else (self.turn.end_id,)
        self.stop_ids = tuple(dict.fromkeys([*chat.stop_ids, *ends]))
        self.unspoken = unspoken_ids(chat.tokenizer) - {*self.stop_ids}
        texts = [*sampling.stop, *([self.turn.end] if self.turn.end else [])]
        self.sampling = sampling.model_copy(update={"stop": texts})

    async def draw(self, engine: Engine, row: Row, seed: int) -> Generation:
        """A user's message."""
        return await engine.generate(list(self.turn.ids), self.sampling, seed, self.stop_ids)


class Personas:
    """The model is asked for a prompt that a persona may have on a topic."""

    unspoken: frozenset[int] = frozenset()

    def __init__(self, job: Job):
        self.made, self.chat, self.sampling = made_of(job), teacher_chat(job), job.synthesis.sampling

    async def draw(self, engine: Engine, row: Row, seed: int) -> Generation:
        """The answer to the question for a prompt."""
        values = {name: row[name] for name in (PERSONA, TOPIC, NUMBER)}
        messages = _asked(self.made, render(self.made.template or "", values))
        return await ask(engine, self.chat, messages, self.sampling, seed)


def _asked(made: Made, question: str) -> Messages:
    given: Messages = [{"role": "system", "content": made.system}] if made.system else []
    return [*given, {"role": "user", "content": question}]


DRAFTS: dict[str, Callable[[Job], Draft]] = {"magpie": Magpie, "personas": Personas}


class Writer:
    """A Ray Data actor that writes prompts."""

    def __init__(self, job: Job, crash_counts: ActorHandle, opened: Callable[[Job], Engine] = open_engine):
        self.crash_guard, self.seed = CrashGuard(crash_counts), seed_of(job)
        seen = as_teacher(job)
        self.draft = DRAFTS[made_of(job).kind](seen)
        self.engine = opened(seen)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Write the prompts of a block of numbers."""
        yield typed(table_of(await self.crash_guard.carry(batch.to_pylist(), self.write)), ADDED)

    async def write(self, row: Row) -> Row:
        """One number with its prompt; one that cannot be used is dropped."""
        try:
            drawn = await self.draft.draw(self.engine, row, draw_seed(self.seed, row[ID_COLUMN], MADE))
        except ValueError as error:
            return drop(row, str(error)[:REASON_CHARS])
        text = clean(drawn.text).strip()
        row = {**row, "prompt": [{"role": "user", "content": text}]}
        row |= {"made_finish_reason": drawn.finish_reason, "made_tokens": drawn.tokens}
        # A question that is cut off is none.
        if drawn.finish_reason == "length":
            return drop(row, CUT_OFF)
        if not text:
            return drop(row, EMPTY)
        return row if self.draft.unspoken.isdisjoint(drawn.token_ids) else drop(row, BROKEN)

    def __del__(self) -> None:
        # Ray ends an actor without another word; the processes of its engine would outlive it.
        if hasattr(self, "engine"):
            self.engine.shutdown()


def read_made(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Prompts that were made, as those of a source are read; persona and topic are their other columns."""
    return rendered(rows.map_batches(raw_table, batch_format="pyarrow"), job)


def raw_table(made: pa.Table) -> pa.Table:
    """Rows of prompts that were made, as those of a source; their place is their number."""
    contents = []
    for row in made.to_pylist():
        others = {name: row[name] for name in (PERSONA, TOPIC) if name in row}
        contents.append(json.dumps({"prompt": row["prompt"], **others}))
    numbers = made[NUMBER].to_pylist()
    return pa.table([[MADE] * len(numbers), numbers, contents, [None] * len(numbers)], schema=RAW)
