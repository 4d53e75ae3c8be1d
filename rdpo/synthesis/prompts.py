"""Prompts: raw rows of the source become rows with an id and a split.

In: files or a data set. Out: `prompt_id`, `prompt` (messages), `split`, `source`, `line`, and the
source's other columns as JSON in `extra`. A line that cannot be used becomes a dropped row with
its file, line and reason; a source that cannot be used at all is an `InputError`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.config import Job
from rdpo.config import Prompts as Settings
from rdpo.errors import InputError
from rdpo.files.stage_folder import StageFolder
from rdpo.modeling.chat import load_chat
from rdpo.modeling.weights import ModelRef
from rdpo.records import (
    HELDOUT,
    ID_COLUMN,
    Messages,
    Row,
    alive,
    clean,
    draw_seed,
    drop,
    prompt_id,
    split_name,
    unit_draw,
)
from rdpo.synthesis.conversation import Unusable, check_columns, derive_pair, read_prompt
from rdpo.synthesis.given import pair_id
from rdpo.synthesis.instructions import check_template, render
from rdpo.synthesis.sources import Raw, raw_rows

if TYPE_CHECKING:
    import ray.data

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("line", pa.int64()),
        (ID_COLUMN, pa.string()),
        ("prompt", MESSAGES),
        ("prompt_length", pa.int64()),
        ("split", pa.string()),
        ("extra", pa.string()),
        ("dropped", pa.string()),
    ]
)
BLOCK_ROWS = 4096
SHOWN_CHARS = 500


def read_prompts(job: Job) -> ray.data.Dataset:
    """All rows of the job's source, usable and dropped; a prompt that stands there twice is there twice.

    Raises:
        InputError: the source is missing or empty, or has no such column.
    """
    # The cut between reading and rendering lets all cores render what one file holds; one that is not strict would be
    # fused with both sides of it.
    raw = raw_rows(job).repartition(target_num_rows_per_block=BLOCK_ROWS, strict=True)
    return raw.map_batches(_prompt_table, fn_kwargs={"job": job}, batch_format="pyarrow", batch_size=None)


def beside(settings: Settings, source: str, column: str, limit: int | None) -> Settings:
    """Settings to read another source than the job's: its templates, splits and data set options do not apply."""
    longest = settings.max_prompt_tokens
    return Settings(source=source, column=column, limit=limit, system=settings.system, max_prompt_tokens=longest)


def _prompt_table(raw: pa.Table, job: Job) -> pa.Table:
    rows = [
        prompt_row(row["source"], row["line"], row["problem"] or json.loads(row["raw"]), job) for row in raw.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def prompt_row(source: str, line: int, raw: Raw, job: Job) -> Row:
    """One row of the prompts table from one raw row, or a dropped row with its reason."""
    place = f"{source}:{line}"
    row: Row = {"source": source, "line": line, ID_COLUMN: place, "prompt": []}
    row = drop(row, raw) if isinstance(raw, str) else _measure(_parsed(row, raw, job), job)
    # Dropped rows may have one prompt several times; their place tells them apart.
    return row if alive(row) else {**row, ID_COLUMN: place}


def _parsed(row: Row, raw: dict[str, Any], job: Job) -> Row:
    """The row with prompt, id and split."""
    settings, given = job.prompts, job.synthesis.task is None
    others = {key: value for key, value in raw.items() if key not in (settings.column, "split")}
    try:
        messages, answers = _conversation(raw, settings, given)
    except Unusable as error:
        others[settings.column] = str(raw.get(settings.column))[:SHOWN_CHARS]
        return drop({**row, "extra": _as_json(others)}, str(error))
    others |= answers

    split, reason = _split(raw.get("split"), prompt_id(messages), job), None
    if templates := _templates(settings, split):
        others["bare"] = messages[-1]["content"]
        messages, reason = _wrapped(messages, templates, others, job.seed)

    name = pair_id(messages, answers) if given else prompt_id(messages)
    row = {**row, "extra": _as_json(others), "split": split, "prompt": messages, ID_COLUMN: name}
    return drop(row, reason) if reason else row


def _conversation(raw: dict[str, Any], settings: Settings, given: bool) -> tuple[Messages, dict[str, str]]:
    """The prompt of a raw row, and both answers if they are given.

    Raises:
        Unusable: it is no conversation, or something of it would be lost.
    """
    if given:
        pair = derive_pair(raw, settings.column)
        return with_system(pair.prompt, settings.system), pair.answers
    check_columns(raw)
    try:
        return with_system(read_prompt(raw.get(settings.column)), settings.system), {}
    except Unusable as error:
        raise Unusable(f"{settings.column}: {error}") from None


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
    for name in ("templates", "heldout_templates"):
        for template in getattr(settings, name):
            if "prompt" not in check_template(template, f"prompts.{name}"):
                raise InputError(
                    f"prompts.{name}: {template[:80]!r} has no place for the prompt; write {{{{ prompt }}}}"
                )


def _templates(settings: Settings, split: str) -> list[str]:
    return settings.heldout_templates or settings.templates if split == HELDOUT else settings.templates


def _wrapped(
    messages: Messages, templates: list[str], others: dict[str, Any], seed: int
) -> tuple[Messages, str | None]:
    """The messages with the last one put into one of the templates; with the reason if that cannot be done."""
    template = templates[draw_seed(seed, prompt_id(messages), "template") % len(templates)]
    try:
        content = render(template, {**others, "prompt": messages[-1]["content"]})
    except ValueError as error:
        return messages, str(error)
    return [*messages[:-1], {**messages[-1], "content": clean(content)}], None


def _as_json(columns: dict[str, Any]) -> str:
    return clean(json.dumps(columns, ensure_ascii=False, default=str))


def _split(value: Any, row_id: str, job: Job) -> str:
    if isinstance(value, str) and value:
        return clean(split_name(value))
    return HELDOUT if unit_draw(job.seed, row_id, "split") < job.prompts.heldout_fraction else "train"


def _measure(row: Row, job: Job) -> Row:
    if not alive(row):
        return row
    chat = load_chat(ModelRef.student(job))
    try:
        row["prompt_length"] = len(chat.prompt_ids(row["prompt"]))
    except ValueError as error:
        return drop(row, f"chat template refuses the prompt: {str(error)[:200]}")
    if row["prompt_length"] > job.prompts.max_prompt_tokens:
        return drop(row, "prompt is longer than prompts.max_prompt_tokens")
    return row


def drop_duplicates(folder: StageFolder) -> None:
    """Keep the first row of each prompt (by source and line) in the parts of an unfinished folder; drop later ones."""
    several = folder.duplicates(ID_COLUMN)
    if not len(several):
        return
    meeting = [
        part.filter(pc.is_in(part[ID_COLUMN], several)) for part in folder.tables(columns=[ID_COLUMN, "source", "line"])
    ]
    ordered = pa.concat_tables(meeting).sort_by([("source", "ascending"), ("line", "ascending")]).to_pylist()
    first = {row[ID_COLUMN]: (row["source"], row["line"]) for row in reversed(ordered)}
    folder.rewrite(lambda part: _mark_duplicates(part, first), ID_COLUMN)


def without_duplicates(rows: ray.data.Dataset) -> ray.data.Dataset:
    """Rows that were read, with the later ones of each prompt (or pair) dropped."""
    first: dict[str, tuple[str, int]] = {}
    several: set[str] = set()
    for batch in rows.select_columns([ID_COLUMN, "source", "line"]).iter_batches(batch_format="pyarrow"):
        for row in batch.to_pylist():
            name, place = row[ID_COLUMN], (row["source"], row["line"])
            if name in first:
                several.add(name)
            first[name] = min(first.get(name, place), place)
    kept = {name: first[name] for name in several}

    def marked(part: pa.Table) -> pa.Table:
        return _mark_duplicates(part, kept) or part

    return rows.map_batches(marked, batch_format="pyarrow") if kept else rows


def _mark_duplicates(part: pa.Table, first: dict[str, tuple[str, int]]) -> pa.Table | None:
    """The part with later duplicates dropped; None if it has none."""
    rows = part.to_pylist()
    marked = [
        {**row, ID_COLUMN: f"{row['source']}:{row['line']}", "dropped": "duplicate of an earlier prompt"}
        if first.get(row[ID_COLUMN], (row["source"], row["line"])) != (row["source"], row["line"])
        else {**row, "dropped": row.get("dropped")}
        for row in rows
    ]
    found = any(row["dropped"] for row in marked)
    return pa.Table.from_pylist(marked, schema=SCHEMA) if found else None
