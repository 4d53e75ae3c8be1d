"""What one file holds, as numbered raw rows: JSON lines, a JSON array, CSV or Parquet.

JSON and CSV files may be compressed. Parquet compresses by itself.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from rdpo.errors import InputError
from rdpo.files.compressed import ENDINGS, ending_by_content, open_unpacked, plain_name
from rdpo.files.stores import open_file

TEXT_FORMATS = (".jsonl", ".json", ".csv")
PACKED_FORMATS = tuple(form + ending for form in TEXT_FORMATS for ending in ENDINGS)
FORMATS = (*TEXT_FORMATS, ".parquet", *PACKED_FORMATS)
LINES, ARRAY, CSV, PARQUET = "lines", "array", "csv", "parquet"
"""Forms in which a file is read."""
PARQUET_BEGINS = b"PAR1"
READ_ROWS = 512
LINE_BYTES = 16 << 20
ROW_GROUP_BYTES = 8 << 30
NESTED = 100
LOOKED_AT_BYTES = 4096
ARRAY_BYTES = 1 << 30
SHOWN_CHARS = 200

Raw = dict[str, object] | str
Numbered = tuple[int, Raw]


def read_rows(path: str) -> Iterator[Numbered]:
    """Numbered rows of one file, from 1; a row that cannot be read is the reason as a string.

    Raises:
        InputError: while it is read, that the file is not what the ending of its name says.
    """
    form = form_of(path)
    if form == PARQUET:
        yield from _parquet_rows(path)
    elif form == CSV:
        yield from _csv_rows(path)
    elif form == ARRAY and (entries := _array(path)) is not None:
        yield from ((number, _checked_object(entry, "entry")) for number, entry in enumerate(entries, start=1))
    else:
        yield from _json_lines(path)


def form_of(path: str) -> str:
    """The form in which a file is read, by the ending of its name and, of JSON, by its beginning.

    Raises:
        InputError: it is still compressed.
    """
    if path.endswith(".parquet"):
        return PARQUET
    beginning = _beginning(path)
    _check_unpacked(beginning, path)
    if plain_name(path).endswith(".csv"):
        return CSV
    return ARRAY if _is_array(beginning, path) else LINES


def is_usual(path: str, form: str) -> bool:
    """Whether what a file holds begins like this form: by its content alone one would read it so."""
    beginning = _text_of(_beginning(path))
    if not beginning:
        return True
    likely = {PARQUET_BEGINS: PARQUET, b"[": ARRAY, b"{": LINES}
    return form == next((one for begins, one in likely.items() if beginning.startswith(begins)), CSV)


def _beginning(path: str) -> bytes:
    with open_unpacked(path) as file:
        beginning: bytes = file.read(LOOKED_AT_BYTES)
    return beginning


def _text_of(beginning: bytes) -> bytes:
    return beginning.removeprefix(codecs.BOM_UTF8).lstrip()


def _check_unpacked(beginning: bytes, path: str) -> None:
    """Look whether the text of a file is still compressed.

    Raises:
        InputError: it is.
    """
    ending = ending_by_content(beginning)
    if ending is None:
        return
    remedy = f"let its name end in {ending}" if plain_name(path) == path else "unpack it once"
    raise InputError(f"{path}: line 1 is compressed data, and no text; {remedy}")


def _json_lines(path: str) -> Iterator[Numbered]:
    with open_unpacked(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield number, _parse_json(line)


def _is_array(beginning: bytes, path: str) -> bool:
    """Whether a file is one JSON array.

    In JSON lines a line may be a list too, which is no row; that is said line by line.
    """
    text = _text_of(beginning)
    first_line = text.split(b"\n", 1)[0]
    return text.startswith(b"[") and (plain_name(path).endswith(".json") or first_line.strip() == b"[")


def _array(path: str) -> list[object] | None:
    """The entries of a file that is one JSON array; None if it is none, and may be JSON lines with a broken first one.

    Raises:
        InputError: a `.json` file holds a broken array, or an array is too large to be read at once.
    """
    with open_unpacked(path) as file:
        content = file.read(ARRAY_BYTES + 1)
    if len(content) > ARRAY_BYTES:
        raise InputError(f"{path} is a JSON array of more than {ARRAY_BYTES >> 20} MiB; write one object a line")
    try:
        entries: list[object] = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not plain_name(path).endswith(".json"):
            return None
        raise InputError(f"{path} begins like a JSON array and is none: {error}; write one object a line") from None
    return entries


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a binary file; of one that is too long only the beginning, one byte more than may be."""
    while line := file.readline(LINE_BYTES + 1):
        rest = line
        while len(rest) > LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(LINE_BYTES + 1)
        yield line


def _parse_json(line: bytes) -> dict[str, object] | str:
    if len(line) > LINE_BYTES:
        return f"line is longer than {LINE_BYTES >> 20} MiB"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "line is not UTF-8"
    except (ValueError, RecursionError):
        return "line is not JSON"
    return _checked_object(value, "line")


def _checked_object(value: object, what: str) -> dict[str, object] | str:
    # What Python can just read it may be unable to write a few calls further down.
    if _deeper(value, NESTED):
        return f"{what} is nested more than {NESTED} levels deep"
    return value if isinstance(value, dict) else f"{what} is not a JSON object"


def _deeper(value: object, levels: int) -> bool:
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
                f"{path}: line {reader.line_num}: {error}; correct it, or write JSONL or Parquet"
            ) from None


def _csv_lines(file: IO[str], path: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), ""), start=1):
        if len(line) > LINE_BYTES:
            raise InputError(f"{path}: line {number} is longer than {LINE_BYTES >> 20} MiB; write JSONL or Parquet")
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
            raise InputError(f"{path} is not a readable Parquet file: {error}") from None


def _check_row_groups(metadata: pq.FileMetaData, path: str) -> None:
    """Look at what the file says it unpacks to, before it does.

    Raises:
        InputError: a row group is larger than memory should be asked for.
    """
    largest = max((metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)), default=0)
    if largest > ROW_GROUP_BYTES:
        raise InputError(
            f"{path}: a row group unpacks to {largest / (1 << 30):.1f} GiB; at most "
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
