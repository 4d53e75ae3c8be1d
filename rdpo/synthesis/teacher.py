"""The teacher: one engine carries each row through all turns of its task.

A row's next turn starts when its last one ends, whatever the other rows do, and finds its own
conversation in the prefix cache. Adds, for each turn: the answer under the turn's name,
`NAME_finish_reason` and `NAME_tokens`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.config import Job, Sampling
from rdpo.policy.chat import load_chat
from rdpo.policy.models import local_model
from rdpo.records import Messages, Row, draw_seed, drop, table_of
from rdpo.synthesis.engine import Engine, engine_pool, gather_rows
from rdpo.synthesis.instructions import Turn, load_task, template_values, turn_messages

if TYPE_CHECKING:
    import ray.data


def teacher_model(job: Job) -> str:
    """Name of the teacher's model: its own, or the student's."""
    return job.synthesis.teacher or job.student.model


def synthesize(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Add the answers of every turn of the task to the rows of prompts."""
    return engine_pool(rows, Teacher, job.synthesis.engine, {"job": job})


class Teacher:
    """A Ray Data actor that owns one engine and speaks every turn of a row's conversation."""

    def __init__(self, job: Job):
        self.job = job
        assert job.synthesis.task is not None
        self.task = load_task(job.synthesis.task)
        self.chat = load_chat(teacher_model(job), trust_remote_code=job.student.trust_remote_code)
        folder = str(local_model(teacher_model(job)))
        self.engine = Engine(folder, job.synthesis.engine, job.seed)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Carry a block of rows through all turns."""
        rows = await gather_rows([self.converse(row) for row in batch.to_pylist()])
        yield table_of(rows)

    async def converse(self, row: Row) -> Row:
        """Carry one row through all turns; a turn that cannot be spoken drops the row."""
        told: dict[str, Messages] = {}
        values = template_values(row)
        for turn in self.task.turns:
            try:
                messages = turn_messages(turn, row, values, told)
                await self._speak(turn, row, messages)
            except ValueError as error:
                return drop(row, f"{turn.name}: {error}"[:300])
            answer = values[turn.name] = row[turn.name]
            told[turn.name] = [*messages, {"role": "assistant", "content": answer}]
            if not answer.strip():
                return drop(row, f"{turn.name} is empty")
        return row

    async def _speak(self, turn: Turn, row: Row, messages: Messages) -> None:
        generation = await self.engine.generate(
            self.chat.prompt_ids(messages, turn.prefill),
            turn_sampling(turn, self.job.synthesis.sampling),
            draw_seed(self.job.seed, row["prompt_id"], turn.name),
            self.chat.stop_ids,
        )
        row[turn.name] = (turn.prefill + generation.text).strip()
        row[f"{turn.name}_finish_reason"] = generation.finish_reason
        row[f"{turn.name}_tokens"] = generation.tokens

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()


def turn_sampling(turn: Turn, common: Sampling) -> Sampling:
    """The task's common sampling with a turn's own settings over it."""
    own: dict[str, Any] = {
        "temperature": turn.temperature,
        "top_p": turn.top_p,
        "max_tokens": turn.max_tokens,
    }
    return common.model_copy(update={key: value for key, value in own.items() if value is not None})
