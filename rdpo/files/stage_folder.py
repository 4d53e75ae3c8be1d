"""Stage folders: Parquet parts, a dropped table, and a manifest that is written last.

A folder without a manifest is unfinished. Each part is written under a temporary name and renamed
(in an object store, put there whole), and is named after the ids in it, so that a retried task
overwrites its own part; what is there when a run comes back is whole and need not be made again. The
manifest's existence is the commit.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rdpo.errors import ConservationError
from rdpo.files.folder import TEMPORARY, Folder, checksum, temporary
from rdpo.records import digest

if TYPE_CHECKING:
    import ray.data

MANIFEST = "manifest.json"
IN_PROGRESS = "in_progress.json"
METRICS = "metrics.jsonl"
"""In the folder of training, a line for each optimizer step."""
TOKENS = "_tokens"
OPEN_AT_ONCE = 16
PART_ROWS = 4096


@dataclass
class Manifest:
    """What a committed stage folder holds and what it was made from."""

    stage: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    together: list[str] = field(default_factory=list)
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    created: str = ""


@dataclass(frozen=True)
class WriteProgress:
    """Counts of one written block."""

    rows: int
    dropped: int
    tokens: int


class StageFolder(Folder):
    """The committed output of one stage, or its unfinished parts."""

    def __init__(self, run_dir: str, name: str):
        super().__init__(f"{run_dir.rstrip('/')}/{name}")
        self.name = name

    def manifest(self) -> Manifest | None:
        """The manifest of a committed folder; None while the stage is unfinished."""
        content = self.read_json(MANIFEST)
        return Manifest(**content) if content else None

    def begin(self, key: str) -> None:
        """Get ready to make the output of `key`: parts of another key are removed, its own stay."""
        in_progress = self.read_json(IN_PROGRESS) or {}
        if self.exists(MANIFEST) or in_progress.get("key") != key:
            self.clear()
            self.write_json(IN_PROGRESS, {"key": key, "attempt_id": uuid.uuid4().hex, "began": time.time()})
        for below in ("", "dropped"):
            for name in self.names(".parquet", below):
                if not self._is_readable(name):
                    self.fs.rm(self._at(name))

    @property
    def attempt_id(self) -> str:
        """Name of this making of the folder: a part that is there is never made again with other content."""
        begun = self.read_json(IN_PROGRESS) or {}
        # Folders begun by earlier versions call it `birth`.
        return str(begun.get("attempt_id") or begun.get("birth", ""))

    def clear_parts(self) -> None:
        """Remove what the folder holds, but not that it was begun."""
        for name in self._all_files():
            self.fs.rm(self._at(name))

    def clear(self) -> None:
        """Remove the folder and all that is in it: the manifest first, so that half a folder is not committed."""
        if self.exists(MANIFEST):
            self.fs.rm(self._at(MANIFEST))
        super().clear()

    def damaged(self) -> list[str]:
        """Names of the files of a committed folder that are not there as they were written."""
        manifest = self.manifest()
        written = manifest.files if manifest else {}
        return [name for name, sum in written.items() if not self.exists(name) or self._checksum(name) != sum]

    def reopen(self, damaged: list[str]) -> None:
        """Make a committed folder an unfinished one that lacks the damaged files, so that they alone are made again."""
        self.fs.rm(self._at(MANIFEST))
        for name in damaged:
            if self.exists(name):
                self.fs.rm(self._at(name))

    def take_over(self, other: StageFolder) -> None:
        """Hold what another committed folder holds; on a local disk the files are shared, not copied."""
        self.clear()
        if not self.on_disk:
            self._copy(other)
            return
        begun = [IN_PROGRESS] if other.exists(IN_PROGRESS) else []
        for name in [*begun, *other._all_files(), MANIFEST]:
            self._take(other._at(name), self._at(name))

    def _take(self, source: str, target: str) -> None:
        # Files are only ever put in another's place, so a change here does not reach the other folder.
        partial = temporary(target)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        _linked(source, partial)
        self.fs.mv(partial, target)

    def _copy(self, other: StageFolder) -> None:
        """Copy all files, the manifest last: it says that the others are there."""
        names = sorted(other.files(), key=lambda name: name == MANIFEST)
        with ThreadPoolExecutor(OPEN_AT_ONCE) as copiers:
            list(copiers.map(lambda name: self.fs.cp_file(other._at(name), self._at(name)), names[:-1]))
        self.fs.cp_file(other._at(names[-1]), self._at(names[-1]))

    def write_parts(self, table: pa.Table, id_column: str) -> WriteProgress:
        """Write one block: kept rows to `part-*`, rows with a reason in `dropped` to `dropped/part-*`.

        A part has a bounded number of rows, so that whoever reads one after the other holds no more.
        """
        reasons = table["dropped"].cast(pa.string()) if "dropped" in table.column_names else None
        if reasons is None:
            kept, lost = table, table.slice(0, 0)
        else:
            kept = table.filter(pc.is_null(reasons)).drop_columns(["dropped"])
            lost = table.filter(pc.is_valid(reasons))
        for below, rows in (("", kept), ("dropped/", lost)):
            for start in range(0, rows.num_rows, PART_ROWS):
                self._write_part(rows.slice(start, PART_ROWS), id_column, below)
        return WriteProgress(kept.num_rows, lost.num_rows, _sum_ending_in(TOKENS, kept))

    def _write_part(self, table: pa.Table, id_column: str, below: str) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True)
        name = f"{below}part-{digest(sorted(table[id_column].to_pylist()))[:16]}.parquet"
        self.write_bytes(name, sink.getvalue().to_pybytes())

    def parts(self) -> list[str]:
        """Names of the kept parts."""
        return self.names(".parquet")

    def tables(
        self, below: str = "", columns: list[str] | None = None, optional: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """The kept rows (or, with `below="dropped"`, the dropped ones) part by part.

        Beside `columns` come those of the `optional` ones that a part has: earlier versions wrote fewer.
        """
        for name in self.names(".parquet", below):
            held = self._schema(name).names if optional else []
            yield self.part(
                name, [*(columns or []), *(one for one in optional if one in held)] if optional else columns
            )

    def part(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of one part."""
        with self.fs.open(self._at(name), "rb") as file:
            return pq.read_table(file, columns=columns, page_checksum_verification=True)

    def _is_readable(self, name: str) -> bool:
        content = pa.BufferReader(self.read_bytes(name))
        try:
            return pq.read_table(content, page_checksum_verification=True) is not None
        except (OSError, pa.ArrowException):
            return False

    def table(self, below: str = "", columns: list[str] | None = None) -> pa.Table:
        """All kept (or dropped) rows as one table."""
        tables = list(self.tables(below, columns))
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})

    def total(self, ending: str, below: str = "") -> int:
        """Sum of all columns of the kept (or dropped) rows whose names end so."""
        total = 0
        for part in self.names(".parquet", below):
            columns = [name for name in self._schema(part).names if name.endswith(ending)]
            total += _sum_ending_in(ending, self.part(part, columns)) if columns else 0
        return total

    def rewrite(self, change: Callable[[pa.Table], pa.Table | None], id_column: str) -> None:
        """Put what `change` makes of each part of kept rows in its place; a part of which it makes None stays."""
        for name in self.parts():
            changed = change(self.part(name))
            if changed is not None:
                self.fs.rm(self._at(name))
                self.write_parts(changed, id_column)

    def ids(self, id_column: str, below: str = "") -> pa.ChunkedArray:
        """Ids of the kept (or dropped) rows, as the parts hold them."""
        chunks = [chunk for table in self.tables(below, [id_column]) for chunk in table[id_column].chunks]
        return pa.chunked_array(chunks, pa.string())

    def done_ids(self, id_column: str) -> pa.ChunkedArray:
        """Ids of all rows that the folder holds, kept and dropped."""
        return pa.chunked_array([*self.ids(id_column).chunks, *self.ids(id_column, "dropped").chunks], pa.string())

    def count(self, below: str = "") -> int:
        """Number of kept (or dropped) rows."""
        with ThreadPoolExecutor(OPEN_AT_ONCE) as openers:
            return sum(openers.map(self._length, self.names(".parquet", below)))

    def duplicates(self, id_column: str) -> pa.ChunkedArray:
        """Ids of more than one row, kept or dropped."""
        # A million ids are large, their hashes are not; only ids whose hashes meet are compared.
        hashes = np.sort(np.concatenate([np.empty(0, np.int64), *map(_hashes, self._id_chunks(id_column))]))
        meeting = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if not len(meeting):
            return pa.chunked_array([], pa.string())
        suspects = [chunk.filter(np.isin(_hashes(chunk), meeting)) for chunk in self._id_chunks(id_column)]
        counts = pc.value_counts(pa.chunked_array(suspects, pa.string()))
        return pa.chunked_array([counts.filter(pc.greater(counts.field("counts"), 1)).field("values")])

    def _id_chunks(self, id_column: str) -> Iterator[pa.Array]:
        for below in ("", "dropped"):
            for table in self.tables(below, [id_column]):
                yield from table[id_column].chunks

    def dataset(self) -> ray.data.Dataset:
        """The kept rows as a Ray Dataset, whatever the types of empty columns in single parts."""
        import ray.data

        names = [{"name": name} for name in self.parts()]
        if not names:
            return ray.data.from_items([])
        # Ray's own reader lists files by an actor whose death ends the run; a task is only done again.
        return ray.data.from_items(names, override_num_blocks=len(names)).map_batches(
            _read_parts, fn_args=(self.path, self.schema()), batch_format="pyarrow", batch_size=1
        )

    def schema(self) -> pa.Schema:
        """The columns of the kept rows; a column that is empty in some parts has the type it has in others."""
        with ThreadPoolExecutor(OPEN_AT_ONCE) as openers:
            schemas = set(openers.map(self._schema, self.parts()))
        return pa.unify_schemas(list(schemas), promote_options="permissive")

    def _length(self, name: str) -> int:
        with self.fs.open(self._at(name), "rb") as file:
            return int(pq.read_metadata(file).num_rows)

    def _schema(self, name: str) -> pa.Schema:
        with self.fs.open(self._at(name), "rb") as file:
            return pq.read_schema(file).remove_metadata()

    def commit(self, manifest: Manifest, id_column: str | None = None, expected: int | None = None) -> Manifest:
        """Check that every row is accounted for, then write the manifest.

        Raises:
            ConservationError: ids in, out and dropped do not add up, or two rows have the same id.
        """
        if id_column is not None:
            self._count(manifest, id_column, expected)
        manifest.files = {name: self._checksum(name) for name in self._all_files()}
        manifest.digest = digest(manifest.key, sorted(manifest.files.items()))
        manifest.created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.write_json(MANIFEST, asdict(manifest))
        return manifest

    def _count(self, manifest: Manifest, id_column: str, expected: int | None) -> None:
        kept, lost = self.count(), self.count("dropped")
        manifest.rows_out = kept
        manifest.dropped = self.reasons()
        manifest.rows_in = kept + lost if expected is None else expected
        self._check_unique(id_column)
        if manifest.rows_in != kept + lost:
            raise ConservationError(f"{self.name}: {manifest.rows_in} rows in, but {kept} out and {lost} dropped")

    def reasons(self) -> dict[str, int]:
        """How many rows were dropped for each reason."""
        counted: dict[str, int] = {}
        for table in self.tables("dropped", ["dropped"]):
            for entry in pc.value_counts(table["dropped"]).to_pylist():
                counted[entry["values"]] = counted.get(entry["values"], 0) + entry["counts"]
        return counted

    def _check_unique(self, id_column: str) -> None:
        if len(twice := self.duplicates(id_column)):
            raise ConservationError(f"{self.name}: {len(twice)} duplicate ids, the first is {twice[0]}")

    def _all_files(self) -> list[str]:
        names = (name for name in self.files() if name not in (MANIFEST, IN_PROGRESS))
        return [name for name in names if not name.endswith(TEMPORARY)]

    def _checksum(self, name: str) -> str:
        with self.fs.open(self._at(name), "rb") as file:
            return checksum(file)


def _read_parts(names: pa.Table, path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    folder = StageFolder(*path.rsplit("/", 1))
    for name in names["name"].to_pylist():
        yield pa.concat_tables([schema.empty_table(), folder.part(name)], promote_options="permissive")


def _hashes(ids: pa.Array) -> NDArray[np.int64]:
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sum_ending_in(ending: str, table: pa.Table) -> int:
    return sum(pc.sum(table[name]).as_py() or 0 for name in table.column_names if name.endswith(ending))


def stored(rows: ray.data.Dataset, folder: StageFolder, id_column: str, pass_on: bool) -> ray.data.Dataset:
    """The data set with a last step that stores each block as a part of the folder.

    It yields the kept rows where another stage takes them up (`pass_on`), else one `WriteProgress` for each block.
    """
    path, name = folder.path.rsplit("/", 1)[0], folder.name

    def store(block: pa.Table) -> pa.Table:
        progress = StageFolder(path, name).write_parts(block, id_column)
        if pass_on:
            return block.filter(pc.is_null(block["dropped"].cast(pa.string())))
        return pa.Table.from_pylist([asdict(progress)])

    return rows.map_batches(store, batch_format="pyarrow", batch_size=None)


def write_rows(
    rows: ray.data.Dataset, folder: StageFolder, id_column: str, on_block: Callable[[WriteProgress], None]
) -> None:
    """Run a Ray Dataset and store its rows part by part; `on_block` hears of each as it is written."""
    written = stored(rows, folder, id_column, pass_on=False)
    for counts in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for count in counts.to_pylist():
            on_block(WriteProgress(**count))
