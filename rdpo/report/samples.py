"""Rows of a run whose texts stand in its report: some conversations, and as many evaluated prompts as it can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from rdpo.config import Job
from rdpo.evaluation.compare import MODELS
from rdpo.evaluation.intervals import Values
from rdpo.files.parts import PART
from rdpo.files.stage_folder import StageFolder
from rdpo.records import ID_COLUMN, VOICE, Row, alive, by_id, rows_of, text_of
from rdpo.report.columns import PromptColumns
from rdpo.report.differences import Difference, difference
from rdpo.report.page import escaped

ID_DIGITS = 8
CONVERSATIONS = 10
NEWEST = 5
SAMPLES_BYTES = 2_500_000
"""Texts of evaluated prompts in one page."""


@dataclass(frozen=True)
class Conversation:
    """What the teacher wrote for one prompt, turn by turn."""

    id: str
    prompt: Markup
    turns: list[tuple[str, Markup]]
    difference: Difference | None


@dataclass(frozen=True)
class Answer:
    """One model's answer and its scores by reward."""

    model: str
    text: Markup
    tokens: int
    finish_reason: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One evaluated prompt with both models' answers; `changes` are what the page sorts by."""

    id: str
    prompt: Markup
    answers: list[Answer]
    changes: list[float] = field(default_factory=list)
    gain: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of its texts."""
        texts = [self.prompt, *(answer.text for answer in self.answers)]
        return sum(len(text.encode()) for text in texts)


def conversations(folder: StageFolder, job: Job) -> list[Conversation]:
    """The first conversations by id; what differs between the two sides of a pair is marked."""
    if not folder.parts():
        return []
    ids = pc.sort_indices(folder.ids(ID_COLUMN))[:CONVERSATIONS]
    rows = rows_with(folder, folder.ids(ID_COLUMN).take(ids).to_pylist())
    return [_conversation(row, job) for row in rows]


def newest_rows(folder: StageFolder, job: Job) -> list[Conversation]:
    """The rows that an unfinished stage has stored last, the newest first, with what the models have written so far."""
    stamps = {name: stamp for name, stamp in folder.stamps().items() if name.endswith(PART)}
    kept = [name for name in stamps if not name.startswith("dropped/")]
    found: dict[str, Row] = {}
    for name in sorted(kept, key=lambda name: stamps[name][1], reverse=True):
        if len(found) >= NEWEST:
            break
        last = folder.part(name)
        # A step before the last stores what it drops among the others.
        rows = filter(alive, last.slice(max(0, last.num_rows - NEWEST)).to_pylist()[::-1])
        for row in rows:
            # Of a row that several steps have stored, the newest.
            found.setdefault(row[ID_COLUMN], row)
    return [_conversation(row, job) for row in list(found.values())[:NEWEST]]


def evaluated_samples(folder: StageFolder, columns: PromptColumns, limit: int) -> list[Sample]:
    """At most `limit` evaluated prompts, by id: of more, those that gained and lost most, and others.

    They are fewer where their texts would make the page too large.
    """
    places = {name: place for place, name in enumerate(columns.ids)}
    chosen = [columns.ids[place] for place in most_telling(columns.gain, limit)]
    rows = by_id(rows_with(folder, chosen))

    samples, room = [], SAMPLES_BYTES
    for name in chosen:
        sample = _sample(rows[name], columns, places[name])
        room -= sample.size
        if room < 0:
            break
        samples.append(sample)
    return sorted(samples, key=lambda sample: sample.id)


def most_telling(gain: Values, limit: int) -> list[int]:
    """At most `limit` places: the greatest and the least in turn for one half, then the first of the others."""
    ordered = sorted(range(len(gain)), key=lambda place: gain[place])
    half = limit // 4
    extremes = chain.from_iterable(zip_longest(ordered[::-1][:half], ordered[:half]))
    taken = dict.fromkeys(place for place in extremes if place is not None)
    return list(dict.fromkeys([*taken, *range(len(gain))]))[:limit]


def rows_with(folder: StageFolder, ids: Sequence[str]) -> list[Row]:
    """The kept rows with these ids, by id; of each part only they are held."""
    wanted = pa.array(ids, pa.string())
    parts = (table.filter(pc.is_in(table[ID_COLUMN], wanted)) for table in folder.tables())
    return sorted(rows_of(parts), key=lambda row: row[ID_COLUMN])


def _conversation(row: Row, job: Job) -> Conversation:
    names = turns_of(row)
    texts = {name: escaped(row[name]) for name in names}
    before, after = job.pairs.rejected, job.pairs.chosen
    found = difference(row[before] or "", row[after] or "") if before in texts and after in texts else None
    if found:
        texts |= {before: found.before, after: found.after}
    turns = [(_with_voice(name, row), text) for name, text in texts.items()]
    return Conversation(row[ID_COLUMN][:ID_DIGITS], escaped(text_of(row["prompt"])), turns, found)


def turns_of(row: Row) -> list[str]:
    """Names of a row's columns that hold what a model wrote."""
    return [name.removesuffix("_finish_reason") for name in row if name.endswith("_finish_reason")]


def _with_voice(name: str, row: Row) -> str:
    """A turn's name, with that of the voice where one was drawn."""
    voice = row.get(f"{name}{VOICE}")
    return f"{name} ({voice})" if voice else name


def _sample(row: Row, columns: PromptColumns, place: int) -> Sample:
    changes = [columns.change(reward)[place] for reward in columns.rewards]
    return Sample(
        row[ID_COLUMN][:ID_DIGITS],
        escaped(text_of(row["prompt"])),
        list(_answers(row)),
        [float(change) for change in (*changes, columns.growth[place])],
        float(columns.gain[place]),
    )


def _answers(row: Row) -> Iterator[Answer]:
    for model in MODELS:
        tokens, reason, scores = (row[f"{model}_{name}"] for name in ("tokens", "finish_reason", "scores"))
        known = {name: score for name, score in (scores or {}).items() if score is not None}
        yield Answer(model, escaped(row[model]), tokens, reason, known)
