"""From scored answers to preference pairs: who is chosen, by how much, and which pairs are no use.

Adds `chosen` and `rejected` (one assistant message each, or the messages that a data set gave, so that the table is a
conversational preference data set as it stands), `score_chosen`, `score_rejected`, `reward_gap`, whether the sides were
`swapped` against what the settings name, for both sides whether the answer was finished, `heldout` for those that are
not trained on, the `defects` of the conversation that they come from, `chosen_reasoning` and `rejected_reasoning` where
it is trained on, `chosen_voice` and `rejected_voice` where the voices of a turn were drawn, `chosen_drawn` and
`rejected_drawn` where the tokens of answers are those of the student. A group has the same of the answers between
these two in lists (`others`, `others_from`, …), `score_others`, and in `gap_others` how much lower each scores than the
chosen one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.config import BEST, REST, WORST, Job, Sides
from rdpo.config import Pairs as Settings
from rdpo.config.task import Task, Turn
from rdpo.errors import InputError
from rdpo.preference.shaping import Shaping, find_length_coef, matrix, mean_length_gap
from rdpo.records import (
    DRAWN,
    HELDOUT,
    ID_COLUMN,
    OTHERS,
    QUESTION,
    SIDES,
    VOICE,
    Messages,
    Row,
    drop,
    prompt_id,
    rows_of,
    table_of,
    text_of,
    unit_draw,
)
from rdpo.synthesis.defects import defects
from rdpo.synthesis.given import WHOLE
from rdpo.synthesis.instructions import beginning, load_task, question_of

if TYPE_CHECKING:
    import ray.data

COPY = "#"
UNSCORED = "it has no scores, and training.loss, training.reward_as or [pairs] goes by them"
BATCH_ROWS = 1024


def make_pairs(
    rows: ray.data.Dataset, job: Job, length_coef: float = 0.0, drawn_by: Mapping[str, str] | None = None
) -> ray.data.Dataset:
    """Turn rows with scores into rows with a preference pair, or drop them with a reason.

    `length_coef` is what a character costs in the choice of best and worst; `drawn_by` has, by question, the prompt
    whose draw decides whether pairs are held out, where it is another than their own.
    """
    arguments = {"job": job, "length_coef": length_coef, "drawn_by": drawn_by}
    return rows.map_batches(pairs_table, fn_kwargs=arguments, batch_format="pyarrow", batch_size=BATCH_ROWS)


def pairs_table(
    table: pa.Table, job: Job, length_coef: float = 0.0, drawn_by: Mapping[str, str] | None = None
) -> pa.Table:
    """Pairs of one block."""
    task = load_task(job.synthesis.task) if job.synthesis.task else None
    pairs = []
    for row in table.to_pylist():
        drawn = (drawn_by or {}).get(row.get(QUESTION)) or prompt_id(row["prompt"])
        pairs.append(_pair(row, job, task, length_coef, drawn))
    return table_of(pairs)


def drawn_together(prompts: Iterable[pa.Table]) -> dict[str, str]:
    """For each question that several prompts ask, in other letters or templates, the first of them.

    `prompts` are parts of the prompts stage with `question_id`, `prompt`, `source` and `line`. Held-out pairs are drawn
    by prompt; by these all pairs of one question are drawn alike.
    """
    first: dict[str, tuple[str, int, str]] = {}
    several: set[str] = set()
    for row in rows_of(prompts):
        question, found = row[QUESTION], (row["source"], row["line"], prompt_id(row["prompt"]))
        known = first.setdefault(question, found)
        if known[2] != found[2]:
            several.add(question)
        # By source and line, for parts come in no order.
        first[question] = min(known, found)
    return {question: first[question][2] for question in several}


def shaping_of(parts: Iterable[pa.Table], settings: Settings) -> Shaping | None:
    """How long samples are held back, found on all rows if `length_coef` is `auto`; None without best and worst."""
    if not {settings.chosen, settings.rejected} & {BEST, WORST}:
        return None

    scores, lengths = [], []
    for row in rows_of(parts):
        usable = _usable(row, settings)
        if len(usable) >= settings.min_samples:
            scores.append([row[f"{name}_score"] for name in usable])
            lengths.append([float(len(row[name])) for name in usable])

    wide = matrix(scores), matrix(lengths)
    if settings.length_coef == "auto":
        return find_length_coef(*wide) if scores else Shaping(0.0, 0.0)
    return Shaping(settings.length_coef, mean_length_gap(*wide, settings.length_coef) if scores else 0.0)


def copies(table: pa.Table, count: int) -> pa.Table:
    """Each row as often as it makes pairs; the number of its pair is in the copy's id."""
    parts = [
        table.set_column(table.column_names.index(ID_COLUMN), ID_COLUMN, copy_names(table[ID_COLUMN], 1, start))
        for start in range(count)
    ]
    return pa.concat_tables(parts)


def copy_names(ids: pa.ChunkedArray, count: int, start: int = 0) -> pa.ChunkedArray:
    """Ids of rows for their pairs from number `start` on: the first keeps the row's."""
    chunks: list[pa.Array] = []
    for pair in range(start, start + count):
        named = ids if pair == 0 else pc.binary_join_element_wise(ids, str(pair), COPY)
        chunks += named.chunks
    return pa.chunked_array(chunks, pa.string())


def _sides(row: Row, settings: Settings) -> Sides:
    """The sides of the row's pair, by the number in its id."""
    _, _, number = row[ID_COLUMN].partition(COPY)
    return settings.also[int(number) - 1] if number else Sides(chosen=settings.chosen, rejected=settings.rejected)


def _pair(row: Row, job: Job, task: Task | None, length_coef: float, drawn_by: str) -> Row:
    settings, sides = job.pairs, _sides(row, job.pairs)
    # The same prompts whatever the seed, so that runs with other seeds are measured on the same pairs.
    heldout = unit_draw(0, drawn_by, "heldout pairs") < settings.heldout_fraction
    # Those that are held out measure what is right, so no noise is put into them.
    flipped = not heldout and unit_draw(job.seed, row[ID_COLUMN], "flip") < settings.flip
    pair = pair_row(row, settings, sides, length_coef, job.synthesis.trains_on_reasoning) | {HELDOUT: heldout}
    if {sides.chosen, sides.rejected} & {BEST, WORST} and len(_usable(row, settings)) < settings.min_samples:
        pair = drop(pair, "fewer usable samples than pairs.min_samples")

    if settings.condition and task:
        pair["prompt"] = question_of(beginning(task, settings.condition), row, job.synthesis.values)
    revises = task is not None and any(turn.after for turn in task.turns)
    pair["defects"] = defects(row, sides.rejected, sides.chosen) if revises else []
    if wrong := [defect for defect in pair["defects"] if defect in settings.drop_defects]:
        pair = drop(pair, f"{sides.chosen}: {wrong[0]}")
    pair = sound(pair, settings)
    if needs_scores(job) and not _has_scores(pair):
        pair = drop(pair, UNSCORED)
    # What is noise in the direction must not decide which answers are good enough.
    pair = wide_enough(exchanged(pair) if flipped else pair, settings)
    # Behind every filter: one that goes by scores would leave the pairs that were not turned round.
    turned = settings.random_sides and not heldout and unit_draw(job.seed, row[ID_COLUMN], "side") < 0.5
    return exchanged(pair) if turned and not pair["dropped"] else pair


def needs_scores(job: Job) -> bool:
    """Whether a pair that nothing scored is of no use to the job: its loss goes by scores, or the choice of pairs."""
    settings = job.pairs
    bounds = (settings.min_gap, settings.max_gap, settings.min_score)
    chosen_by_score = settings.direction == "reward" or any(bound is not None for bound in bounds)
    return chosen_by_score or job.training.needs_scores


def _has_scores(pair: Row) -> bool:
    return all(any(score is not None for score in (pair[f"{side}_scores"] or {}).values()) for side in SIDES)


def scored_answers(job: Job) -> list[str]:
    """The answers that the rewards score: the sides of the pair, or all samples where it is `best` or `worst`.

    Raises:
        InputError: there is no such answer.
    """
    return answers_of(job.pairs, load_task(job.synthesis.task).turns if job.synthesis.task else None)


def answers_of(settings: Settings, turns: list[Turn] | None) -> list[str]:
    """`scored_answers` of a task's turns; None: the pairs come with the prompts."""
    known = list(chain.from_iterable(turn.names for turn in turns)) if turns is not None else list(SIDES)
    several = [turn for turn in turns or [] if turn.name == settings.among and turn.samples > 1]
    sampled = list(chain.from_iterable(turn.names for turn in several))
    named = [settings.chosen, settings.rejected]
    for sides in settings.also:
        named += [sides.chosen, sides.rejected]
    if settings.others:
        named += [BEST] if settings.others == REST else settings.others

    wanted: list[str] = []
    for side in named:
        of_side = sampled if side in (BEST, WORST) else [name for name in known if name == side]
        if not of_side:
            more = f"; a turn `{settings.among}` with `samples` would make best and worst" if not sampled else ""
            raise InputError(f"pairs: there is no answer `{side}`; there are {', '.join(known)}{more}")
        wanted.extend(name for name in of_side if name not in wanted)
    return wanted


def pair_row(
    row: Row, settings: Settings, sides: Sides | None = None, length_coef: float = 0.0, reasoned: bool = False
) -> Row:
    """One row with its pair: sides as named, or by score with `direction = "reward"`.

    `reasoned`: with the reasoning before both answers.
    """
    sides = sides or Sides(chosen=settings.chosen, rejected=settings.rejected)
    chosen, rejected = (_turn(row, settings, side, length_coef) for side in (sides.chosen, sides.rejected))
    swapped = settings.direction == "reward" and row[f"{rejected}_score"] > row[f"{chosen}_score"]
    if swapped:
        chosen, rejected = rejected, chosen
    if settings.others:
        chosen, *between, rejected = group_order(row, settings, (chosen, rejected), length_coef)

    pair = {
        ID_COLUMN: row[ID_COLUMN],
        "prompt": row["prompt"],
        "chosen": _completion(row, chosen),
        "rejected": _completion(row, rejected),
        "chosen_from": chosen,
        "rejected_from": rejected,
        "swapped": swapped,
        "dropped": row.get("dropped"),
    }
    if row.get(QUESTION):
        pair[QUESTION] = row[QUESTION]

    for side, turn in zip(SIDES, (chosen, rejected), strict=True):
        pair[f"score_{side}"] = row[f"{turn}_score"]
        pair[f"{side}_scores"] = row[f"{turn}_scores"]
        pair[f"{side}_finished"] = row[f"{turn}_finish_reason"] == "stop"
        if reasoned:
            pair[f"{side}_reasoning"] = row.get(f"{turn}_reasoning") or ""
        for beside in (VOICE, DRAWN):
            if f"{turn}{beside}" in row:
                pair[f"{side}{beside}"] = row[f"{turn}{beside}"]
    pair["reward_gap"] = pair["score_chosen"] - pair["score_rejected"]
    return pair | _of_others(row, between, pair["score_chosen"], reasoned) if settings.others else pair


def group_order(row: Row, settings: Settings, sides: tuple[str, str], length_coef: float) -> list[str]:
    """The answers of a group, by name, in the order of preference; those of no use, or of another's words, left out."""
    taken = {row[side].strip() for side in sides}
    names = _usable(row, settings) if settings.others == REST else [*(settings.others or ())]
    between: list[str] = []
    for name in names:
        if name not in sides and _is_usable(row, name, settings) and row[name].strip() not in taken:
            taken.add(row[name].strip())
            between.append(name)

    shaped = {name: row[f"{name}_score"] - length_coef * len(row[name]) for name in [*sides, *between]}
    # Sorting keeps equals in their order.
    if settings.direction == "reward":
        return sorted([sides[0], *between, sides[1]], key=lambda name: -shaped[name])
    if settings.others == REST:
        between = sorted(between, key=lambda name: -shaped[name])
    return [sides[0], *between, sides[1]]


def _of_others(row: Row, names: list[str], best: float, reasoned: bool) -> Row:
    """The columns of a group's answers between the chosen and the rejected one, see `records.OTHERS`."""
    scores = [row[f"{name}_score"] for name in names]
    found: Row = {
        OTHERS: [_completion(row, name) for name in names],
        f"{OTHERS}_from": names,
        f"score_{OTHERS}": scores,
        f"gap_{OTHERS}": [best - score for score in scores],
        f"{OTHERS}_scores": [row[f"{name}_scores"] for name in names],
        f"{OTHERS}_finished": [row[f"{name}_finish_reason"] == "stop" for name in names],
    }
    if reasoned:
        found[f"{OTHERS}_reasoning"] = [row.get(f"{name}_reasoning") or "" for name in names]
    for beside in (VOICE, DRAWN):
        if any(f"{name}{beside}" in row for name in names):
            found[f"{OTHERS}{beside}"] = [row.get(f"{name}{beside}") for name in names]
    return found


def _completion(row: Row, turn: str) -> Messages:
    """The messages of an answer: one of the assistant, or those that a data set gave."""
    whole: Messages = json.loads(row.get(f"{turn}{WHOLE}") or "[]")
    return whole or [{"role": "assistant", "content": row[turn]}]


def _turn(row: Row, settings: Settings, side: str, length_coef: float) -> str:
    """The answer that a setting names in this row; of equal scores the first sample has it."""
    if side not in (BEST, WORST):
        return side
    names = _usable(row, settings) or _samples(row, settings.among)
    # `max` and `min` take the first of equals, so that which sample it is does not depend on chance.
    shaped = {name: row[f"{name}_score"] - length_coef * len(row[name]) for name in names}
    return max(shaped, key=shaped.__getitem__) if side == BEST else min(shaped, key=shaped.__getitem__)


def _usable(row: Row, settings: Settings) -> list[str]:
    """The samples that no filter would drop."""
    return [name for name in _samples(row, settings.among) if _is_usable(row, name, settings)]


def _is_usable(row: Row, name: str, settings: Settings) -> bool:
    """Whether no filter would drop an answer, whichever side it is on."""
    whole = settings.drop_truncated == "never" or row[f"{name}_finish_reason"] == "stop"
    return whole and len(row[name]) >= settings.min_answer_chars


def _samples(row: Row, turn: str) -> list[str]:
    names = [name.removesuffix("_score") for name in row if name.endswith("_score")]
    return sorted(name for name in names if re.fullmatch(rf"{turn}_\d+", name))


def sound(pair: Row, settings: Settings) -> Row:
    """The pair, or the pair with the reason why its answers are no use."""
    chosen, rejected = (text_of(pair[side]) for side in SIDES)
    if pair.get(OTHERS) and len({pair["score_chosen"], pair["score_rejected"], *pair[f"score_{OTHERS}"]}) == 1:
        return drop(pair, "all answers of the group have the same score")
    if chosen.strip() == rejected.strip():
        return drop(pair, "chosen and rejected are the same")
    if min(len(chosen), len(rejected)) < settings.min_answer_chars:
        return drop(pair, "an answer is shorter than pairs.min_answer_chars")
    if "" in [*(pair.get(f"{side}_reasoning") for side in SIDES), *pair.get(f"{OTHERS}_reasoning", ())]:
        return drop(pair, "an answer has no reasoning before it, which synthesis.reasoning asks for")
    if _cut_off(pair, settings.drop_truncated):
        return drop(pair, "an answer was cut off at the token limit")
    return pair


def exchanged(pair: Row) -> Row:
    """The pair with its sides in each other's place, scores and all; a group in the opposite order."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    # By the columns' names alone, so that a new column of a side changes places too.
    other_way = {name: pair[re.sub("chosen|rejected", lambda side: other[side[0]], name)] for name in pair}
    other_way |= {"reward_gap": -pair["reward_gap"], "swapped": not pair["swapped"]}
    if OTHERS in pair:
        other_way |= {name: values[::-1] for name, values in pair.items() if OTHERS in name.split("_")}
        other_way[f"gap_{OTHERS}"] = [other_way["score_chosen"] - score for score in other_way[f"score_{OTHERS}"]]
    return other_way


def wide_enough(pair: Row, settings: Settings) -> Row:
    """The pair, or the pair as dropped where the rewards prefer its chosen side too little, or too much."""
    if settings.min_gap is not None and pair["reward_gap"] < settings.min_gap:
        return drop(pair, "reward gap is below pairs.min_gap")
    if settings.max_gap is not None and pair["reward_gap"] >= settings.max_gap:
        return drop(pair, "reward gap is pairs.max_gap or more")
    if settings.min_score is not None and pair["score_chosen"] < settings.min_score:
        return drop(pair, "the chosen answer's score is below pairs.min_score")
    return pair


def _cut_off(pair: Row, which: str) -> bool:
    sides = {"never": (), "chosen": ("chosen",), "any": SIDES}[which]
    return not all(pair[f"{side}_finished"] for side in sides)
