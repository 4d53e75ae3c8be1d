"""Prompts from JSONL, Parquet, CSV or the Hugging Face hub to rows with an id and a split.

In: files or a data set. Out: `prompt_id`, `prompt` (messages), `split`, `source`, `line`, and the
source's other columns as JSON in `extra`. A line that cannot be used becomes a dropped row with
its file, line and reason; a source that cannot be used at all is an `InputError`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from rdpo.config import Job
from rdpo.config import Prompts as Settings
from rdpo.errors import InputError
from rdpo.policy.chat import load_chat
from rdpo.records import ROLES, Row, alive, drop, prompt_id, unit_draw
from rdpo.synthesis.given import SIDES, pair_id, with_prompt

if TYPE_CHECKING:
    import ray.data

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("line", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("prompt_length", pa.int64()),
        ("split", pa.string()),
        ("extra", pa.string()),
        ("dropped", pa.string()),
    ]
)
FORMATS = (".jsonl", ".json", ".parquet", ".csv")
SPLITS = {"test": "heldout", "validation": "heldout", "eval": "heldout", "held-out": "heldout"}
READ_ROWS = 512
SHOWN_CHARS = 500

Numbered = tuple[int, dict[str, Any] | str]


def read_prompts(job: Job) -> ray.data.Dataset:
    """All rows of the job's source, usable and dropped.

    Raises:
        InputError: the source is missing or empty, or has no such column.
    """
    import ray

    settings = job.prompts
    tables = partial(_prompt_tables, job=job)
    if settings.source.startswith("hf:"):
        rows = _hub_rows(settings, needed_columns(job)).map_batches(
            tables, batch_format="pyarrow", batch_size=READ_ROWS
        )
    else:
        files = source_files(settings.source)
        _check_columns(files[0], needed_columns(job))
        paths = ray.data.from_items([{"path": path} for path in files], override_num_blocks=len(files))
        rows = paths.map_batches(tables, batch_format="pyarrow", batch_size=1)
    return _drop_duplicates(rows.materialize())


def source_files(source: str) -> list[str]:
    """The files of a source: itself, or a folder's files of known formats in order of name.

    Raises:
        InputError: nothing is there, or nothing of a known format.
    """
    fs, root = fsspec.core.url_to_fs(source)
    if fs.isfile(root):
        found = [root]
    elif fs.isdir(root):
        found = sorted(path for path in fs.ls(root, detail=False) if path.endswith(FORMATS))
    else:
        raise InputError(f"prompts.source: {source} does not exist; give a file, a folder or hf:DATASET")
    if not found or not all(path.endswith(FORMATS) for path in found):
        raise InputError(f"prompts.source: {source} holds no file of a known format ({', '.join(FORMATS)})")
    return [fs.unstrip_protocol(path) if "://" in source else path for path in found]


def read_rows(path: str) -> Iterator[Numbered]:
    """Numbered rows of one file, from 1; a row that cannot be read is the reason as a string."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif path.endswith(".csv"):
        yield from _csv_rows(path)
    else:
        yield from _json_rows(path)


def _json_rows(path: str) -> Iterator[Numbered]:
    with fsspec.open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_json(line)


def _parse_json(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "line is not UTF-8"
    except (ValueError, RecursionError):
        return "line is not JSON"
    return value if isinstance(value, dict) else "line is not a JSON object"


def _csv_rows(path: str) -> Iterator[Numbered]:
    with fsspec.open(path, "r", encoding="utf-8-sig", errors="replace", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            broken = any("\ufffd" in str(value) for value in row.values())
            yield number, "line is not UTF-8" if broken else {str(k): v for k, v in row.items()}


def _parquet_rows(path: str) -> Iterator[Numbered]:
    with fsspec.open(path, "rb") as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise InputError(f"prompts.source: {path} is not a readable Parquet file: {error}") from None
        number = 0
        for batch in parquet.iter_batches(READ_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _hub_rows(settings: Settings, needed: list[list[str]]) -> ray.data.Dataset:
    import datasets
    import ray

    name = settings.source.removeprefix("hf:")
    try:
        loaded = datasets.load_dataset(name, settings.subset, split=settings.dataset_split)
    except Exception as error:
        raise InputError(f"prompts.source: hf:{name} cannot be loaded: {error}") from None
    _check_named(settings.source, loaded.column_names, needed)
    return ray.data.from_huggingface(loaded.add_column("rdpo_line", range(1, len(loaded) + 1)))


def needed_columns(job: Job) -> list[list[str]]:
    """The columns that the source must have, one of each list."""
    if job.synthesis.task is None:
        return [[job.prompts.column, "chosen"], ["chosen"], ["rejected"]]
    return [[job.prompts.column]]


def _check_columns(path: str, needed: list[list[str]]) -> None:
    first = next((row for _, row in islice(read_rows(path), 100) if isinstance(row, dict)), None)
    if first is None:
        raise InputError(f"prompts.source: {path} has no readable row in its first 100 lines")
    _check_named(path, list(first), needed)


def _check_named(source: str, columns: list[str], needed: list[list[str]]) -> None:
    for choice in needed:
        if not set(choice) & set(columns):
            raise _no_such_column(source, choice[0], columns)


def _no_such_column(source: str, column: str, columns: list[str]) -> InputError:
    has = f"{source} has no column `{column}`; it has {', '.join(map(repr, columns))}"
    if column in SIDES:
        return InputError(f"prompts.source: {has}; a preference data set needs it, a source of prompts synthesis.task")
    return InputError(f"prompts.column: {has}")


def _prompt_tables(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    if "path" in batch.column_names and "rdpo_line" not in batch.column_names:
        for path in batch["path"].to_pylist():
            numbered = islice(read_rows(path), job.prompts.limit)
            yield from _tables(((path, number, row) for number, row in numbered), job)
    else:
        source = job.prompts.source
        within = (row for row in batch.to_pylist() if row["rdpo_line"] <= (job.prompts.limit or 1 << 62))
        yield from _tables(((source, row.pop("rdpo_line"), row) for row in within), job)


def _tables(numbered: Iterable[tuple[str, int, dict[str, Any] | str]], job: Job) -> Iterator[pa.Table]:
    rows = (prompt_row(source, number, row, job) for source, number, row in numbered)
    while chunk := list(islice(rows, READ_ROWS)):
        yield pa.Table.from_pylist(chunk, schema=SCHEMA)


def prompt_row(source: str, line: int, raw: dict[str, Any] | str, job: Job) -> Row:
    """One row of the prompts table from one raw row, or a dropped row with its reason."""
    row: Row = {"source": source, "line": line, "prompt_id": f"{source}:{line}", "prompt": []}
    if isinstance(raw, str):
        return drop(row, raw)
    settings, given = job.prompts, job.synthesis.task is None
    raw = with_prompt(raw, settings.column) if given else raw
    others = {key: value for key, value in raw.items() if key not in (settings.column, "split")}
    row["extra"] = json.dumps(others, ensure_ascii=False, default=str)
    messages, reason = parse_messages(raw.get(settings.column), settings.system)
    if reason:
        shown = str(raw.get(settings.column))[:SHOWN_CHARS]
        row["extra"] = json.dumps({**others, settings.column: shown}, ensure_ascii=False, default=str)
        return drop(row, f"{settings.column}: {reason}")
    row["prompt"], row["prompt_id"] = messages, pair_id(messages, raw) if given else prompt_id(messages)
    row["split"] = _split(raw.get("split"), prompt_id(messages), job)
    return _measure(row, job)


def parse_messages(value: Any, system: str | None = None) -> tuple[list[dict[str, str]], str | None]:
    """Messages from text or from a list of messages; with the reason if that cannot be done."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        return [], "neither text nor a list of messages"
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return [], f"a message needs a role out of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return [], "empty"
        messages.append({"role": message["role"], "content": _clean(message["content"])})
    if messages[-1]["role"] == "assistant":
        return [], "ends with an assistant message"
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages, None


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _split(value: Any, row_id: str, job: Job) -> str:
    if isinstance(value, str) and value:
        return SPLITS.get(value, value)
    return "heldout" if unit_draw(job.seed, row_id, "split") < job.prompts.heldout_fraction else "train"


def _measure(row: Row, job: Job) -> Row:
    chat = load_chat(job.student.model, job.student.revision, job.student.trust_remote_code)
    try:
        row["prompt_length"] = len(chat.prompt_ids(row["prompt"]))
    except ValueError as error:
        return drop(row, f"chat template refuses the prompt: {str(error)[:200]}")
    if row["prompt_length"] > job.prompts.max_prompt_tokens:
        return drop(row, "prompt is longer than prompts.max_prompt_tokens")
    return row


def _drop_duplicates(rows: ray.data.Dataset) -> ray.data.Dataset:
    """The first row of each prompt stays (by source and line); later ones are dropped, whole."""
    keys = rows.select_columns(["prompt_id", "source", "line", "dropped"]).to_pandas()
    keys = keys[keys["dropped"].isna()].sort_values(["source", "line"])
    later = keys[keys.duplicated("prompt_id")]
    twins = set(zip(later["source"], later["line"], strict=True))
    return rows.map_batches(partial(_mark_twins, twins=twins), batch_format="pyarrow") if twins else rows


def _mark_twins(table: pa.Table, twins: set[tuple[str, int]]) -> pa.Table:
    rows = table.to_pylist()
    marked = [
        drop({**row, "prompt_id": f"{row['source']}:{row['line']}"}, "duplicate of an earlier prompt")
        if (row["source"], row["line"]) in twins and alive(row)
        else row
        for row in rows
    ]
    return pa.Table.from_pylist(marked, schema=SCHEMA)
