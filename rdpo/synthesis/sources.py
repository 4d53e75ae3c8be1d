"""Where prompts come from: JSONL, Parquet and CSV files, or a Hugging Face data set, as numbered raw rows.

JSON and CSV files may be compressed. Parquet compresses by itself.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rdpo.config import Job
from rdpo.config import Prompts as Settings
from rdpo.errors import InputError
from rdpo.files.compressed import ENDINGS, ending_by_content, open_unpacked, plain_name
from rdpo.files.folder import IN_PROGRESS, MANIFEST
from rdpo.files.stores import file_system, open_file
from rdpo.records import Fingerprint
from rdpo.synthesis.columns import check_columns, needed_columns
from rdpo.synthesis.hub import PREFIX, HubSource

if TYPE_CHECKING:
    import ray.data

TEXT_FORMATS = (".jsonl", ".json", ".csv")
PACKED_FORMATS = tuple(form + ending for form in TEXT_FORMATS for ending in ENDINGS)
FORMATS = (*TEXT_FORMATS, ".parquet", *PACKED_FORMATS)
READ_ROWS = 512
READ_CHARS = 64 << 20
LINE_BYTES = 16 << 20
ROW_GROUP_BYTES = 8 << 30
NESTED = 100
LOOKED_AT = 100
LOOKED_AT_BYTES = 4096
ARRAY_BYTES = 1 << 30
FILE_SPLIT = re.compile(r"(train|test|validation|val|valid|dev|eval|heldout|held-out)(?:[-_.].*)?\.[a-z]+$")
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
    if settings.source.startswith(PREFIX):
        rows = _hub_rows(settings, needed_columns(job))
        return rows.map_batches(_hub_table, fn_kwargs={"source": settings.source}, batch_format="pyarrow")
    files = source_files(settings.source)
    check_columns(files[0], first_rows(files[0]), needed_columns(job))
    splits = file_splits(files)
    shares = [
        {"path": path, "rows": count, "split": splits.get(path)} for path, count in _shares(files, settings.limit)
    ]
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
        rows = islice(read_rows(share["path"]), share["rows"])
        for chunk in _chunks(_in_split(rows, share["split"])):
            yield _raw_table(share["path"], chunk)


def file_splits(files: Sequence[str]) -> dict[str, str]:
    """The splits that a folder's files are named after, as `train.jsonl` and `test.jsonl`; none if all are one's."""
    found = {path: FILE_SPLIT.match(path.rsplit("/", 1)[-1]) for path in files}
    named = {path: match[1] for path, match in found.items() if match}
    return named if len(set(named.values())) > 1 else {}


def _in_split(rows: Iterable[Numbered], split: str | None) -> Iterator[Numbered]:
    """The rows with the split of their file, where they name none themselves."""
    for number, row in rows:
        if split and isinstance(row, dict) and row.get("split") in (None, ""):
            row = {**row, "split": split}
        yield number, row


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
    """Hash of the content of a source's files; a data set of the hub is known by its name and commit.

    Raises:
        InputError: nothing is there, or nothing of a known format.
    """
    if source.startswith(PREFIX):
        # Earlier versions went by the name alone.
        hub = HubSource.of(source)
        return Fingerprint(f"{PREFIX}{hub.name}@{hub.commit()}", former=lambda: source)

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
        return

    with open_unpacked(path) as file:
        beginning: bytes = file.read(LOOKED_AT_BYTES)
    _check_unpacked(beginning, path)
    if plain_name(path).endswith(".csv"):
        yield from _csv_rows(path)
    elif _is_array(beginning, path) and (entries := _array(path)) is not None:
        yield from ((number, _checked_object(entry, "entry")) for number, entry in enumerate(entries, start=1))
    else:
        yield from _json_lines(path)


def _check_unpacked(beginning: bytes, path: str) -> None:
    """Look whether the text of a file is still compressed.

    Raises:
        InputError: it is.
    """
    ending = ending_by_content(beginning)
    if ending is None:
        return
    remedy = f"let its name end in {ending}" if plain_name(path) == path else "unpack it once"
    raise InputError(f"prompts.source: {path}: line 1 is compressed data, and no text; {remedy}")


def _json_lines(path: str) -> Iterator[Numbered]:
    with open_unpacked(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield number, _parse_json(line)


def _is_array(beginning: bytes, path: str) -> bool:
    """Whether a file is one JSON array.

    In JSON lines a line may be a list too, which is no row; that is said line by line.
    """
    text = beginning.removeprefix(codecs.BOM_UTF8).lstrip()
    first_line = text.split(b"\n", 1)[0]
    return text.startswith(b"[") and (plain_name(path).endswith(".json") or first_line.strip() == b"[")


def _array(path: str) -> list[Any] | None:
    """The entries of a file that is one JSON array; None if it is none, and may be JSON lines with a broken first one.

    Raises:
        InputError: a `.json` file holds a broken array, or an array is too large to be read at once.
    """
    with open_unpacked(path) as file:
        content = file.read(ARRAY_BYTES + 1)
    if len(content) > ARRAY_BYTES:
        raise InputError(
            f"prompts.source: {path} is a JSON array of more than {ARRAY_BYTES >> 20} MiB; write one object a line"
        )
    try:
        entries: list[Any] = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not plain_name(path).endswith(".json"):
            return None
        raise InputError(
            f"prompts.source: {path} begins like a JSON array and is none: {error}; write one object a line"
        ) from None
    return entries


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
    return _checked_object(value, "line")


def _checked_object(value: Any, what: str) -> dict[str, Any] | str:
    # What Python can just read it may be unable to write a few calls further down.
    if _deeper(value, NESTED):
        return f"{what} is nested more than {NESTED} levels deep"
    return value if isinstance(value, dict) else f"{what} is not a JSON object"


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and tables are nested in more levels."""
    if not isinstance(value, dict | list):
        return False
    return not levels or any(_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def _csv_rows(path: str) -> Iterator[Numbered]:
    with open_unpacked(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
        # By default a field of more than 131,072 characters ends the reading; lines are bounded anyway.
        csv.field_size_limit(LINE_BYTES)
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

    hub = HubSource.of(settings.source)
    # What is read is what the stage's key says, also where the data set has moved on since.
    at = {"revision": hub.commit()}
    try:
        loaded = datasets.load_dataset(hub.name, settings.subset, split=settings.dataset_split, **at)
    except Exception as error:
        raise InputError(f"prompts.source: hf:{hub.name} cannot be loaded: {error}") from None
    check_columns(settings.source, [dict.fromkeys(loaded.column_names)], needed)
    wanted = loaded.select(range(min(len(loaded), settings.limit or len(loaded))))
    return ray.data.from_huggingface(wanted.add_column("rdpo_line", range(1, len(wanted) + 1)))


def first_rows(path: str) -> list[dict[str, Any]]:
    """The rows near the beginning of a file that can be read.

    Raises:
        InputError: there is none.
    """
    first = [row for _, row in islice(read_rows(path), LOOKED_AT) if isinstance(row, dict)]
    if not first:
        raise InputError(f"prompts.source: {path} has no readable row in its first {LOOKED_AT} lines")
    return first
