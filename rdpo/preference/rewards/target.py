"""Answers that are prompts for a target: another model answers them, and another reward scores what it answers.

The score is that reward's mean, negated: what is learnt are the prompts at which the target fails (ReverseGen, arXiv
2410.16736). The target answers all of them before its answers are scored, so that a machine which holds one of the two
models can run both.
"""

from __future__ import annotations

import asyncio
import json
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import SecretStr

from rdpo.cluster.pools import Pool, engine_pool
from rdpo.config import ClassifierReward, FunctionReward, Job, JudgeReward, TargetReward
from rdpo.errors import InputError
from rdpo.files.manifest import Settings
from rdpo.files.unfinished import UNFINISHED, unfinished
from rdpo.modeling.chat import Chat, load_chat, rendering_settings
from rdpo.modeling.reasoning import split_inline
from rdpo.modeling.weights import ModelRef
from rdpo.preference.rewards.classifier import ClassifierKind
from rdpo.preference.rewards.function import FunctionKind
from rdpo.preference.rewards.judge import JudgeKind
from rdpo.preference.rewards.judge_endpoint import READ, WRITTEN
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.scores import REASON_CHARS, Composed, Score, record_scores
from rdpo.records import ID_COLUMN, Messages, Row, alive, clean, draw_seed, drop, table_of
from rdpo.synthesis.asking import ask
from rdpo.synthesis.columns import Needed
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts
from rdpo.synthesis.endpoint import Endpoint
from rdpo.synthesis.engine import Engine, Generation, engine_settings
from rdpo.synthesis.prompts import MESSAGES
from rdpo.synthesis.server import ENDS, check_server, endpoint_key
from rdpo.synthesis.teacher import client_pool, typed
from rdpo.synthesis.voices import engine_models

if TYPE_CHECKING:
    import ray.data
    from ray import ObjectRef
    from ray.actor import ActorHandle

ANSWERED_BY = "_answered_by_"
"""Between an answer's name and the reward's, in the name of the column with the target's answers to it."""
WITHIN: Mapping[type, type[RewardKind[Any]]] = {
    ClassifierReward: ClassifierKind,
    JudgeReward: JudgeKind,
    FunctionReward: FunctionKind,
}
"""Kinds that score the target's answers."""


class TargetKind(RewardKind[TargetReward]):
    """A pool of engines with the target, or the client of its server; and the kind that scores its answers."""

    seeded = True

    @property
    def within(self) -> RewardKind[Any]:
        """The reward that scores the target's answers."""
        return WITHIN[type(self.reward.reward)](self.reward.reward)

    def check_named(self, job: Job) -> None:
        """Try what can be tried of the reward within.

        Raises:
            InputError: it cannot be used.
        """
        self.within.check_named(job)

    def check(self, job: Job) -> None:
        """Look at the target's chat, or for its server's key, and at the reward within.

        Raises:
            InputError: one of them cannot be used.
        """
        if self.reward.endpoint:
            check_server(self.reward.endpoint, f"{self.where}.endpoint")
        else:
            try:
                target_chat(self.reward, job).prompt_ids(put_to(self.reward, "x"))
            except ValueError as error:
                said = "the target's chat template does not take a prompt"
                raise InputError(f"{self.where}: {said}: {error}; name another model, or remove system") from None
        self.within.check(_job_within(self.reward, job))

    def settings(self, job: Job) -> Settings:
        """Its fields, the target's weights, and what the reward within depends on."""
        reward = self.reward
        found = reward.model_dump(exclude={"reward"})
        found["reward"] = self.within.settings(_job_within(reward, job))
        if reward.sampling.temperature > 0:
            found["target_seed"] = job.seed
        if endpoint := reward.endpoint:
            asked = {"endpoint": {"url": endpoint.url, "model": endpoint.model}, "engine": None, "weights": None}
            return {**found, **asked}

        model = ModelRef.of(job, reward.model)
        rendering = rendering_settings(target_chat(reward, job))
        engine = engine_settings(reward.engine, model)
        return {**found, "weights": model.fingerprint(), **rendering, "engine": engine}

    def pools(self, job: Job) -> list[Pool]:
        """The target's, unless it is behind a server, and those of the reward within."""
        own = [] if self.reward.endpoint else [self._pool(job)]
        return [*own, *self.within.pools(job)]

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Have the target answer the answers, and score what it says."""
        import ray

        # Held, for they are read twice: to be scored, and with their scores. The target's engines end with it.
        asked = self._asked(rows, job, answers).materialize()
        shared: dict[str, Any] = {"reward": self.reward, "answers": answers}
        parts = asked.map_batches(conversations, fn_kwargs=shared, batch_format="pyarrow").materialize()
        found: dict[str, Verdict] = {}
        if parts.count():
            scored = self.within.score(parts, _job_within(self.reward, job), names_of(self.reward))
            found = verdicts(scored.iter_batches(batch_format="pyarrow"), self.reward)
        given = {**shared, "found": ray.put(found)}
        return asked.map_batches(with_verdicts, fn_kwargs=given, batch_format="pyarrow")

    def needs_trial(self, job: Job) -> bool:
        """Not where a model that writes the answers is the target, and what scores needs none either."""
        loaded = (self.reward.model or job.student.model) in engine_models(job)
        return self.reward.endpoint is not None or not loaded or self.within.needs_trial(job)

    def in_trial(self) -> TargetReward:
        """With the reward within as in a trial."""
        return self.reward.model_copy(update={"reward": self.within.in_trial()})

    def columns(self) -> list[Needed]:
        """Those that the reward within reads."""
        return self.within.columns()

    def _asked(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        arguments: dict[str, Any] = {"reward": self.reward, "answers": answers, "job": job}
        arguments["crash_counts"] = open_crash_counts()
        if endpoint := self.reward.endpoint:
            client = engine_pool("rewards", f"{self.where}.endpoint", client_pool(self.reward.engine, endpoint), None)
            # The key goes along: a worker on another machine does not have the driver's environment.
            return client.map(rows, ServedTarget, **arguments, key=endpoint_key(endpoint))
        return self._pool(job).map(rows, EngineTarget, **arguments)

    def _pool(self, job: Job) -> Pool:
        nodes, target = job.cluster.placement.reward, ModelRef.of(job, self.reward.model)
        return engine_pool("rewards", f"{self.where}.engine", self.reward.engine, nodes, target)


def _job_within(reward: TargetReward, job: Job) -> Job:
    """The job as the reward within sees it: its conversations have the target's system message."""
    return job.model_copy(update={"prompts": job.prompts.model_copy(update={"system": reward.system, "sources": []})})


def target_chat(reward: TargetReward, job: Job) -> Chat:
    """The target's chat.

    Raises:
        InputError: the model has none.
    """
    given = reward.chat_template_kwargs
    if not (given or reward.model):
        given = job.student.chat_template_kwargs
    return load_chat(ModelRef.of(job, reward.model), job.date, json.dumps(given, sort_keys=True), "free")


def put_to(reward: TargetReward, answer: str) -> Messages:
    """The conversation that the target answers."""
    given: Messages = [{"role": "system", "content": reward.system}] if reward.system else []
    return [*given, {"role": "user", "content": answer}]


def names_of(reward: TargetReward) -> list[str]:
    """Names of the target's answers, as the reward within knows them."""
    return [f"answer_{number}" for number in range(1, reward.samples + 1)]


class Target(ABC):
    """A Ray Data actor that has a target answer the answers of rows: their texts in a column for each answer."""

    counts_tokens = False

    def __init__(self, reward: TargetReward, answers: list[str], job: Job, crash_counts: ActorHandle):
        self.reward, self.answers, self.seed, self.crash_guard = reward, answers, job.seed, CrashGuard(crash_counts)

    @abstractmethod
    async def say(self, messages: Messages, seed: int) -> Generation:
        """What the target answers.

        Raises:
            ValueError: it cannot be asked.
        """

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Put the answers of a block of rows to the target."""
        columns = {f"{answer}{ANSWERED_BY}{self.reward.name}": pa.list_(pa.string()) for answer in self.answers}
        counts = {count + self.reward.name: pa.int64() for count in (READ, WRITTEN) if self.counts_tokens}
        done = table_of(await self.crash_guard.carry(batch.to_pylist(), self.asked))
        yield typed(done, {**columns, **counts, "dropped": pa.string()})

    async def asked(self, row: Row) -> Row:
        """One row with the target's answers; dropped where it cannot be asked, unfinished where its server ended."""
        if not alive(row):
            return row
        try:
            found = await asyncio.gather(*[self._answered(row, answer) for answer in self.answers])
        except ENDS as error:
            return unfinished(row, error)
        except ValueError as error:
            return drop(row, f"reward {self.reward.name}: {error}"[:REASON_CHARS])

        texts: dict[str, list[str]] = {}
        for answer, said in zip(self.answers, found, strict=True):
            texts[f"{answer}{ANSWERED_BY}{self.reward.name}"] = [clean(one.text).strip() for one in said]
        if not self.counts_tokens:
            return {**row, **texts}
        every = [one for said in found for one in said]
        read, written = sum(one.prompt_tokens for one in every), sum(one.tokens for one in every)
        return {**row, **texts, READ + self.reward.name: read, WRITTEN + self.reward.name: written}

    async def _answered(self, row: Row, answer: str) -> list[Generation]:
        messages = put_to(self.reward, row[answer])
        roles = [f"{self.reward.name}:{answer}:{name}" for name in names_of(self.reward)]
        seeds = [draw_seed(self.seed, row[ID_COLUMN], role) for role in roles]
        try:
            return list(await asyncio.gather(*[self.say(messages, seed) for seed in seeds]))
        except ValueError as error:
            raise ValueError(f"the target cannot be asked {answer}: {error}") from None


class EngineTarget(Target):
    """The target is the model of a vLLM engine of this process."""

    def __init__(self, reward: TargetReward, answers: list[str], job: Job, crash_counts: ActorHandle):
        super().__init__(reward, answers, job, crash_counts)
        self.chat = target_chat(reward, job)
        self.engine = Engine(str(ModelRef.of(job, reward.model).folder()), reward.engine, job.seed)

    async def say(self, messages: Messages, seed: int) -> Generation:
        """The answer of the engine."""
        return await ask(self.engine, self.chat, messages, self.reward.sampling, seed)

    def __del__(self) -> None:
        # Ray ends an actor without another word; the processes of its engine would outlive it.
        if hasattr(self, "engine"):
            self.engine.shutdown()


class ServedTarget(Target):
    """The target is a model behind a server."""

    counts_tokens = True

    def __init__(self, reward: TargetReward, answers: list[str], job: Job, crash_counts: ActorHandle, key: SecretStr):
        super().__init__(reward, answers, job, crash_counts)
        if reward.endpoint is None:
            raise ValueError("a target without an endpoint is no server's")
        self.endpoint = Endpoint(reward.endpoint, key, f"rewards.{reward.name}.endpoint")

    async def say(self, messages: Messages, seed: int) -> Generation:
        """The answer of the server, without reasoning that stands before it in the text."""
        sampling, arguments = self.reward.sampling, self.reward.chat_template_kwargs
        said = await self.endpoint.say(messages, sampling, seed, False, **arguments)
        reasoning, text = split_inline(said.text)
        return Generation(text, said.finish_reason, said.tokens, None, said.prompt_tokens, reasoning=reasoning)


def conversations(table: pa.Table, reward: TargetReward, answers: list[str]) -> pa.Table:
    """What the target was asked and answered, a row for each answer of each row that goes on."""
    texts = {name: pa.string() for name in names_of(reward)}
    schema = pa.schema({ID_COLUMN: pa.string(), "prompt": MESSAGES, "extra": pa.string(), **texts})
    parts = []
    for row in table.to_pylist():
        if not alive(row) or row.get(UNFINISHED):
            continue
        for answer in answers:
            said = dict(zip(names_of(reward), row[f"{answer}{ANSWERED_BY}{reward.name}"], strict=True))
            asked = {"prompt": put_to(reward, row[answer]), "extra": row.get("extra") or "{}"}
            parts.append({ID_COLUMN: _part_id(row, answer), **asked, **said})
    return pa.Table.from_pylist(parts, schema=schema)


def _part_id(row: Row, answer: str) -> str:
    return f"{row[ID_COLUMN]}/{answer}"


@dataclass(frozen=True)
class Verdict:
    """What came of the target's answers to one answer: mean scores by name, or why there are none.

    `spent`: tokens that a judge's server read and wrote, by their columns.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    dropped: str = ""
    ended: str = ""
    spent: Mapping[str, int] = field(default_factory=dict)

    def score(self, reward: str) -> Score:
        """The score of the answer that the target was asked."""
        return Composed(-self.scores[reward], self.scores) if self.scores else math.nan


def verdicts(parts: Iterable[pa.Table], reward: TargetReward) -> dict[str, Verdict]:
    """What came of each part, by its id."""
    found = {}
    for part in parts:
        for row in part.to_pylist():
            found[row[ID_COLUMN]] = _verdict(row, reward)
    return found


def _verdict(row: Row, reward: TargetReward) -> Verdict:
    columns = [count + reward.reward.name for count in (READ, WRITTEN)]
    spent = {column: row[column] for column in columns if row.get(column) is not None}
    if row.get(UNFINISHED):
        return Verdict(ended=row[UNFINISHED])
    if not alive(row):
        return Verdict(dropped=row["dropped"], spent=spent)
    every = [row[f"{name}_scores"] for name in names_of(reward)]
    # Of parts of a score only those that all have: prompts may have criteria of their own.
    names = [name for name in every[0] if all(one.get(name) is not None for one in every)]
    return Verdict({name: fmean(one[name] for one in every) for name in names}, spent=spent)


def with_verdicts(
    table: pa.Table, reward: TargetReward, answers: Sequence[str], found: ObjectRef[dict[str, Verdict]]
) -> pa.Table:
    """The rows with the scores of their answers; one of which an answer has none is dropped with the reason."""
    import ray

    known = ray.get(found)
    return table_of([scored_row(row, reward, answers, known) for row in table.to_pylist()])


def scored_row(row: Row, reward: TargetReward, answers: Sequence[str], known: Mapping[str, Verdict]) -> Row:
    """One row with the scores of its answers."""
    for answer in answers:
        verdict = known.get(_part_id(row, answer), Verdict())
        if verdict.ended:
            row = {**row, UNFINISHED: verdict.ended}
        if verdict.dropped:
            row = drop(row, f"reward {reward.name}: the target's answer to {answer}: {verdict.dropped}"[:REASON_CHARS])
        for column, tokens in verdict.spent.items():
            row = {**row, column: (row.get(column) or 0) + tokens}
        [row] = record_scores([row], answer, reward.name, [verdict.score(reward.reward.name)])
    return row
