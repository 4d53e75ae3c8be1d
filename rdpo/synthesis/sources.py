"""Where prompts come from: JSONL, Parquet and CSV files, or a Hugging Face data set, as numbered raw rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rdpo.config import Job
from rdpo.config import Prompts as Settings
from rdpo.errors import InputError
from rdpo.storage import IN_PROGRESS, MANIFEST
from rdpo.stores import file_system, open_file
from rdpo.synthesis.given import SIDES

if TYPE_CHECKING:
    import ray.data

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
READ_ROWS = 512
LOOKED_AT = 100
RAW = pa.schema([("source", pa.string()), ("line", pa.int64()), ("raw", pa.string()), ("problem", pa.string())])
"""A raw row: where it is from, and its content as JSON text, or the problem with it."""

Raw = dict[str, Any] | str
Numbered = tuple[int, Raw]


def raw_rows(job: Job) -> ray.data.Dataset:
    """The rows of the job's source in the columns of `RAW`; nothing is left out but what `prompts.limit` says.

    Raises:
        InputError: the source is missing or empty, or has no such column.
    """
    import ray.data

    settings = job.prompts
    if settings.source.startswith("hf:"):
        rows = _hub_rows(settings, needed_columns(job))
        return rows.map_batches(_hub_table, fn_kwargs={"source": settings.source}, batch_format="pyarrow")
    files = source_files(settings.source)
    _check_columns(files[0], needed_columns(job))
    shares = [{"path": path, "rows": count} for path, count in _shares(files, settings.limit)]
    paths = ray.data.from_items(shares, override_num_blocks=len(shares))
    return paths.map_batches(_file_tables, batch_format="pyarrow", batch_size=1)


def _shares(files: list[str], limit: int | None) -> Iterator[tuple[str, int | None]]:
    """How many rows of each file are read; None is all."""
    if limit is None:
        yield from ((path, None) for path in files)
        return
    for path in files:
        count = sum(1 for _ in islice(read_rows(path), limit))
        yield path, count
        limit -= count
        if not limit:
            return


def _file_tables(shares: pa.Table) -> Iterator[pa.Table]:
    for share in shares.to_pylist():
        numbered = islice(read_rows(share["path"]), share["rows"])
        while chunk := list(islice(numbered, READ_ROWS)):
            yield _raw_table(share["path"], chunk)


def _hub_table(batch: pa.Table, source: str) -> pa.Table:
    return _raw_table(source, [(row.pop("rdpo_line"), row) for row in batch.to_pylist()])


def _raw_table(source: str, numbered: list[Numbered]) -> pa.Table:
    # Escaped to ASCII, because a JSON text can hold half characters that no Arrow string takes.
    contents = [None if isinstance(raw, str) else json.dumps(raw, default=str) for _, raw in numbered]
    problems = [raw if isinstance(raw, str) else None for _, raw in numbered]
    lines = [line for line, _ in numbered]
    return pa.table([[source] * len(lines), lines, contents, problems], schema=RAW)


def source_files(source: str) -> list[str]:
    """The files of a source: itself, or a folder's files of known formats in order of name (of a stage's, its parts).

    Raises:
        InputError: nothing is there, or nothing of a known format.
    """
    fs, root = file_system(source)
    if fs.isfile(root):
        found = [root]
    elif fs.isdir(root):
        found = sorted(path for path in fs.ls(root, detail=False) if path.endswith(FORMATS) and not _own(path))
    else:
        raise InputError(f"prompts.source: {source} does not exist; give a file, a folder or hf:DATASET")
    if not found or not all(path.endswith(FORMATS) for path in found):
        raise InputError(f"prompts.source: {source} holds no file of a known format ({', '.join(FORMATS)})")
    return [fs.unstrip_protocol(path) if "://" in source else path for path in found]


def _own(path: str) -> bool:
    return path.rsplit("/", 1)[1] in (MANIFEST, IN_PROGRESS)


def read_rows(path: str) -> Iterator[Numbered]:
    """Numbered rows of one file, from 1; a row that cannot be read is the reason as a string."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif path.endswith(".csv"):
        yield from _csv_rows(path)
    else:
        yield from _json_rows(path)


def _json_rows(path: str) -> Iterator[Numbered]:
    with open_file(path) as file:
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
    with open_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
        for number, row in enumerate(csv.DictReader(text), start=2):
            broken = any("\ufffd" in str(value) for value in row.values())
            yield number, "line is not UTF-8" if broken else {str(k): v for k, v in row.items()}


def _parquet_rows(path: str) -> Iterator[Numbered]:
    with open_file(path) as file:
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
    import ray.data

    name = settings.source.removeprefix("hf:")
    try:
        loaded = datasets.load_dataset(name, settings.subset, split=settings.dataset_split)
    except Exception as error:
        raise InputError(f"prompts.source: hf:{name} cannot be loaded: {error}") from None
    _check_named(settings.source, loaded.column_names, needed)
    wanted = loaded.select(range(min(len(loaded), settings.limit or len(loaded))))
    return ray.data.from_huggingface(wanted.add_column("rdpo_line", range(1, len(wanted) + 1)))


def needed_columns(job: Job) -> list[list[str]]:
    """The columns that the source must have, one of each list."""
    if job.synthesis.task is None:
        return [[job.prompts.column, "chosen"], ["chosen"], ["rejected"]]
    return [[job.prompts.column]]


def _check_columns(path: str, needed: list[list[str]]) -> None:
    first = next((row for _, row in islice(read_rows(path), LOOKED_AT) if isinstance(row, dict)), None)
    if first is None:
        raise InputError(f"prompts.source: {path} has no readable row in its first {LOOKED_AT} lines")
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
