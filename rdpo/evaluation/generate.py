"""Held-out prompts answered by a model, and how far the trained model moved from its start.

For a column NAME adds the answer, `NAME_finish_reason` and `NAME_tokens`. KL(policy || reference) is the mean of
log pi(y|x) - log ref(y|x) over answers y that are drawn from the policy itself: at temperature 1 and top_p 1, and read
as the very tokens that were drawn. For it the trained model answers some prompts once more, as `DRAWN`, with the token
ids in `drawn_ids`. `kl` is the log-ratio of that answer in nats, and `kl_length` its tokens; what
`evaluation.sampling.max_tokens` cuts off is not counted. Where the reference is in four bits, `kl` holds what they
rounded away too (see `rdpo.modeling.student`).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.cluster.pools import Pool, engine_pool
from rdpo.config import Job, Sampling
from rdpo.config.task import Turn
from rdpo.evaluation.compare import DRAWN, MODELS
from rdpo.modeling.chat import student_chat
from rdpo.modeling.readers import UNREADABLE, answer_logps
from rdpo.modeling.student import frozen_student
from rdpo.modeling.weights import ModelRef
from rdpo.preference.reference import reference_pool
from rdpo.records import ID_COLUMN, Messages, Row, alive, draw_seed, drop, table_of
from rdpo.synthesis.asking import ask
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts
from rdpo.synthesis.engine import Engine, Generation
from rdpo.synthesis.instructions import beginning, load_task, question_of
from rdpo.synthesis.teacher import Conversation
from rdpo.training.backend import backend_of
from rdpo.training.sharded import open_readers

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

FORWARD_ROWS = 8
START, TRAINED = MODELS


def answer_columns(name: str) -> tuple[str, str, str]:
    """What an answer adds to its row, by the name of its column."""
    return (name, f"{name}_finish_reason", f"{name}_tokens")


def answer_prompts(
    rows: list[Row], job: Job, models: Mapping[str, ModelRef], known: Mapping[str, Mapping[str, Row]] | None = None
) -> list[Row]:
    """The prompts' rows with the answers of several models of one architecture, by column.

    `models` are names, as each node has its own cache of models. Each engine answers with one model after the other, so
    that it is started once. What is `known`, by column and prompt, is not asked again: the three columns of
    `answer_columns`.
    """
    import ray.data

    posed = questions(rows, job)
    asked: list[Row] = []
    for column in models:
        asked += [{**row, "contender": column} for row in posed]

    if TRAINED in models and not job.evaluation.refine:
        models = {**models, DRAWN: models[TRAINED]}
        # KL is measured on the first prompts by their ids, so that all runs of a comparison measure it on the same.
        first = sorted(posed, key=lambda row: row[ID_COLUMN])[: job.evaluation.kl_answers]
        asked += [{**row, "contender": DRAWN} for row in first]

    found = [_recalled(row, known or {}) for row in asked]
    new = [row for row, answered in zip(asked, found, strict=True) if answered is None]
    answers = [row for row in found if row]
    if new:
        wanted = {row["contender"] for row in new}
        used = {column: model for column, model in models.items() if column in wanted}
        source = ray.data.from_arrow(table_of(new))
        arguments = {"job": job, "models": used, "crash_counts": open_crash_counts()}
        answers += answer_pool(job).map(source, Answerer, **arguments).take_all()
    return side_by_side(answers, list(models))


def answer_pool(job: Job) -> Pool:
    """The engines that answer held-out prompts."""
    nodes, student = job.cluster.placement.teacher, ModelRef.student(job)
    return engine_pool("evaluation", "evaluation.engine", job.evaluation.engine, nodes, student)


def _recalled(row: Row, known: Mapping[str, Mapping[str, Row]]) -> Row | None:
    answer = known.get(row["contender"], {}).get(row[ID_COLUMN])
    return {**row, **answer, "dropped": None} if answer else None


def questions(rows: list[Row], job: Job) -> list[Row]:
    """The rows, with the question of the turn that `evaluation.condition` names in place of their prompts."""
    if not (job.evaluation.condition and job.synthesis.task):
        return rows
    turn = beginning(load_task(job.synthesis.task), job.evaluation.condition)
    return [{**row, "prompt": question_of(turn, row, job.synthesis.values)} for row in rows]


def side_by_side(answered: list[Row], columns: list[str]) -> list[Row]:
    """One row for each prompt, from one for each prompt and model; what drops one of them drops the prompt."""
    merged: dict[str, Row] = {}
    for row in answered:
        others = [column for column in columns if column != row["contender"]]
        # A table of rows for several models has the columns of all of them in every row, null where they are others'.
        own = {name: value for name, value in row.items() if not name.startswith(tuple(others))}
        known = merged.setdefault(row[ID_COLUMN], own)
        known.update({**own, "dropped": known.get("dropped") or own.get("dropped")})
    for row in merged.values():
        del row["contender"]
    return list(merged.values())


class Answerer:
    """A Ray Data actor that answers prompts, each with the model it is meant for; all draw with the same seeds."""

    def __init__(self, job: Job, models: Mapping[str, ModelRef], crash_counts: ActorHandle):
        self.job, self.crash_guard = job, CrashGuard(crash_counts)
        self.models = {column: str(model.folder()) for column, model in models.items()}
        self.chat = student_chat(job)
        self.engine = Engine(next(iter(self.models.values())), job.evaluation.engine, job.seed)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Answer a block of rows."""
        answered = await self.crash_guard.carry(
            batch.to_pylist(), self.answer, lambda row: f"{row['contender']}:{row[ID_COLUMN]}"
        )
        yield table_of(answered)

    async def answer(self, row: Row) -> Row:
        """One row with the answer of the model that it is meant for."""
        column = row["contender"]
        # In every row, also one that is dropped: the blocks of a table must have the same columns.
        row = {**row, column: "", f"{column}_finish_reason": "length", f"{column}_tokens": 0}
        role = "divergence" if column == DRAWN else "evaluation"
        if self.chat.reasoning:
            row[f"{column}_reasoning"] = ""

        try:
            async with self.engine.holding(self.models[column]):
                if column == TRAINED and self.job.evaluation.refine:
                    return await self._refined(row)
                seed = draw_seed(self.job.seed, row[ID_COLUMN], role)
                if column == DRAWN:
                    generation = await self._draw(row["prompt"], seed)
                else:
                    generation = await self._say(row["prompt"], self.job.evaluation.sampling, seed)
        except ValueError as error:
            # The engine refuses the request, or the chat template the conversation.
            return drop(row, str(error))

        row[column] = generation.text.strip()
        row[f"{column}_finish_reason"] = generation.finish_reason
        row[f"{column}_tokens"] = generation.tokens
        if self.chat.reasoning:
            row[f"{column}_reasoning"] = generation.reasoning
        if column == DRAWN:
            row[f"{column}_ids"] = list(generation.token_ids)
        return row

    async def _refined(self, row: Row) -> Row:
        """The row with the answer that the task's turns lead to, as the trained model speaks them."""
        task, final = load_task(self.job.synthesis.task or ""), self.job.pairs.chosen

        async def say(messages: Messages, turn: Turn, sampling: Sampling, seed: int) -> Generation:
            return await self._say(messages, sampling, seed, turn.prefill)

        # Of a copy, for the turns are written into the row.
        refined = await Conversation(self.job, task, self.job.evaluation.sampling, say, self.chat)(dict(row))
        if refined.get("dropped"):
            return drop(row, refined["dropped"])
        answer = {TRAINED + end: refined[final + end] for end in ("", "_finish_reason", "_tokens")}
        return {**row, **answer}

    async def _draw(self, messages: Messages, seed: int) -> Generation:
        """An answer from the model's own distribution; one that thinks first does so within the same tokens."""
        sampling, prompt = self.job.evaluation.sampling, self.chat.prompt_ids(messages)
        most = sampling.max_tokens + (sampling.max_reasoning_tokens if self.chat.reasoning else 0)
        drawn = sampling.untempered().model_copy(update={"max_tokens": most})
        return await self.engine.generate(prompt, drawn, seed, self.chat.stop_ids)

    async def _say(self, messages: Messages, sampling: Sampling, seed: int, prefill: str = "") -> Generation:
        return await ask(self.engine, self.chat, messages, sampling, seed, prefill)

    def __del__(self) -> None:
        # Ray ends an actor without another word; the processes of its engine would outlive it.
        if hasattr(self, "engine"):
            self.engine.shutdown()


def divergence_pool(job: Job) -> Pool:
    """The actors that measure KL. They take the place of the reference pool, which has ended by then."""
    pool = reference_pool(job)
    return replace(pool, block_rows=FORWARD_ROWS * pool.shards)


def add_divergence(
    rows: ray.data.Dataset, job: Job, trained: str, column: str, passes: int | None = None
) -> ray.data.Dataset:
    """Add `kl` and `kl_length` of the trained model's answers in `column`.

    On the CPU an actor holds both models. A GPU may have room for one of them alone, so there the trained model reads
    all rows before the start model does.

    Args:
        rows: with the answers.
        job: the job.
        trained: address of the trained model's folder.
        column: the answers' name.
        passes: 1 or 2, in place of that choice.
    """
    pool = divergence_pool(job)
    models = {TRAINED: trained, START: None}
    if passes is None:
        passes = 2 if pool.gpus else 1
    if passes == 1:
        return pool.map(rows, Divergence, job=job, models=models, column=column)
    for side, folder in models.items():
        # Made before the next model is loaded.
        rows = pool.map(rows, Divergence, job=job, models={side: folder}, column=column).materialize()
    return rows


class Divergence:
    """A Ray Data actor that holds the start model, the trained one, or both; the last to read a row makes its `kl`.

    `models`: addresses of their folders by side, None for the start.
    """

    def __init__(self, job: Job, models: Mapping[str, str | None], column: str):
        self.column, self.chat = column, student_chat(job)
        frozen = [frozen_student(job, folder) for folder in models.values()]
        budget, pool = job.reference.tokens_per_batch, divergence_pool(job)
        self.readers = dict(
            zip(models, open_readers(frozen, pool, budget, backend_of(job), job.reference.cpus), strict=True)
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Measure a block of rows."""
        rows = batch.to_pylist()
        ids = f"{self.column}_ids"
        answered = [index for index, row in enumerate(rows) if alive(row) and (row.get(ids) or row.get(self.column))]
        for side, reader in self.readers.items():
            rows = [{**row, f"{side}_logp": None, f"{side}_length": None} for row in rows]
            found = answer_logps([rows[index] for index in answered], self.column, self.chat, reader)
            for index, logp in zip(answered, found, strict=True):
                rows[index] |= {f"{side}_logp": logp.nats, f"{side}_length": logp.tokens}
        return table_of([_with_kl(row) for row in rows])


def _with_kl(row: Row) -> Row:
    """The row with its log-ratio, once both models have read it; dropped where one of them cannot."""
    names = [f"{side}_{end}" for side in (TRAINED, START) for end in ("logp", "length")]
    if not all(name in row for name in names):
        return row

    after, length, before, _ = (row.pop(name) for name in names)
    row = {**row, "kl": None, "kl_length": None}
    if after is None:
        return row
    if math.isnan(after - before):
        return drop(row, UNREADABLE)
    return {**row, "kl": after - before, "kl_length": length}
