"""From scored answers to preference pairs: who is chosen, by how much, and which pairs are no use.

Adds `chosen` and `rejected` (one assistant message each, so that the table is a conversational
preference data set as it stands), `score_chosen`, `score_rejected`, `reward_gap`, for both sides
whether the answer was finished, and the `defects` of the conversation that they come from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.config import BEST, WORST, Job
from rdpo.config import Pairs as Settings
from rdpo.errors import InputError
from rdpo.records import Row, drop, table_of, unit_draw
from rdpo.synthesis.defects import defects
from rdpo.synthesis.given import SIDES
from rdpo.synthesis.instructions import Turn, load_task

if TYPE_CHECKING:
    import ray.data


def make_pairs(rows: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Turn rows with scores into rows with a preference pair, or drop them with a reason."""
    told = job.synthesis.task is not None and not {job.pairs.chosen, job.pairs.rejected} & {BEST, WORST}
    arguments = {"settings": job.pairs, "told": told, "seed": job.seed}
    return rows.map_batches(pairs_table, fn_kwargs=arguments, batch_format="pyarrow")


def pairs_table(table: pa.Table, settings: Settings, told: bool = True, seed: int = 0) -> pa.Table:
    """Pairs of one block; `told`: the answers are turns of one conversation, whose defects are looked for."""
    return table_of([_pair(row, settings, told, seed) for row in table.to_pylist()])


def _pair(row: Row, settings: Settings, told: bool, seed: int) -> Row:
    flipped = unit_draw(seed, row["prompt_id"], "flip") < settings.flip
    pair = pair_row(row, settings, flipped)
    pair["defects"] = defects(row, settings.rejected, settings.chosen) if told else []
    wrong = [defect for defect in pair["defects"] if defect in settings.drop_defects]
    return filtered(drop(pair, f"{settings.chosen}: {wrong[0]}") if wrong else pair, settings)


def scored_answers(job: Job) -> list[str]:
    """The answers that the rewards score: the sides of the pair, or all samples where it is `best` or `worst`.

    Raises:
        InputError: there is no such answer.
    """
    return answers_of(job.pairs, load_task(job.synthesis.task).turns if job.synthesis.task else None)


def answers_of(settings: Settings, turns: list[Turn] | None) -> list[str]:
    """`scored_answers` of a task's turns; None: the pairs come with the prompts."""
    known = [name for turn in turns for name in turn.names] if turns is not None else list(SIDES)
    sampled = [name for turn in turns or [] if turn.name == settings.among and turn.samples > 1 for name in turn.names]
    wanted: list[str] = []
    for side in (settings.chosen, settings.rejected):
        of_side = sampled if side in (BEST, WORST) else [name for name in known if name == side]
        if not of_side:
            more = f"; a turn `{settings.among}` with `samples` would make best and worst" if not sampled else ""
            raise InputError(f"pairs: there is no answer `{side}`; there are {', '.join(known)}{more}")
        wanted.extend(name for name in of_side if name not in wanted)
    return wanted


def agreement(parts: Iterable[pa.Table], rejected: str) -> dict[str, float]:
    """How often each reward prefers the teacher's `chosen` turn to its `rejected` one; ties count half."""
    preferred: dict[str, float] = {}
    rows = 0
    for part in parts:
        for pair in part.select(["chosen_from", "chosen_scores", "rejected_scores"]).to_pylist():
            rows += 1
            for name, score in (pair["chosen_scores"] or {}).items():
                gap = score - pair["rejected_scores"][name]
                win = _preference(-gap if pair["chosen_from"] == rejected else gap)
                preferred[name] = preferred.get(name, 0.0) + win
    return {name: count / rows for name, count in preferred.items()}


def _preference(gap: float) -> float:
    return 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0


def count_defects(parts: Iterable[pa.Table]) -> dict[str, int]:
    """How many rows have each defect."""
    return dict(Counter(defect for part in parts for defects in part["defects"].to_pylist() for defect in defects))


def pair_row(row: Row, settings: Settings, flipped: bool = False) -> Row:
    """One row with its pair: sides as named in the settings, or by score with `direction = "reward"`."""
    chosen, rejected = (_turn(row, settings, side) for side in (settings.chosen, settings.rejected))
    if settings.direction == "reward" and row[f"{rejected}_score"] > row[f"{chosen}_score"]:
        chosen, rejected = rejected, chosen
    if flipped:
        chosen, rejected = rejected, chosen
    pair = {
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": row[chosen]}],
        "rejected": [{"role": "assistant", "content": row[rejected]}],
        "chosen_from": chosen,
        "rejected_from": rejected,
        "dropped": row.get("dropped"),
    }
    for side, turn in (("chosen", chosen), ("rejected", rejected)):
        pair[f"score_{side}"] = row[f"{turn}_score"]
        pair[f"{side}_scores"] = row[f"{turn}_scores"]
        pair[f"{side}_finished"] = row[f"{turn}_finish_reason"] == "stop"
    pair["reward_gap"] = pair["score_chosen"] - pair["score_rejected"]
    return pair


def _turn(row: Row, settings: Settings, side: str) -> str:
    """The answer that a setting names in this row; of equal scores the first sample has it."""
    if side not in (BEST, WORST):
        return side
    scores = {name: row[f"{name}_score"] for name in _samples(row, settings.among)}
    return max(scores, key=scores.__getitem__) if side == BEST else min(scores, key=scores.__getitem__)


def _samples(row: Row, turn: str) -> list[str]:
    names = [name.removesuffix("_score") for name in row if name.endswith("_score")]
    return sorted(name for name in names if re.fullmatch(rf"{turn}_\d+", name))


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
