"""Experience replay: generated pairs mixed with ready ones, so that a round forgets less (DICE, arXiv 2406.09760).

With N ready pairs and the share gamma, as DICE's code counts: min(int(N (1 - gamma)), all) generated pairs are used,
and int(gamma n / (1 - gamma)) ready ones beside these n. A prompt is never in both; prompts held out for evaluation
are in neither. gamma = 0 takes all generated pairs and no ready one; gamma = 1, where the code would divide by zero,
all ready ones and no generated one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.config import Job, Pairs, Replay, Synthesis
from rdpo.preference.pairs import make_pairs
from rdpo.preference.rewards import score_answers
from rdpo.records import ID_COLUMN, SIDES, alive, digest, prompt_id
from rdpo.synthesis.given import given_answers
from rdpo.synthesis.prompts import beside, read_prompts, without_duplicates

if TYPE_CHECKING:
    import ray.data

GENERATED = "its prompt is among the generated pairs"
HELD_OUT = "its prompt is held out for evaluation"
LEFT_OVER = "not drawn for the mix"
COMMON = [ID_COLUMN, "prompt", "dropped"]
"""The columns of a line that is no pair."""

Keyed = list[tuple[str, str]]
"""Ids of pairs, each with the identity of its prompt."""


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
    gamma = Fraction(repr(share))
    used = min(int(offline * (1 - gamma)), generated)
    return used, int(gamma * used / (1 - gamma))


def draw_mix(generated: Keyed, offline: Keyed, heldout: frozenset[str], share: float, seed: int) -> Mix:
    """Draw the pairs of a mix, without replacement; `heldout` are prompts that must not be trained on."""
    used, wanted = mix_counts(len(generated), len(offline), share)
    taken = sorted(generated, key=lambda pair: place(pair[0], seed))[:used]
    prompts = {prompt for _, prompt in taken}
    reasons: dict[str, str] = {}
    drawn = 0
    for name, prompt in sorted(offline, key=lambda pair: place(pair[0], seed)):
        if prompt in heldout:
            reasons[name] = HELD_OUT
        elif prompt in prompts:
            reasons[name] = GENERATED
        elif drawn == wanted:
            reasons[name] = LEFT_OVER
        else:
            drawn += 1
    everything = used == len(generated)
    last = None if everything else place(taken[-1][0], seed) if taken else ""
    return Mix(used, last, drawn, reasons)


def place(pair: str, seed: int) -> str:
    """Where a pair stands in the order in which pairs are drawn."""
    return digest(seed, pair, "replay")


def keyed(parts: Iterable[pa.Table]) -> Keyed:
    """Ids and prompts of pairs."""
    return [(row[ID_COLUMN], prompt_id(row["prompt"])) for part in parts for row in part.to_pylist()]


def until(batch: pa.Table, last: str, seed: int) -> pa.Table:
    """The generated pairs that were drawn."""
    return batch.filter(pa.array([place(name, seed) <= last for name in batch[ID_COLUMN].to_pylist()], pa.bool_()))


def offline_pairs(job: Job, replay: Replay) -> ray.data.Dataset:
    """The ready pairs with the columns of the pairs stage; lines that are none are dropped with a reason."""
    reading = job.model_copy(
        update={
            "prompts": beside(job.prompts, replay.source, replay.column, replay.limit),
            "synthesis": Synthesis(),
            "rewards": [],
            "pairs": Pairs(chosen="chosen", rejected="rejected"),
        }
    )
    read = without_duplicates(read_prompts(reading).materialize()).materialize()
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
    """Id and prompt of the ready pairs that are pairs."""
    return batch.filter(pc.is_null(batch["dropped"].cast(pa.string()))).select([ID_COLUMN, "prompt"])
