"""Where prompts come from: JSONL, Parquet and CSV files, or a Hugging Face data set, as numbered raw rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rdpo.config import Job
from rdpo.config import Prompts as Settings
from rdpo.errors import InputError
from rdpo.files.stage_folder import IN_PROGRESS, MANIFEST
from rdpo.files.stores import file_system, open_file
from rdpo.records import SIDES

if TYPE_CHECKING:
    import ray.data

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
READ_ROWS = 512
READ_CHARS = 64 << 20
LINE_BYTES = 16 << 20
ROW_GROUP_BYTES = 8 << 30
NESTED = 100
LOOKED_AT = 100
SHOWN_CHARS = 200
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
    _check_named(files[0], list(first_row(files[0])), needed_columns(job))
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
        for chunk in _chunks(islice(read_rows(share["path"]), share["rows"])):
            yield _raw_table(share["path"], chunk)


def _chunks(numbered: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    """Rows in lists that are bounded in number and in size, since the text of one may be very long."""
    chunk: list[Numbered] = []
    chars = 0
    for number, raw in numbered:
        chunk.append((number, raw))
        chars += sum(len(value) for value in raw.values() if isinstance(value, str)) if isinstance(raw, dict) else 0
        if len(chunk) == READ_ROWS or chars > READ_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


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


def content_hash(source: str) -> str:
    """Hash of the content of a source's files; a data set of the hub is known by its name.

    Raises:
        InputError: nothing is there, or nothing of a known format.
    """
    if source.startswith("hf:"):
        return source

    total = hashlib.blake2b(digest_size=16)
    for path in source_files(source):
        with open_file(path) as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()


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
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield number, _parse_json(line)


def _lines(file: Any) -> Iterator[bytes]:
    """The lines of a binary file; of one that is too long only the beginning, one byte more than may be."""
    while line := file.readline(LINE_BYTES + 1):
        rest = line
        while len(rest) > LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(LINE_BYTES + 1)
        yield line


def _parse_json(line: bytes) -> dict[str, Any] | str:
    if len(line) > LINE_BYTES:
        return f"line is longer than {LINE_BYTES >> 20} MiB"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "line is not UTF-8"
    except (ValueError, RecursionError):
        return "line is not JSON"
    # What Python can just read it may be unable to write a few calls further down.
    if line.count(b"[") + line.count(b"{") > NESTED and _deeper(value, NESTED):
        return f"line is nested more than {NESTED} levels deep"
    return value if isinstance(value, dict) else "line is not a JSON object"


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and tables are nested in more levels."""
    if not isinstance(value, dict | list):
        return False
    return not levels or any(_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def _csv_rows(path: str) -> Iterator[Numbered]:
    with open_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
        reader = csv.DictReader(_csv_lines(text, path))
        try:
            for number, row in enumerate(reader, start=2):
                broken = any("\ufffd" in str(value) for value in row.values())
                yield number, "line is not UTF-8" if broken else {str(k): v for k, v in row.items()}
        except csv.Error as error:
            raise InputError(
                f"prompts.source: {path}: line {reader.line_num}: {error}; correct it, or write JSONL or Parquet"
            ) from None


def _csv_lines(file: Any, path: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), ""), start=1):
        if len(line) > LINE_BYTES:
            raise InputError(
                f"prompts.source: {path}: line {number} is longer than {LINE_BYTES >> 20} MiB; write JSONL or Parquet"
            )
        yield line


def _parquet_rows(path: str) -> Iterator[Numbered]:
    with open_file(path) as file:
        try:
            parquet = pq.ParquetFile(file)
            _check_row_groups(parquet.metadata, path)
            number = 0
            for batch in parquet.iter_batches(READ_ROWS):
                yield from enumerate(_batch_rows(batch), start=number + 1)
                number += batch.num_rows
        except (pa.ArrowException, ValueError, OSError) as error:
            raise InputError(f"prompts.source: {path} is not a readable Parquet file: {error}") from None


def _check_row_groups(metadata: Any, path: str) -> None:
    """Look at what the file says it unpacks to, before it does.

    Raises:
        InputError: a row group is larger than memory should be asked for.
    """
    largest = max((metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)), default=0)
    if largest > ROW_GROUP_BYTES:
        raise InputError(
            f"prompts.source: {path}: a row group unpacks to {largest / (1 << 30):.1f} GiB; at most "
            f"{ROW_GROUP_BYTES >> 30} are read; write it with smaller row groups"
        )


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Raw]:
    """The rows of a batch; one with values that Python cannot hold, as text that is no UTF-8, is the reason."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield f"row cannot be read: {error}"[:SHOWN_CHARS]


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


def first_row(path: str) -> dict[str, Any]:
    """The first row of a file that can be read.

    Raises:
        InputError: there is none near its beginning.
    """
    first = next((row for _, row in islice(read_rows(path), LOOKED_AT) if isinstance(row, dict)), None)
    if first is None:
        raise InputError(f"prompts.source: {path} has no readable row in its first {LOOKED_AT} lines")
    return first


def _check_named(source: str, columns: list[str], needed: list[list[str]]) -> None:
    for choice in needed:
        if not set(choice) & set(columns):
            raise _no_such_column(source, choice[0], columns)


def _no_such_column(source: str, column: str, columns: list[str]) -> InputError:
    has = f"{source} has no column `{column}`; it has {', '.join(map(repr, columns))}"
    if column in SIDES:
        return InputError(f"prompts.source: {has}; a preference data set needs it, a source of prompts synthesis.task")
    return InputError(f"prompts.column: {has}")
