"""Which rows the rewards are to score, by what the student says of its answers before (APL, arXiv 2402.08114).

    entropy     -(1/N) sum_i log pi(y_i|x) of N samples y_i: how much the answers to a prompt differ
    certainty   max over i, j of rho_i - rho_j, rho = log pi(y|x) - log ref(y|x): how far one answer is preferred

Kept are the rows with the highest entropy, and of these the ones with the largest certainty. The factor beta of
implicit rewards is left out, which changes no order. The log-probs come from the forward that training uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.cluster.hardware import allocator_environment
from rdpo.cluster.pools import Held, Pool
from rdpo.config import Job, Selection
from rdpo.config.task import Turn
from rdpo.errors import InputError
from rdpo.modeling.chat import chat_like_student, student_chat
from rdpo.modeling.readers import UNREADABLE, AnswerLogp, FrozenModel, answer_logps
from rdpo.modeling.student import checked_model, forward_settings, frozen_student
from rdpo.modeling.weights import ModelRef
from rdpo.preference.pairs import scored_answers
from rdpo.preference.rewards.implicit import PROBE_TEXT
from rdpo.records import ID_COLUMN, Row, alive, drop, rows_of, table_of
from rdpo.synthesis.instructions import load_task
from rdpo.synthesis.teacher import turn_sampling
from rdpo.training.backend import backend_of
from rdpo.training.sharded import open_readers

if TYPE_CHECKING:
    import ray.data

ENTROPY, CERTAINTY = "selection/entropy", "selection/certainty"
"""Columns, in nats; no answer has such a name."""
SURE = "not among the selection.prompts rows with the highest entropy"
UNDECIDED = "not among the selection.pairs rows with the largest certainty"


def settings_of(job: Job) -> Selection:
    """The job's selection, of a job that has one."""
    if job.selection is None:
        raise RuntimeError("a job without [selection] has no such stage")
    return job.selection


def sampled_turn(job: Job) -> Turn:
    """The turn whose answers the entropy is estimated from.

    Raises:
        InputError: there is none, or its answers are no samples of what the student says to the prompt.
    """
    name = settings_of(job).turn or job.pairs.among
    turns = {turn.name: turn for turn in load_task(job.synthesis.task or "").turns}
    if name not in turns:
        raise InputError(f"selection.turn: {name!r} is no turn of the task; there are {', '.join(turns)}")

    turn = turns[name]
    told = (turn.after, turn.system, turn.user, turn.prefill, turn.rewrites, turn.given, turn.voice)
    speaker = job.synthesis.teacher or job.synthesis.adapter or job.synthesis.endpoint
    if speaker or any(part not in (None, "") for part in told):
        raise InputError(
            f"selection.turn: the answers of `{name}` are not what the student itself says to the bare prompt; name "
            "a turn with nothing but `samples`, in a job whose teacher is the student"
        )
    sampling = turn_sampling(turn, job.synthesis.sampling)
    if sampling != sampling.untempered():
        raise InputError(
            f"selection.turn: the answers of `{name}` are not drawn from the student's own distribution; set "
            "temperature = 1.0, top_p = 1.0 and nothing beyond them"
        )
    return turn


def models_of(job: Job) -> list[FrozenModel]:
    """The student as training starts from it, and the model that its implicit rewards are against, if there is one."""
    reference = settings_of(job).reference
    if reference is None:
        return [frozen_student(job)]
    against = FrozenModel(ModelRef.of(job, reference), forward_settings(job), f"selection.reference {reference}")
    return [frozen_student(job), against]


def selection_pool(job: Job) -> Pool:
    """The actors that read the answers."""
    settings = settings_of(job)
    budget, chunk = settings.tokens_per_batch, job.training.logprob_chunk
    return Pool(
        "screening",
        "selection",
        settings.concurrency,
        1,
        settings.gpus,
        job.cluster.placement.trainer,
        shards=settings.shards,
        environment=allocator_environment() if settings.gpus else {},
        holds=tuple(Held(model.ref, job.student.dtype, budget, chunk) for model in models_of(job)),
    )


def check_selection(job: Job) -> None:
    """Look at the model that implicit rewards are against, and whether it reads the student's tokens.

    Raises:
        InputError: it does not, or cannot be had.
    """
    sampled_turn(job)
    for model in models_of(job)[1:]:
        own, other = student_chat(job), chat_like_student(job, model.ref)
        probe = [{"role": "user", "content": PROBE_TEXT}]
        if own.prompt_ids(probe) != other.prompt_ids(probe):
            raise InputError(f"{model.where}: it has another tokenizer than the student")
        checked_model(model.where, model.ref, own)


def screen(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Add entropy and certainty to rows with answers."""
    return selection_pool(job).map(rows, Screen, job=job)


class Screen:
    """A Ray Data actor that holds the student, and the model that its implicit rewards are against."""

    def __init__(self, job: Job):
        settings = settings_of(job)
        self.chat = student_chat(job)
        self.samples, self.answers = sampled_turn(job).names, scored_answers(job)
        budget, backend = settings.tokens_per_batch, backend_of(job)
        self.student, *self.reference = open_readers(models_of(job), selection_pool(job), budget, backend)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Screen a block of rows."""
        rows = batch.to_pylist()
        names = dict.fromkeys([*self.samples, *(self.answers if self.reference else ())])
        policy = {name: answer_logps(rows, name, self.chat, self.student) for name in names}
        ratios: list[list[AnswerLogp]] = []
        for reader in self.reference:
            for name in self.answers:
                before = answer_logps(rows, name, self.chat, reader)
                ratios.append([after - other for after, other in zip(policy[name], before, strict=True)])

        screened = []
        for place, row in enumerate(rows):
            logps = [policy[name][place].nats for name in self.samples]
            rewards = [ratio[place].nats for ratio in ratios]
            screened.append(measured(row, logps, rewards))
        return table_of(screened)


def measured(row: Row, logps: list[float], ratios: list[float]) -> Row:
    """The row with its entropy and certainty, or dropped where an answer has no log-prob."""
    if not all(map(math.isfinite, [*logps, *ratios])):
        return {**drop(row, f"an answer has {UNREADABLE}"), ENTROPY: 0.0, CERTAINTY: 0.0}
    certainty = max(ratios) - min(ratios) if ratios else 0.0
    return {**row, ENTROPY: -sum(logps) / len(logps), CERTAINTY: certainty}


Place = tuple[float, ...] | tuple[float | str, ...]
"""Where a row stands in an order, by numbers and its id."""


@dataclass(frozen=True)
class Cutoff:
    """The last rows that are kept, in the order of entropy and then in that of certainty; None: all are."""

    entropy: Place | None
    certainty: Place | None

    def reason(self, row: Row) -> str | None:
        """Why a row is not kept; None if it is."""
        if self.entropy is not None and by_entropy(row) > self.entropy:
            return SURE
        return UNDECIDED if self.certainty is not None and by_certainty(row) > self.certainty else None


def by_entropy(row: Row) -> Place:
    """The place of a row in the order of entropy, the highest first; of equals the id decides."""
    return -row[ENTROPY], row[ID_COLUMN]


def by_certainty(row: Row) -> Place:
    """The place of a row in the order of certainty, the largest first; of equals their entropy decides."""
    return -row[CERTAINTY], *by_entropy(row)


def cutoff_of(parts: Iterable[pa.Table], settings: Selection) -> Cutoff:
    """Where the rows of a finished screening are cut off, from tables with their id, entropy and certainty."""
    rows = sorted(rows_of(parts), key=by_entropy)
    left = rows[: settings.prompts]
    surest = sorted(left, key=by_certainty)[: settings.pairs]
    return Cutoff(
        by_entropy(left[-1]) if len(left) < len(rows) else None,
        by_certainty(surest[-1]) if len(surest) < len(left) else None,
    )


def choose(batch: pa.Table, cutoff: Cutoff) -> pa.Table:
    """The rows of a block, those that are not kept with the reason."""
    rows = []
    for row in batch.to_pylist():
        reason = cutoff.reason(row) if alive(row) else None
        rows.append(drop(row, reason) if reason else row)
    return table_of(rows)
