"""Where prompts and pairs come from: files, or a Hugging Face data set, as numbered raw rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.config import Prompts as Settings
from rdpo.errors import InputError, named
from rdpo.files.folder import IN_PROGRESS, MANIFEST
from rdpo.files.stores import file_system, open_file
from rdpo.records import Fingerprint, digest
from rdpo.synthesis.columns import Reading, check_columns, columns_of
from rdpo.synthesis.formats import ARRAY, CSV, FORMATS, READ_ROWS, Numbered, form_of, is_usual, read_rows
from rdpo.synthesis.hub import PREFIX, HubSource

if TYPE_CHECKING:
    import datasets
    import ray.data

READ_CHARS = 64 << 20
LOOKED_AT = 100
FILE_SPLIT = re.compile(r"(train|test|validation|val|valid|dev|eval|heldout|held-out)(?:[-_.].*)?\.[a-z]+$")
RAW = pa.schema([("source", pa.string()), ("line", pa.int64()), ("raw", pa.string()), ("problem", pa.string())])
"""A raw row: where it is from, and its content as JSON text, or the problem with it."""


def raw_rows(settings: Settings, reading: Reading) -> ray.data.Dataset:
    """The rows of a source in the columns of `RAW`; nothing is left out but what the limit says.

    Raises:
        InputError: the source is missing or empty, or has no such column.
    """
    import ray.data

    source = _only_source(settings)
    if source.startswith(PREFIX):
        rows = ray.data.from_huggingface(_numbered(_hub_data(source, settings, reading), settings.limit))
        return rows.map_batches(_hub_table, fn_kwargs={"source": reading.place or source}, batch_format="pyarrow")

    files = _checked_files(source, reading)
    splits = file_splits(files)
    with named(reading.setting):
        counts = list(_counts(files, settings.limit))
    shares = [{"path": path, "rows": count, "split": splits.get(path)} for path, count in counts]
    paths = ray.data.from_items(shares, override_num_blocks=len(shares))
    return paths.map_batches(_file_tables, fn_kwargs={"setting": reading.setting}, batch_format="pyarrow", batch_size=1)


def check_source(settings: Settings, reading: Reading) -> None:
    """Look whether a source is there and has its columns, near its beginning.

    Raises:
        InputError: it is not, or has not.
    """
    source_columns(settings, reading)


def source_columns(settings: Settings, reading: Reading) -> list[str]:
    """The columns of a source, as far as they are seen near its beginning.

    Raises:
        InputError: it is not there, or lacks one that it must have.
    """
    source = _only_source(settings)
    if source.startswith(PREFIX):
        return list(_hub_data(source, settings, reading).column_names)
    files = _checked_files(source, reading)
    with named(reading.setting):
        return columns_of(first_rows(files[0]))


def _only_source(settings: Settings) -> str:
    """The source of settings that have one."""
    if settings.source is None:
        raise ValueError("several sources are read one by one")
    return settings.source


def _checked_files(source: str, reading: Reading) -> list[str]:
    with named(reading.setting):
        files = source_files(source)
        rows = first_rows(files[0])
    check_columns(files[0], rows, reading.needed)
    return files


def _counts(files: list[str], limit: int | None) -> Iterator[tuple[str, int | None]]:
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


def _file_tables(shares: pa.Table, setting: str) -> Iterator[pa.Table]:
    for share in shares.to_pylist():
        rows = islice(read_rows(share["path"]), share["rows"])
        with named(setting):
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
        raise InputError(f"{source} does not exist; give a file, a folder or hf:DATASET")

    if not found or not all(path.endswith(FORMATS) for path in found):
        raise InputError(f"{source} holds no file of a known format ({', '.join(FORMATS)})")
    return [fs.unstrip_protocol(path) if "://" in source else path for path in found]


def content_hash(source: str) -> str:
    """Hash of the content of a source's files, and of how they are read where that is not seen from the content.

    A data set of the hub is known by its name and commit.

    Raises:
        InputError: nothing is there, or nothing of a known format.
    """
    if source.startswith(PREFIX):
        # Earlier versions went by the name alone.
        hub = HubSource.of(source)
        return Fingerprint(f"{PREFIX}{hub.name}@{hub.commit()}", former=lambda: source)

    files = source_files(source)
    content, told = _bytes_hash(files), _told_by_names(files)
    return Fingerprint(digest(content, told), former=lambda: content) if told else content


def _bytes_hash(files: Sequence[str]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        with open_file(path) as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def _told_by_names(files: Sequence[str]) -> list[list[object]]:
    """What only the names of files say of how they are read, by their places: a form, or a split; mostly nothing."""
    splits = file_splits(files)
    told: list[list[object]] = []
    for place, path in enumerate(files):
        form = form_of(path)
        # Lines that stand in one file or in several are the same rows; of the other forms each file has a beginning.
        begins = place > 0 and form in (ARRAY, CSV)
        if begins or path in splits or not is_usual(path, form):
            told.append([place, form, splits.get(path)])
    return told


def _own(path: str) -> bool:
    return path.rsplit("/", 1)[1] in (MANIFEST, IN_PROGRESS)


def first_rows(path: str) -> list[dict[str, object]]:
    """The rows near the beginning of a file that can be read.

    Raises:
        InputError: there is none.
    """
    first = [row for _, row in islice(read_rows(path), LOOKED_AT) if isinstance(row, dict)]
    if not first:
        raise InputError(f"{path} has no readable row in its first {LOOKED_AT} lines")
    return first


def _hub_data(source: str, settings: Settings, reading: Reading) -> datasets.Dataset:
    import datasets

    hub = HubSource.of(source)
    with named(reading.setting):
        # What is read is what the stage's key says, also where the data set has moved on since.
        at = {"revision": hub.commit()}
        try:
            loaded = datasets.load_dataset(hub.name, settings.subset, split=settings.dataset_split, **at)
        except Exception as error:
            raise InputError(f"{PREFIX}{hub.name} cannot be loaded: {error}") from None
    check_columns(source, [dict.fromkeys(loaded.column_names)], reading.needed)
    return loaded


def _numbered(data: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    wanted = data.select(range(min(len(data), limit or len(data))))
    return wanted.add_column("rdpo_line", range(1, len(wanted) + 1))
