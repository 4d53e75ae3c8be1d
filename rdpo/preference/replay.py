"""Experience replay: generated pairs mixed with ready ones, so that a round forgets less (DICE, arXiv 2406.09760).

With N ready pairs and the share gamma, as DICE's code counts: min(int(N (1 - gamma)), all) generated pairs are used,
and int(gamma n / (1 - gamma)) ready ones beside these n. Pairs that are held out of training do not count. A question
is never in both; those held out for evaluation are in neither. gamma = 0 takes all generated pairs and no ready one;
gamma = 1, where the code would divide by zero, all ready ones and no generated one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.config import Job, Pairs, Prompts, Replay, Synthesis
from rdpo.preference.pairs import COPY, make_pairs
from rdpo.preference.rewards import score_answers
from rdpo.records import HELDOUT, ID_COLUMN, QUESTION, SIDES, alive, digest, rows_of
from rdpo.synthesis.columns import Reading, pair_columns
from rdpo.synthesis.given import given_answers
from rdpo.synthesis.prompts import beside, read_prompts, without_duplicates

if TYPE_CHECKING:
    import ray.data

SOURCE = "replay.source"
GENERATED = "its prompt is among the generated pairs"
HELD_OUT = "its prompt is held out for evaluation"
LEFT_OVER = "not drawn for the mix"
COMMON = [ID_COLUMN, QUESTION, "prompt", "dropped"]
"""The columns of a line that is no pair."""

Keyed = list[tuple[str, str]]
"""Ids of pairs, each with the identity of its question."""


@dataclass(frozen=True)
class Mix:
    """Which pairs are trained on: the generated ones up to the place `last` in the drawn order (None: all), and
    for each ready one that is not used, why."""

    generated: int
    last: str | None
    offline: int
    reasons: dict[str, str]


def mix_counts(generated: int, offline: int, share: float) -> tuple[int, int]:
    """How many generated and how many ready pairs are used, of so many."""
    if share in (0.0, 1.0):
        return (generated, 0) if share == 0 else (0, offline)
    # The number as it is written: in binary floating point 100 (1 - 0.9) is 9.99…, one pair less.
    used = min(int(offline * (1 - Fraction(repr(share)))), generated)
    return used, _beside(used, share)


def draw_mix(generated: Keyed, offline: Keyed, heldout: frozenset[str], share: float, seed: int) -> Mix:
    """Draw the pairs of a mix, without replacement, from those that may be trained on.

    `heldout` are questions that must not be. Where too few ready pairs are left beside the generated ones, fewer of
    these are used, so that the share is what was asked for.
    """
    most, wanted = mix_counts(len(generated), len(offline), share)
    ordered = sorted(generated, key=lambda pair: place(pair[0], seed))
    ready = sorted(offline, key=lambda pair: place(pair[0], seed))
    used = _most_with_share(ordered[:most], [question for _, question in ready if question not in heldout], share)
    if used < most:
        wanted = _beside(used, share)

    questions = {question for _, question in ordered[:used]}
    reasons: dict[str, str] = {}
    drawn = 0
    for name, question in ready:
        if question in heldout:
            reasons[name] = HELD_OUT
        elif question in questions:
            reasons[name] = GENERATED
        elif drawn == wanted:
            reasons[name] = LEFT_OVER
        else:
            drawn += 1

    last = None if used == len(generated) else place(ordered[used - 1][0], seed) if used else ""
    return Mix(used, last, drawn, reasons)


def _most_with_share(ordered: Keyed, ready: list[str], share: float) -> int:
    """How many generated pairs, the first in the order, leave enough ready ones of other questions beside them."""
    first: dict[str, int] = {}
    for number, (_, question) in enumerate(ordered):
        first.setdefault(question, number)
    # A ready pair is left beside n generated ones if the first of its question is not among them.
    places = sorted(first.get(question, len(ordered)) for question in ready)
    counts = range(len(ordered), 0, -1)
    return next((n for n in counts if len(places) - bisect_left(places, n) >= _beside(n, share)), 0)


def _beside(used: int, share: float) -> int:
    """How many ready pairs stand beside so many generated ones."""
    gamma = Fraction(repr(share))
    return int(gamma * used / (1 - gamma))


def place(pair: str, seed: int) -> str:
    """Where a pair stands in the order in which pairs are drawn."""
    return digest(seed, pair, "replay")


def until(batch: pa.Table, last: str, seed: int) -> pa.Table:
    """The generated pairs that were drawn, and those that are held out of training, on which it is measured."""
    drawn = pa.array([place(name, seed) <= last for name in batch[ID_COLUMN].to_pylist()], pa.bool_())
    return batch.filter(pc.or_(drawn, held_out(batch)) if HELDOUT in batch.column_names else drawn)


def held_out(pairs: pa.Table) -> pa.ChunkedArray:
    """Which of the pairs (n,) are held out of training."""
    return pc.fill_null(pairs[HELDOUT].cast(pa.bool_()), False)


def keyed(pairs: Iterable[pa.Table], questions: Mapping[str, str]) -> Keyed:
    """Generated pairs that are trained on, with the question of their row in `questions`, by its id."""
    names: list[str] = []
    for part in pairs:
        names += part.filter(pc.invert(held_out(part)))[ID_COLUMN].to_pylist()
    # Further pairs of a row have its id with a number behind it.
    return [(name, questions[name.partition(COPY)[0]]) for name in names]


def keyed_ready(batches: Iterable[pa.Table]) -> Keyed:
    """Ready pairs with their questions."""
    return [(row[ID_COLUMN], row[QUESTION]) for row in rows_of(batches)]


def ready_source(job: Job, replay: Replay) -> tuple[Prompts, Reading]:
    """Where the ready pairs are, and how they are read."""
    settings = beside(job.prompts, replay.source, replay.column, replay.limit)
    return settings, Reading(SOURCE, pair_columns(replay.column, "replay.column", SOURCE))


def offline_pairs(job: Job, replay: Replay) -> ray.data.Dataset:
    """The ready pairs with the columns of the pairs stage; lines that are none are dropped with a reason."""
    prompts, source = ready_source(job, replay)
    reading = job.model_copy(
        update={
            "prompts": prompts,
            "synthesis": Synthesis(reasoning=job.synthesis.reasoning),
            "rewards": [],
            "pairs": Pairs(chosen="chosen", rejected="rejected"),
        }
    )
    # Held, for each is read twice below: once for what can be used, once for what cannot.
    read = without_duplicates(read_prompts(reading, source).materialize()).materialize()
    given = given_answers(read.filter(alive), reading).materialize()

    paired = make_pairs(score_answers(given.filter(alive), reading, list(SIDES)), reading)
    unusable = [rows.filter(lambda row: not alive(row)).select_columns(COMMON) for rows in (read, given)]
    return paired.union(*unusable)


def with_reasons(batch: pa.Table, reasons: dict[str, str], schema: pa.Schema) -> pa.Table:
    """Ready pairs in the columns of the generated ones; those that are not used with the reason."""
    rows = [{**row, "dropped": row["dropped"] or reasons.get(row[ID_COLUMN])} for row in batch.to_pylist()]
    columns = pa.schema([*(field for field in schema if field.name != "dropped"), pa.field("dropped", pa.string())])
    return pa.Table.from_pylist(rows, schema=columns)


def usable(batch: pa.Table) -> pa.Table:
    """Id and question of the ready pairs that are pairs."""
    return batch.filter(pc.is_null(batch["dropped"].cast(pa.string()))).select([ID_COLUMN, QUESTION])
