"""The teacher: one engine, or one client of a server, carries each row through all turns of its task.

A row's next turn starts when its last one ends, whatever the other rows do, and finds its own
conversation in the prefix cache. Adds, for each turn: the answer under the turn's name,
`NAME_finish_reason`, `NAME_tokens`, in `NAME_prompt_length` the tokens of the conversation before it, and in
`NAME_prompt_cached` how many of these the engine found in its prefix cache. Where the teacher thinks, `NAME_reasoning`
is what it thought: later turns do not see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from pydantic import SecretStr

from rdpo.cluster.pools import Pool, engine_pool
from rdpo.config import Endpoint as EndpointSettings
from rdpo.config import Engine as EngineSettings
from rdpo.config import Job, Sampling
from rdpo.config import Server as ServerSettings
from rdpo.config.task import Task, Turn
from rdpo.errors import InputError
from rdpo.files.unfinished import unfinished
from rdpo.modeling.chat import Chat, teacher_chat
from rdpo.modeling.weights import ModelRef, local_adapter
from rdpo.records import ID_COLUMN, Messages, Row, clean, draw_seed, drop, table_of
from rdpo.synthesis.asking import ask
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts
from rdpo.synthesis.endpoint import Endpoint
from rdpo.synthesis.engine import Engine, Generation
from rdpo.synthesis.instructions import load_task, rendered_prefill, template_values, turn_messages
from rdpo.synthesis.server import ENDS, endpoint_key

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

REASON_CHARS = 300


def teacher_model(job: Job) -> str:
    """Name of the teacher's model: its own, or the student's."""
    return job.synthesis.teacher or job.student.model


def synthesize(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Add the answers of every turn of the task to the rows of prompts."""
    endpoint = job.synthesis.endpoint
    speaker: Callable[[Job], Speaker] = EngineSpeaker
    if endpoint:
        # The key goes along: a worker on another machine does not have the driver's environment.
        speaker = partial(EndpointSpeaker, key=endpoint_key(endpoint), settings=endpoint)
    return teacher_pool(job).map(rows, Teacher, job=job, speaker_class=speaker, crash_counts=open_crash_counts())


def teacher_pool(job: Job) -> Pool:
    """The teacher's engines, or the one client of its endpoint."""
    synthesis = job.synthesis
    if synthesis.endpoint:
        return engine_pool("synthesis", "synthesis.endpoint", client_pool(synthesis.engine, synthesis.endpoint), None)
    nodes, teacher = job.cluster.placement.teacher, ModelRef.of(job, synthesis.teacher)
    return engine_pool("synthesis", "synthesis.engine", synthesis.engine, nodes, teacher)


def client_pool(engine: EngineSettings, endpoint: ServerSettings) -> EngineSettings:
    """One actor without an engine, with enough rows in flight to keep all of the endpoint's places taken."""
    client = engine.model_copy(update={"concurrency": 1, "gpus": 0, "cpus": 1})
    # Twice as many rows as places, so that one is there when a place becomes free.
    blocks = max(2, -(-2 * endpoint.concurrency // client.rows_in_block))
    return client.model_copy(update={"batches_in_flight": blocks})


class Speaker(Protocol):
    """Who speaks a turn; after one of the errors in `ends` it speaks no other."""

    ends: tuple[type[Exception], ...]

    async def say(self, messages: Messages, turn: Turn, sampling: Sampling, seed: int) -> Generation:
        """The answer to a conversation, without the turn's prefill, which is rendered already."""

    def shutdown(self) -> None:
        """Give back what it holds."""


class EngineSpeaker:
    """A vLLM engine of this process."""

    ends: tuple[type[Exception], ...] = ()

    def __init__(self, job: Job):
        model = ModelRef.of(job, job.synthesis.teacher)
        self.chat = teacher_chat(job)
        worn = str(local_adapter(job.synthesis.adapter)) if job.synthesis.adapter else None
        self.engine = Engine(str(model.folder()), job.synthesis.engine, job.seed, worn)

    async def say(self, messages: Messages, turn: Turn, sampling: Sampling, seed: int) -> Generation:
        """The answer by the engine."""
        return await ask(self.engine, self.chat, messages, sampling, seed, turn.prefill)

    def shutdown(self) -> None:
        """End the engine."""
        self.engine.shutdown()


class EndpointSpeaker:
    """A server elsewhere."""

    ends = ENDS

    def __init__(self, job: Job, key: SecretStr, settings: EndpointSettings):
        self.endpoint = Endpoint(settings, key)
        self.reasons, self.arguments = job.synthesis.reasoning != "off", job.synthesis.chat_template_kwargs

    async def say(self, messages: Messages, turn: Turn, sampling: Sampling, seed: int) -> Generation:
        """The answer by the server."""
        return await self.endpoint.say(messages, sampling, seed, self.reasons, **self.arguments)

    def shutdown(self) -> None:
        """Nothing is held."""


class Teacher:
    """A Ray Data actor that speaks every turn of a row's conversation."""

    def __init__(self, job: Job, speaker_class: Callable[[Job], Speaker], crash_counts: ActorHandle):
        self.crash_guard = CrashGuard(crash_counts)
        task = load_task(job.synthesis.task or "")
        self.speaker = speaker_class(job)
        self.conversation = Conversation(job, task, job.synthesis.sampling, self.speaker.say)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Carry a block of rows through all turns."""
        yield table_of(await self.crash_guard.carry(batch.to_pylist(), self.converse))

    async def converse(self, row: Row) -> Row:
        """Carry one row through all turns; one that the speaker's end leaves without them is marked `unfinished`."""
        try:
            return await self.conversation(row)
        except self.speaker.ends as error:
            return unfinished(row, error)

    def __del__(self) -> None:
        # Ray ends an actor without another word; the processes of its engine would outlive it.
        if hasattr(self, "speaker"):
            self.speaker.shutdown()


@dataclass(frozen=True)
class Conversation:
    """The turns of a task, spoken by somebody; `sampling` is what turns have without settings of their own."""

    job: Job
    task: Task
    sampling: Sampling
    say: Callable[[Messages, Turn, Sampling, int], Awaitable[Generation]]

    async def __call__(self, row: Row) -> Row:
        """Carry one row through all turns; a turn that cannot be spoken drops the row."""
        conversations: dict[str, Messages] = {}
        values = template_values(row, self.job.synthesis.values)
        for turn in self.task.turns:
            # All samples at once: the engine computes their common beginning once, and them in one batch.
            spoken = await asyncio.gather(*[self._speak(turn, name, row, values, conversations) for name in turn.names])
            reason = next((reason for reason in spoken if reason), None)
            if reason:
                return drop(row, reason)
            values.update({name: row[name] for name in turn.names})
        return row

    async def _speak(
        self, turn: Turn, name: str, row: Row, values: dict[str, Any], conversations: dict[str, Messages]
    ) -> str | None:
        """Write one answer of a turn into the row; the reason if that cannot be done."""
        sampling = turn_sampling(turn, self.sampling)
        seed = draw_seed(self.job.seed, row[ID_COLUMN], name)
        try:
            messages = turn_messages(turn, row, values, conversations)
            prefill = rendered_prefill(turn, values)
            generation = await self.say(messages, turn.model_copy(update={"prefill": prefill}), sampling, seed)
        except ValueError as error:
            return f"{name}: {error}"[:REASON_CHARS]

        # With the prefill: the student is to write these words by itself.
        answer = row[name] = clean(prefill + generation.text).strip()
        row[f"{name}_finish_reason"] = generation.finish_reason
        row[f"{name}_tokens"] = generation.tokens
        row[f"{name}_prompt_length"] = generation.prompt_tokens
        row[f"{name}_prompt_cached"] = generation.cached_tokens
        if self.job.synthesis.reasoning != "off":
            row[f"{name}_reasoning"] = clean(generation.reasoning)
        conversations[name] = [*messages, {"role": "assistant", "content": answer}]
        return None if answer else f"{name} is empty"


def check_conversations(task: Task, chat: Chat, system: str | None) -> None:
    """Try the teacher's chat template on the roles of every turn's conversation; `system` stands in all prompts.

    Raises:
        InputError: it refuses one, or leaves out a part of it.
    """
    conversations: dict[str, Messages] = {}
    for turn in task.turns:
        if turn.after is not None:
            messages = [*conversations[turn.after], {"role": "user", "content": "x"}]
        elif turn.system is not None or (system and turn.user is None):
            messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        else:
            messages = [{"role": "user", "content": "x"}]
        try:
            chat.prompt_ids(messages)
        except ValueError as error:
            raise InputError(
                f"synthesis.task: turn `{turn.name}`: the chat template of the teacher does not take its conversation: "
                f"{error}"
            ) from None
        for name in turn.names:
            conversations[name] = [*messages, {"role": "assistant", "content": "x"}]


def turn_sampling(turn: Turn, common: Sampling) -> Sampling:
    """The task's common sampling with a turn's own settings over it."""
    own = {"temperature": turn.temperature, "top_p": turn.top_p, "max_tokens": turn.max_tokens}
    return common.model_copy(update={key: value for key, value in own.items() if value is not None})
