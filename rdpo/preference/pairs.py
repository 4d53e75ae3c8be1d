"""From scored answers to preference pairs: who is chosen, by how much, and which pairs are no use.

Adds `chosen` and `rejected` (one assistant message each, so that the table is a conversational
preference data set as it stands), `score_chosen`, `score_rejected`, `reward_gap`, and for both sides
whether the answer was finished.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.config import Job
from rdpo.config import Pairs as Settings
from rdpo.records import Row, drop, table_of
from rdpo.synthesis.defects import defects

if TYPE_CHECKING:
    import ray.data


def make_pairs(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Turn rows with scores into rows with a preference pair, or drop them with a reason."""
    return rows.map_batches(pairs_table, fn_kwargs={"settings": job.pairs}, batch_format="pyarrow")


def pairs_table(table: pa.Table, settings: Settings) -> pa.Table:
    """Pairs of one block."""
    return table_of([_pair(row, settings) for row in table.to_pylist()])


def _pair(row: Row, settings: Settings) -> Row:
    pair = pair_row(row, settings)
    if settings.drop_defects:
        wrong = [
            defect for defect in defects(row, settings.rejected, settings.chosen) if defect in settings.drop_defects
        ]
        pair = drop(pair, f"{settings.chosen}: {wrong[0]}") if wrong else pair
    return filtered(pair, settings)


def agreement(rows: list[Row], settings: Settings) -> dict[str, float]:
    """How often each reward prefers the teacher's `chosen` turn to its `rejected` one; ties count half."""
    names = (rows[0][f"{settings.chosen}_scores"] if rows else None) or {}
    return {name: sum(_preference(row, settings, name) for row in rows) / len(rows) for name in names}


def _preference(row: Row, settings: Settings, reward: str) -> float:
    gap = row[f"{settings.chosen}_scores"][reward] - row[f"{settings.rejected}_scores"][reward]
    return 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0


def pair_row(row: Row, settings: Settings) -> Row:
    """One row with its pair: sides as named in the settings, or by score with `direction = "reward"`."""
    chosen, rejected = settings.chosen, settings.rejected
    if settings.direction == "reward" and row[f"{rejected}_score"] > row[f"{chosen}_score"]:
        chosen, rejected = rejected, chosen
    pair = {
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": row[chosen]}],
        "rejected": [{"role": "assistant", "content": row[rejected]}],
        "chosen_from": chosen,
        "dropped": None,
    }
    for side, turn in (("chosen", chosen), ("rejected", rejected)):
        pair[f"score_{side}"] = row[f"{turn}_score"]
        pair[f"{side}_scores"] = row[f"{turn}_scores"]
        pair[f"{side}_finished"] = row[f"{turn}_finish_reason"] == "stop"
    pair["reward_gap"] = pair["score_chosen"] - pair["score_rejected"]
    return pair


def filtered(pair: Row, settings: Settings) -> Row:
    """The pair, or the pair with the reason why training learns nothing (or wrong things) from it."""
    chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
    if chosen.strip() == rejected.strip():
        return drop(pair, "chosen and rejected are the same")
    if min(len(chosen), len(rejected)) < settings.min_answer_chars:
        return drop(pair, "an answer is shorter than pairs.min_answer_chars")
    if _cut_off(pair, settings.drop_truncated):
        return drop(pair, "an answer was cut off at the token limit")
    if settings.min_gap is not None and pair["reward_gap"] < settings.min_gap:
        return drop(pair, "reward gap is below pairs.min_gap")
    return pair


def _cut_off(pair: Row, which: str) -> bool:
    sides = {"never": (), "chosen": ("chosen",), "any": ("chosen", "rejected")}[which]
    return not all(pair[f"{side}_finished"] for side in sides)
