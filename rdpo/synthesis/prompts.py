"""Prompts: raw rows of the source become rows with an id and a split.

In: files or a data set. Out: `prompt_id`, `question_id`, `prompt` (messages), `split`, `source`, `line`, and the
source's other columns as JSON in `extra`. A line that cannot be used becomes a dropped row with
its file, line and reason; a source that cannot be used at all is an `InputError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.config import Job
from rdpo.config import Prompts as Settings
from rdpo.errors import InputError
from rdpo.files.duplicates import repeated
from rdpo.files.stage_folder import StageFolder
from rdpo.messages import is_plain
from rdpo.modeling.chat import student_chat
from rdpo.records import (
    BEYOND,
    HELDOUT,
    ID_COLUMN,
    QUESTION,
    SIDES,
    TRAIN,
    Messages,
    Row,
    alive,
    clean,
    digest,
    draw_seed,
    drop,
    extra_of,
    prompt_id,
    question_id,
    split_name,
    unit_draw,
)
from rdpo.synthesis.annotated import named_by
from rdpo.synthesis.columns import Needed, Reading
from rdpo.synthesis.conversation import Unusable, derive_pair, derive_prompt
from rdpo.synthesis.formats import Raw
from rdpo.synthesis.given import REASONING, WHOLE, pair_id
from rdpo.synthesis.instructions import check_template, render
from rdpo.synthesis.mixture import NOT_DRAWN, Places, alone, check_together, not_drawn
from rdpo.synthesis.sources import raw_rows

if TYPE_CHECKING:
    import ray.data

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("line", pa.int64()),
        (ID_COLUMN, pa.string()),
        (QUESTION, pa.string()),
        ("prompt", MESSAGES),
        ("prompt_length", pa.int64()),
        ("split", pa.string()),
        ("extra", pa.string()),
        ("dropped", pa.string()),
    ]
)
CALLING = pa.list_(pa.struct([(key, pa.string()) for key in ("role", "content", *BEYOND)]))
WITH_CALLS = pa.schema([field.with_type(CALLING) if field.name == "prompt" else field for field in SCHEMA])
"""Of rows whose messages have more than roles and contents."""
SEED = 0
"""Of splits and templates: runs with other seeds are trained and measured on the same prompts."""
DUPLICATE = "duplicate of an earlier prompt"
SAME_QUESTION = "duplicate of an earlier prompt but for case, white space or Unicode form"
HELD_OUT = "its question is held out for evaluation"
NEARLY_HELD_OUT = "nearly the same as a held-out prompt"
BARE = "bare"
"""Where `extra` has the prompt before it was put into a template."""
OWN_ID = re.compile(r"[0-9a-f]{32}")
Names = Callable[[pa.Table], list[str]]
Place = tuple[str, int]
"""Source and line."""
BLOCK_ROWS = 4096
SHOWN_CHARS = 500


def read_prompts(job: Job, reading: Reading | None = None, also: Sequence[Needed] = ()) -> ray.data.Dataset:
    """All rows of the job's source or sources, usable and dropped; a prompt that stands there twice is there twice.

    Args:
        job: its `prompts` say what is read, and its student's chat template measures it.
        reading: how another source is read that stands in the place of the job's own.
        also: columns that each of the job's own must have beside those of its prompts.

    Raises:
        InputError: a source is missing or empty, has no such column, or does not go together with another.
    """
    if reading:
        return _read(job, reading)
    if job.prompts.sources:
        check_together(job, also)
    parts = [_read(part, of_part) for part, of_part in alone(job, also)]
    return parts[0].union(*parts[1:]) if parts[1:] else parts[0]


def _read(job: Job, reading: Reading) -> ray.data.Dataset:
    return rendered(raw_rows(job.prompts, reading), job)


def rendered(raw: ray.data.Dataset, job: Job) -> ray.data.Dataset:
    """Rows of prompts from raw rows, in the columns of `sources.RAW`."""
    # The cut between reading and rendering lets all cores render what one file holds; one that is not strict would be
    # fused with both sides of it. Nor may two small blocks hold the same prompts: parts are named after their ids.
    blocks = raw.repartition(target_num_rows_per_block=BLOCK_ROWS, strict=True)
    return blocks.map_batches(_prompt_table, fn_kwargs={"job": job}, batch_format="pyarrow", batch_size=None)


def beside(settings: Settings, source: str, column: str, limit: int | None) -> Settings:
    """Settings to read another source than the job's: its templates, splits and data set options do not apply."""
    longest = settings.max_prompt_tokens
    return Settings(source=source, column=column, limit=limit, system=settings.system, max_prompt_tokens=longest)


def _prompt_table(raw: pa.Table, job: Job) -> pa.Table:
    rows = [
        prompt_row(row["source"], row["line"], row["problem"] or json.loads(row["raw"]), job) for row in raw.to_pylist()
    ]
    plain = all(is_plain(row["prompt"]) for row in rows)
    return pa.Table.from_pylist(rows, schema=SCHEMA if plain else WITH_CALLS)


def prompt_row(source: str, line: int, raw: Raw, job: Job) -> Row:
    """One row of the prompts table from one raw row, or a dropped row with its reason."""
    place = f"{source}:{line}"
    row: Row = {"source": source, "line": line, ID_COLUMN: place, "prompt": []}
    row = drop(row, raw) if isinstance(raw, str) else _measure(_parsed(row, raw, job), job)
    # Dropped rows may have one prompt several times; their place tells them apart.
    return row if alive(row) else {**row, ID_COLUMN: place}


def _parsed(row: Row, raw: dict[str, object], job: Job) -> Row:
    """The row with prompt, id and split."""
    settings = job.prompts
    others = {key: value for key, value in raw.items() if key not in (settings.column, "split")}
    try:
        messages, answers = _conversation(raw, job)
    except Unusable as error:
        others[settings.column] = str(raw.get(settings.column))[:SHOWN_CHARS]
        return drop({**row, "extra": _as_json(others)}, str(error))
    others |= answers

    row[QUESTION] = _question(raw, messages, settings.system)
    split, reason = _split(raw.get("split"), prompt_id(messages), settings), None
    if templates := _templates(settings, split):
        reason = _taken_name(others)
        others.setdefault(BARE, messages[-1]["content"])
        if not reason:
            messages, reason = _wrapped(messages, templates, others)

    name = pair_id(messages, answers) if job.synthesis.task is None else prompt_id(messages)
    if job.annotators:
        name, unusable = named_by(job.annotators, name, others, needed=split == job.synthesis.split)
        reason = reason or unusable
    row = {**row, "extra": _as_json(others), "split": split, "prompt": messages, ID_COLUMN: name}
    return drop(row, reason) if reason else row


def _question(raw: Mapping[str, object], messages: Messages, system: str | None) -> str:
    """The question of a row, without what the job puts around each prompt."""
    stated = raw.get(QUESTION)
    # Pairs of another run have their prompts in its templates; they say what was asked before.
    if isinstance(stated, str) and OWN_ID.fullmatch(stated) and {"chosen_from", "rejected_from"} <= raw.keys():
        return stated
    given = messages[0]["role"] == "system" and messages[0]["content"] == system
    return question_id(messages[1:] if given else messages)


def _conversation(raw: dict[str, object], job: Job) -> tuple[Messages, dict[str, str]]:
    """The prompt of a raw row, and both answers if they are given, with their reasoning and whole messages beside them.

    Raises:
        Unusable: it is no conversation, or something of it would be lost.
    """
    settings, reasoning = job.prompts, job.synthesis.reasoning != "off"
    if job.synthesis.task is None:
        pair = derive_pair(raw, settings.column, reasoning, several=job.reference.train_on == "all")
        beside = {f"{side}{REASONING}": thought for side, thought in pair.reasoning.items()}
        beside |= {f"{side}{WHOLE}": json.dumps(whole, ensure_ascii=False) for side, whole in pair.completions.items()}
        return with_system(pair.prompt, settings.system), {**pair.answers, **beside}
    return with_system(derive_prompt(raw, settings.column, reasoning), settings.system), {}


def with_system(messages: Messages, system: str | None) -> Messages:
    """The messages behind a system message, unless they have one."""
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def check_templates(settings: Settings) -> None:
    """Look at the templates that prompts are put into.

    Raises:
        InputError: one is broken, or has no place for the prompt.
    """
    tables = {"prompts": settings, **{f"prompts.sources.{n}": one for n, one in enumerate(settings.sources)}}
    for where, table in tables.items():
        for name in ("templates", "heldout_templates"):
            for template in getattr(table, name) or ():
                if "prompt" not in check_template(template, f"{where}.{name}"):
                    raise InputError(
                        f"{where}.{name}: {template[:80]!r} has no place for the prompt; write {{{{ prompt }}}}"
                    )


def _templates(settings: Settings, split: str) -> list[str]:
    return settings.heldout_templates or settings.templates if split == HELDOUT else settings.templates


def _taken_name(others: Mapping[str, object]) -> str | None:
    """The reason why a row with these other columns cannot be put into a template; None if it can."""
    meaning = {"prompt": "the text of the prompt", BARE: "where the prompt is kept as it was without its template"}
    taken = next((name for name in meaning if name in others), None)
    return f"{taken}: prompts.templates know this name as {meaning[taken]}; rename the column" if taken else None


def _wrapped(messages: Messages, templates: list[str], others: dict[str, object]) -> tuple[Messages, str | None]:
    """The messages with the last one put into one of the templates; with the reason if that cannot be done."""
    template = templates[draw_seed(SEED, prompt_id(messages), "template") % len(templates)]
    try:
        content = render(template, {**others, "prompt": messages[-1]["content"]})
    except ValueError as error:
        return messages, str(error)
    return [*messages[:-1], {**messages[-1], "content": clean(content)}], None


def _as_json(columns: dict[str, object]) -> str:
    return clean(json.dumps(columns, ensure_ascii=False, default=str))


def _split(value: object, row_id: str, settings: Settings) -> str:
    if isinstance(value, str) and value:
        return clean(split_name(value))
    return HELDOUT if unit_draw(SEED, row_id, "split") < settings.heldout_fraction else TRAIN


def _measure(row: Row, job: Job) -> Row:
    if not alive(row):
        return row
    chat = student_chat(job)
    try:
        row["prompt_length"] = len(chat.prompt_ids(row["prompt"]))
    except ValueError as error:
        return drop(row, f"chat template refuses the prompt: {str(error)[:200]}")
    if row["prompt_length"] > job.prompts.max_prompt_tokens:
        return drop(row, "prompt is longer than prompts.max_prompt_tokens")
    return row


def distinguishing(job: Job) -> tuple[str, ...]:
    """Columns of the source in which rows of one question differ and are rows of their own.

    These are both answers of ready pairs, what the templates put around the prompt, and whose preference it is.
    """
    given = (*SIDES, *(f"{side}{WHOLE}" for side in SIDES)) if job.synthesis.task is None else ()
    templates = [one for part in job.prompts.each() for one in (*part.templates, *part.heldout_templates)]
    used = {name for template in templates for name in check_template(template, "prompts.templates")}
    whose = {job.annotators.column} if job.annotators else set()
    return tuple(sorted({*given, *used, *whose} - {"prompt", BARE}))


def drop_duplicates(folder: StageFolder, beside: Sequence[str] = ()) -> None:
    """Keep the first row of each prompt (by source and line) in the parts of an unfinished folder; drop later ones.

    Rows are the same if they have one id, or one question and the same values in the columns `beside` it.
    """
    _drop_repeated(folder, [ID_COLUMN], lambda part: part[ID_COLUMN].to_pylist(), DUPLICATE)
    columns = [QUESTION, "extra"] if beside else [QUESTION]
    _drop_repeated(folder, columns, lambda part: _question_names(part, beside), SAME_QUESTION)


def _drop_repeated(folder: StageFolder, columns: list[str], names_of: Names, reason: str) -> None:
    several = repeated(lambda: map(names_of, folder.tables(columns=columns)))
    if not several:
        return

    first: dict[str, Place] = {}
    for part in folder.tables(columns=[*columns, "source", "line"]):
        _note_first(first, part, names_of(part), several)
    folder.rewrite(lambda part: _without_later(part, names_of(part), first, reason), ID_COLUMN)


def _note_first(first: dict[str, Place], part: pa.Table, names: list[str], several: Collection[str]) -> None:
    for name, source, line in zip(names, part["source"].to_pylist(), part["line"].to_pylist(), strict=True):
        if name in several:
            first[name] = min(first.get(name, (source, line)), (source, line))


def _question_names(part: pa.Table, beside: Sequence[str]) -> list[str]:
    """What rows are the same by: their question, and the values that stand beside it."""
    questions: list[str] = part[QUESTION].to_pylist()
    if not beside:
        return questions
    others = map(json.loads, part["extra"].to_pylist())
    return [
        digest(question, [other.get(name) for name in beside])
        for question, other in zip(questions, others, strict=True)
    ]


def without_duplicates(rows: ray.data.Dataset) -> ray.data.Dataset:
    """Ready pairs that were read, with the later ones of the same question and answers dropped."""

    def names_of(part: pa.Table) -> list[str]:
        names = []
        for row in part.to_pylist():
            extra = json.loads(row["extra"] or "{}")
            # Rows that were dropped stay what they are.
            same = digest(row[QUESTION], [extra.get(side) for side in SIDES])
            names.append(same if alive(row) else row[ID_COLUMN])
        return names

    columns = [ID_COLUMN, QUESTION, "extra", "dropped", "source", "line"]
    parts = list(rows.select_columns(columns).iter_batches(batch_format="pyarrow"))
    several = repeated(lambda: map(names_of, parts))
    first: dict[str, Place] = {}
    for part in parts:
        _note_first(first, part, names_of(part), several)

    def marked(part: pa.Table) -> pa.Table:
        found = _without_later(part, names_of(part), first, DUPLICATE)
        return part if found is None else found

    return rows.map_batches(marked, batch_format="pyarrow") if first else rows


def _without_later(part: pa.Table, names: list[str], first: dict[str, Place], reason: str) -> pa.Table | None:
    """The part with all but the first row of each name dropped; None if it has no other."""
    places = zip(part["source"].to_pylist(), part["line"].to_pylist(), strict=True)
    later = [first.get(name, place) != place for name, place in zip(names, places, strict=True)]
    return with_dropped(part, later, reason)


def with_dropped(part: pa.Table, lost: list[bool], reason: str) -> pa.Table | None:
    """The part with the rows dropped that are marked as `lost`; None if there are none."""
    if not any(lost):
        return None
    rows = [{**row, "dropped": row.get("dropped")} for row in part.to_pylist()]
    for place, row in enumerate(rows):
        if lost[place]:
            # Their place in the source tells rows of one id apart.
            rows[place] = drop({**row, ID_COLUMN: f"{row['source']}:{row['line']}"}, reason)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def drop_heldout_questions(folder: StageFolder) -> None:
    """Drop the rows of an unfinished folder that ask a question which is held out in another row."""
    heldout = pa.array(questions_of(folder, HELDOUT), pa.string())

    def lost(part: pa.Table) -> pa.ChunkedArray:
        return pc.and_(pc.is_in(part[QUESTION], heldout), pc.not_equal(part["split"], HELDOUT))

    if any(pc.any(lost(part)).as_py() for part in folder.tables(columns=[QUESTION, "split"])):
        folder.rewrite(lambda part: with_dropped(part, lost(part).to_pylist(), HELD_OUT), ID_COLUMN)


def drop_not_drawn(folder: StageFolder, job: Job, places: Places) -> None:
    """Drop the rows of an unfinished folder that are more than the shares of the job's sources."""
    lost = not_drawn(folder, job.prompts, places, job.synthesis.split, SEED)
    folder.rewrite(lambda part: with_dropped(part, lost(part), NOT_DRAWN), ID_COLUMN)


def drop_near_duplicates(folder: StageFolder, near: Collection[str]) -> None:
    """Drop the rows of these ids from an unfinished folder, as near-duplicates of held-out prompts."""
    folder.rewrite(
        lambda part: with_dropped(part, [name in near for name in part[ID_COLUMN].to_pylist()], NEARLY_HELD_OUT),
        ID_COLUMN,
    )


def questions_of(folder: StageFolder, split: str) -> list[str]:
    """The questions of one split, each once."""
    found: dict[str, None] = {}
    for part in folder.tables(columns=[QUESTION, "split"]):
        found |= dict.fromkeys(part.filter(pc.equal(part["split"], split))[QUESTION].to_pylist())
    return list(found)


def question_of(row: Row, settings: Settings) -> str:
    """The question of a stored row of the prompts stage; rows of earlier versions do not name it."""
    if row.get(QUESTION):
        return str(row[QUESTION])
    messages, bare = row["prompt"], extra_of(row).get(BARE)
    if bare is not None and (settings.templates or settings.heldout_templates):
        messages = [*messages[:-1], {**messages[-1], "content": bare}]
    return _question({}, messages, settings.system)
