"""The teacher: one engine, or one client of a server, carries each row through all turns of its task.

Where turns have voices of their own, each of these does so with the turns that are its own (`rdpo.synthesis.voices`).

A row's next turn starts when its last one ends, whatever the other rows do, and finds its own
conversation in the prefix cache. Adds, for each turn: the answer under the turn's name,
`NAME_finish_reason`, `NAME_tokens`, in `NAME_prompt_length` the tokens of the conversation before it, and in
`NAME_prompt_cached` how many of these the engine found in its prefix cache. Where the teacher thinks, `NAME_reasoning`
is what it thought: later turns do not see it. `NAME_voice` is the voice that was drawn, where a turn has several.
`NAME_drawn` are the tokens of the answer, where the student's tokenizer has the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
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
from rdpo.modeling.chat import Chat, same_tokens, teacher_chat
from rdpo.modeling.weights import ModelRef, local_adapter
from rdpo.records import DRAWN, ID_COLUMN, VOICE, Messages, Row, alive, clean, draw_seed, drop, table_of, unit_draw
from rdpo.synthesis.asking import ask
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts
from rdpo.synthesis.endpoint import TEACHER as TEACHER_ENDPOINT
from rdpo.synthesis.endpoint import Endpoint
from rdpo.synthesis.engine import Engine, Generation
from rdpo.synthesis.instructions import given_answer, load_task, rendered_prefill, template_values, turn_messages
from rdpo.synthesis.rewriting import cut_answer, joined
from rdpo.synthesis.server import ENDS, endpoint_key
from rdpo.synthesis.voices import TEACHER, Leg, drawn_voices, is_drawn, legs, spoken_by, table_of_voice

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

REASON_CHARS = 300


def synthesize(rows: ray.data.Dataset, job: Job, leg: Leg | None = None) -> ray.data.Dataset:
    """Add the answers of every turn of the task to the rows of prompts; of the turns of one leg, where there are more.

    Rows that an earlier leg dropped pass as they are.
    """
    voice = leg.voice if leg else TEACHER
    endpoint = spoken_by(job, voice).synthesis.endpoint
    speaker: Callable[[Job], Speaker] = EngineSpeaker
    if endpoint:
        # The key goes along: a worker on another machine does not have the driver's environment.
        key, where = endpoint_key(endpoint), f"{table_of_voice(voice)}.endpoint"
        speaker = partial(EndpointSpeaker, key=key, settings=endpoint, where=where)
    arguments = {"job": job, "speaker_class": speaker, "crash_counts": open_crash_counts(), "leg": leg}
    return speaker_pool(job, voice).map(rows, Teacher, **arguments)


def speaker_pool(job: Job, voice: str | None = TEACHER) -> Pool:
    """The engines of the teacher, or of a voice; or the one client of its endpoint."""
    seen, table = spoken_by(job, voice), table_of_voice(voice)
    synthesis, nodes = seen.synthesis, job.cluster.placement.teacher
    if synthesis.endpoint:
        client = client_pool(synthesis.engine, synthesis.endpoint)
        return engine_pool("synthesis", f"{table}.endpoint", client, None)
    model = ModelRef.of(seen, synthesis.teacher)
    return engine_pool("synthesis", f"{table}.engine", synthesis.engine, nodes, model)


def speaker_pools(job: Job) -> list[Pool]:
    """The pools of engines that speak, in the order of the legs; clients hold no model, and wait most of the time."""
    pools = [speaker_pool(job, leg.voice) for leg in legs(load_task(job.synthesis.task or ""))]
    return [pool for pool in pools if pool.holds]


def client_pool(engine: EngineSettings, endpoint: ServerSettings) -> EngineSettings:
    """One actor without an engine, with enough rows in flight to keep all of the endpoint's places taken."""
    client = engine.model_copy(update={"concurrency": 1, "gpus": 0, "cpus": 1})
    # Twice as many rows as places, so that one is there when a place becomes free.
    blocks = max(2, -(-2 * endpoint.concurrency // client.rows_in_block))
    return client.model_copy(update={"batches_in_flight": blocks})


class Speaker(Protocol):
    """Who speaks a turn; after one of the errors in `ends` it speaks no other.

    `keeps_tokens`: its answers come with their tokens (`Generation.drawn`), which are the student's too.
    """

    ends: tuple[type[Exception], ...]
    keeps_tokens: bool

    @property
    def chat(self) -> Chat | None:
        """The tokenizer and template of its model; None of a server's."""

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
        # With reasoning before them the tokens of answers are not told apart.
        self.keeps_tokens = self.chat.reasoning is None and same_tokens(model, ModelRef.student(job))
        self.engine = open_engine(job)

    async def say(self, messages: Messages, turn: Turn, sampling: Sampling, seed: int) -> Generation:
        """The answer by the engine."""
        said = await ask(self.engine, self.chat, messages, sampling, seed, turn.prefill)
        return replace(said, drawn=self._drawn(messages, turn, said)) if self.keeps_tokens else said

    def _drawn(self, messages: Messages, turn: Turn, said: Generation) -> tuple[int, ...]:
        """The tokens of an answer, those of the turn's prefill before it."""
        ended = said.token_ids and said.token_ids[-1] in self.chat.stop_ids
        own = said.token_ids[:-1] if ended else said.token_ids
        if not turn.prefill:
            return own
        asked, begun = self.chat.prompt_ids(messages), self.chat.prompt_ids(messages, turn.prefill)
        return (*begun[len(asked) :], *own)

    def shutdown(self) -> None:
        """End the engine."""
        self.engine.shutdown()


def open_engine(job: Job) -> Engine:
    """An engine in this process with the model of the job's teacher."""
    model = ModelRef.of(job, job.synthesis.teacher)
    worn = str(local_adapter(job.synthesis.adapter)) if job.synthesis.adapter else None
    return Engine(str(model.folder()), job.synthesis.engine, job.seed, worn)


class EndpointSpeaker:
    """A server elsewhere."""

    ends = ENDS
    keeps_tokens = False
    chat = None

    def __init__(self, job: Job, key: SecretStr, settings: EndpointSettings, where: str = TEACHER_ENDPOINT):
        self.endpoint = Endpoint(settings, key, where)
        self.reasons, self.arguments = job.synthesis.reasoning != "off", job.synthesis.chat_template_kwargs

    async def say(self, messages: Messages, turn: Turn, sampling: Sampling, seed: int) -> Generation:
        """The answer by the server."""
        return await self.endpoint.say(messages, sampling, seed, self.reasons, **self.arguments)

    def shutdown(self) -> None:
        """Nothing is held."""


class Teacher:
    """A Ray Data actor that speaks the turns of a row's conversation: every one, or those of a leg."""

    def __init__(
        self,
        job: Job,
        speaker_class: Callable[[Job], Speaker],
        crash_counts: ActorHandle,
        leg: Leg | None = None,
    ):
        self.crash_guard = CrashGuard(crash_counts)
        task, seen = load_task(job.synthesis.task or ""), spoken_by(job, leg.voice if leg else TEACHER)
        self.speaker = speaker_class(seen)
        sampling, keeps = seen.synthesis.sampling, self.speaker.keeps_tokens
        self.conversation = Conversation(job, task, sampling, self.speaker.say, self.speaker.chat, leg, keeps)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Carry a block of rows through the turns."""
        done = table_of(await self.crash_guard.carry(batch.to_pylist(), self.converse))
        yield typed(done, {**self.conversation.columns(), "dropped": pa.string()})

    async def converse(self, row: Row) -> Row:
        """Carry one row through the turns; one that the speaker's end leaves without them is marked `unfinished`."""
        if not alive(row):
            return row
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
    """The turns of a task, spoken by somebody; `sampling` is what turns have without settings of their own.

    `chat` is the speaker's, for turns that rewrite an answer. With a `leg`, its turns alone, and of those that several
    voices speak the answers that are drawn for its voice. What earlier legs wrote stands in the row.
    """

    job: Job
    task: Task
    sampling: Sampling
    say: Callable[[Messages, Turn, Sampling, int], Awaitable[Generation]]
    chat: Chat | None = None
    leg: Leg | None = None
    keeps_tokens: bool = False

    async def __call__(self, row: Row) -> Row:
        """Carry one row through its turns; a turn that cannot be spoken drops the row."""
        conversations: dict[str, Messages] = {}
        values = template_values(row, self.job.synthesis.values)
        for turn in self.task.turns:
            names = self._spoken_here(turn, row)
            # All samples at once: the engine computes their common beginning once, and them in one batch.
            spoken = await asyncio.gather(*[self._speak(turn, name, row, values, conversations) for name in names])
            reason = next((reason for reason in spoken if reason), None)
            if reason:
                return drop(row, reason)
            self._recall(turn, row, values, conversations)
        return row

    def columns(self) -> dict[str, pa.DataType]:
        """The columns that these turns add, with their types: a block may have no row that this voice is drawn for."""
        turns = [turn for turn in self.task.turns if self.leg is None or turn.name in self.leg.turns]
        text, number = pa.string(), pa.int64()
        beside = {"": text, "_finish_reason": text, "_tokens": number}
        beside |= {"_prompt_length": number, "_prompt_cached": number}
        beside |= {"_reasoning": text} if self.job.synthesis.reasoning != "off" else {}
        beside |= {DRAWN: pa.list_(pa.int32())} if self.keeps_tokens else {}
        found = {f"{name}{end}": kind for turn in turns for name in turn.names for end, kind in beside.items()}
        return found | {f"{name}{VOICE}": text for turn in turns if is_drawn(turn) for name in turn.names}

    def _spoken_here(self, turn: Turn, row: Row) -> list[str]:
        """Names of the answers of a turn that are spoken here."""
        if self.leg is None:
            return turn.names
        if turn.name not in self.leg.turns:
            return []
        drawn = drawn_voices(turn, row[ID_COLUMN], self.job)
        return [name for name in turn.names if drawn[name] == self.leg.voice]

    def _recall(self, turn: Turn, row: Row, values: dict[str, Any], conversations: dict[str, Messages]) -> None:
        """Let later turns know the answers of a turn that are there, spoken here or by an earlier leg."""
        there = [name for name in turn.names if row.get(name) is not None]
        for name in there:
            if name not in conversations:
                asked = turn_messages(turn, row, values, conversations)
                conversations[name] = [*asked, {"role": "assistant", "content": row[name]}]
        values.update({name: row[name] for name in there})

    async def _speak(
        self, turn: Turn, name: str, row: Row, values: dict[str, Any], conversations: dict[str, Messages]
    ) -> str | None:
        """Write one answer of a turn into the row; the reason if that cannot be done."""
        try:
            messages = turn_messages(turn, row, values, conversations)
            generation = await self._answer(turn, name, row, values, messages)
        except ValueError as error:
            return f"{name}: {error}"[:REASON_CHARS]

        answer = row[name] = clean(generation.text).strip()
        row[f"{name}_finish_reason"] = generation.finish_reason
        row[f"{name}_tokens"] = generation.tokens
        row[f"{name}_prompt_length"] = generation.prompt_tokens
        row[f"{name}_prompt_cached"] = generation.cached_tokens
        if self.job.synthesis.reasoning != "off":
            row[f"{name}_reasoning"] = clean(generation.reasoning)
        if self.leg and is_drawn(turn):
            row[f"{name}{VOICE}"] = self.leg.voice
        if self.keeps_tokens:
            row[f"{name}{DRAWN}"] = list(generation.drawn)
        conversations[name] = [*messages, {"role": "assistant", "content": answer}]
        return None if answer else f"{name} is empty"

    async def _answer(self, turn: Turn, name: str, row: Row, values: dict[str, Any], messages: Messages) -> Generation:
        """An answer with all its words, those that the model was given among them: the student is to write them too.

        Raises:
            ValueError: it cannot be had; the message says why.
        """
        if turn.given is not None:
            return Generation(given_answer(turn, values), "stop", 0)

        sampling = turn_sampling(turn, self.sampling)
        seed = draw_seed(self.job.seed, row[ID_COLUMN], name)
        if turn.rewrites:
            return await self._rewritten(turn, name, row, messages, sampling, seed)
        prefill = rendered_prefill(turn, values)
        said = await self.say(messages, turn.model_copy(update={"prefill": prefill}), sampling, seed)
        return replace(said, text=prefill + said.text)

    async def _rewritten(
        self, turn: Turn, name: str, row: Row, messages: Messages, sampling: Sampling, seed: int
    ) -> Generation:
        """An earlier answer with a segment written anew."""
        # A server, which has no chat, is refused before.
        assert turn.rewrites is not None and self.chat is not None

        def draw(place: int) -> float:
            return unit_draw(self.job.seed, row[ID_COLUMN], f"{name} from {place}")

        cut = cut_answer(row[turn.rewrites], self.chat, sampling.max_tokens, draw)
        begun, limited = turn.model_copy(update={"prefill": cut.before}), {"max_tokens": cut.length}
        said = await self.say(messages, begun, sampling.model_copy(update=limited), seed)
        return joined(cut, said, row[f"{turn.rewrites}_finish_reason"], self.chat)


def typed(table: pa.Table, columns: dict[str, pa.DataType]) -> pa.Table:
    """The table with these columns behind its others in any case, and of these types."""
    for name, kind in columns.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, kind))
        elif table.schema.field(name).type != kind:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return table.select([*(name for name in table.column_names if name not in columns), *columns])


def check_conversations(task: Task, chat: Chat, system: str | None, voice: str | None = TEACHER) -> None:
    """Try a speaker's chat template on the roles of its turns' conversations; `system` stands in all prompts.

    Raises:
        InputError: it refuses one, or leaves out a part of it.
    """
    conversations: dict[str, Messages] = {}
    speaker = "the teacher" if voice is TEACHER else voice
    for turn in task.turns:
        if turn.after is not None:
            messages = [*conversations[turn.after], {"role": "user", "content": "x"}]
        elif turn.system is not None or (system and turn.user is None):
            messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        else:
            messages = [{"role": "user", "content": "x"}]
        try:
            if voice in turn.voices:
                chat.prompt_ids(messages)
        except ValueError as error:
            raise InputError(
                f"synthesis.task: turn `{turn.name}`: the chat template of {speaker} does not take its conversation: "
                f"{error}"
            ) from None
        for name in turn.names:
            conversations[name] = [*messages, {"role": "assistant", "content": "x"}]


def turn_sampling(turn: Turn, common: Sampling) -> Sampling:
    """The task's common sampling with a turn's own settings over it."""
    own = {"temperature": turn.temperature, "top_p": turn.top_p, "max_tokens": turn.max_tokens}
    return common.model_copy(update={key: value for key, value in own.items() if value is not None})
