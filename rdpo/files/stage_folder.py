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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rdpo.errors import ConservationError, InputError
from rdpo.files.conditional import Changed, ConditionalObject
from rdpo.files.content import column_digests, column_sums, footer_of, with_footer
from rdpo.files.duplicates import duplicates
from rdpo.files.folder import IN_PROGRESS, MANIFEST, TEMPORARY, Folder, checksum, json_bytes, temporary
from rdpo.files.manifest import Manifest, WriteProgress
from rdpo.records import digest

if TYPE_CHECKING:
    import ray.data

METRICS = "metrics.jsonl"
"""In the folder of training, a line for each optimizer step."""
TOKENS = "_tokens"
PART = ".parquet"
OPEN_AT_ONCE = 16
PART_ROWS = 4096


class StageFolder(Folder):
    """The committed output of one stage, or its unfinished parts."""

    def __init__(self, run_dir: str, name: str):
        super().__init__(f"{run_dir.rstrip('/')}/{name}")
        self.name = name

    def manifest(self) -> Manifest | None:
        """The manifest of a committed folder; None while the stage is unfinished."""
        content = self.read_json(MANIFEST)
        return Manifest(**content) if content else None

    def begin(self, key: str, noted: Mapping[str, Any] | None = None) -> None:
        """Get ready to make the output of `key`: parts of another key are removed, its own stay.

        `noted`: what else is to be known of the stage while it is half made.
        """
        if self.exists(MANIFEST) or self.begun.get("key") != key:
            self.clear()
            self._write_attempt(key, noted or {})
        for below in ("", "dropped"):
            for name in self.names(PART, below):
                if not self._is_readable(name):
                    self.fs.rm(self._at(name))

    def _write_attempt(self, key: str, noted: Mapping[str, Any]) -> None:
        self.write_json(IN_PROGRESS, {**noted, "key": key, "attempt_id": uuid.uuid4().hex, "began": time.time()})

    @property
    def begun(self) -> dict[str, Any]:
        """What was noted when the folder was begun; empty where it was not."""
        noted = self.read_json(IN_PROGRESS)
        return noted if isinstance(noted, dict) else {}

    def holds_work(self) -> bool:
        """Whether anything that the stage made is there, and not only that it was begun."""
        return bool(self._all_files())

    @property
    def attempt_id(self) -> str:
        """Name of this making of the folder: within it a part is never made again with other content."""
        begun = self.begun
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
        """Make a committed folder an unfinished one that lacks the damaged files, so that they alone are made again.

        It is another attempt from here on: what is made again may differ, so stages that are half made of what was
        there before are made anew. Parts that the manifest does not name go too, as nobody has counted their rows.
        A folder that is unfinished already stays as it is.
        """
        manifest = self.manifest()
        if manifest is None:
            return
        self._write_attempt(self.begun.get("key", manifest.key), self.begun)
        self.fs.rm(self._at(MANIFEST))

        uncounted = [name for name in self._all_files() if name.endswith(PART) and name not in manifest.files]
        for name in [*damaged, *uncounted]:
            if self.exists(name):
                self.fs.rm(self._at(name))

    def take_over(self, other: StageFolder, share: bool = True) -> bool:
        """Hold what another committed folder holds; on a local disk the files are shared, not copied.

        Args:
            other: the folder; other drivers may work in it at the same time.
            share: False: the files are copied on a local disk too, so that an edit here does not reach the other.

        Returns:
            Whether it was taken. It was not if the other was begun again meanwhile, and then this folder is empty.
        """
        self.clear()
        before = other._state()
        manifest = other.manifest()
        if manifest is None:
            return False

        begun = [IN_PROGRESS] if other.exists(IN_PROGRESS) else []
        try:
            with ThreadPoolExecutor(OPEN_AT_ONCE) as takers:
                list(takers.map(lambda name: self._take(other, name, share), [*begun, *manifest.files]))
            whole = other._state() == before
        except OSError as error:
            whole = False
            if not isinstance(error, FileNotFoundError) and other._state() == before:
                raise

        if not whole:
            self.clear()
            return False
        self.write_json(MANIFEST, asdict(manifest))
        return True

    def _state(self) -> tuple[str, Manifest | None]:
        """What changes whenever a committed folder is begun again, reopened or committed anew."""
        return self.attempt_id, self.manifest()

    def _take(self, other: StageFolder, name: str, share: bool) -> None:
        source, target = other._at(name), self._at(name)
        if not self.on_disk:
            self.fs.cp_file(source, target)
            return
        # Files are only ever put in another's place, so a change here does not reach the other folder.
        partial = temporary(target)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        put = _linked if share else shutil.copy2
        put(source, partial)
        self.fs.mv(partial, target)

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
        for below, rows in (("", kept), ("dropped", lost)):
            self.write_rows_below(rows, id_column, below)
        return WriteProgress(kept.num_rows, lost.num_rows, _sum_ending_in(TOKENS, kept))

    def write_rows_below(self, rows: pa.Table, id_column: str, below: str) -> list[str]:
        """Write rows that are all kept, or all dropped; names of their parts."""
        slices = (rows.slice(start, PART_ROWS) for start in range(0, rows.num_rows, PART_ROWS))
        return [self._write_part(part, id_column, below) for part in slices]

    def _write_part(self, table: pa.Table, id_column: str, below: str) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(with_footer(table, id_column), sink, write_page_checksum=True)
        name = f"part-{digest(sorted(table[id_column].to_pylist()))[:16]}{PART}"
        name = f"{below}/{name}" if below else name
        self.write_bytes(name, sink.getvalue().to_pybytes())
        return name

    def parts(self, below: str = "") -> list[str]:
        """Names of the kept (or dropped) parts; of a committed folder those that its manifest names, and no others."""
        manifest = self.manifest()
        if manifest is None or not manifest.files:
            return self.names(PART, below)
        return sorted(name for name in manifest.files if name.endswith(PART) and name.rpartition("/")[0] == below)

    def tables(
        self, below: str = "", columns: list[str] | None = None, optional: Sequence[str] = ()
    ) -> Iterator[pa.Table]:
        """The kept rows (or, with `below="dropped"`, the dropped ones) part by part.

        Beside `columns` come those of the `optional` ones that a part has: earlier versions wrote fewer.
        """
        for name in self.parts(below):
            held = self._schema(name).names if optional else []
            also = [one for one in optional if one in held]
            yield self.part(name, [*(columns or []), *also] if optional else columns)

    def part(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of one part.

        Raises:
            InputError: it is no longer there.
        """
        try:
            return self._read_part(name, columns)
        except FileNotFoundError:
            raise InputError(f"{self.path}/{name}: is missing; `rdpo run` makes it again") from None

    def _read_part(self, name: str, columns: list[str] | None) -> pa.Table:
        with self.fs.open(self._at(name), "rb") as file:
            found = pq.read_table(file, columns=columns, page_checksum_verification=True)
            return found.replace_schema_metadata(None)

    def _is_readable(self, name: str) -> bool:
        content = pa.BufferReader(self.read_bytes(name))
        try:
            footer_of(pq.read_schema(content))
            return pq.read_table(content, page_checksum_verification=True) is not None
        except (OSError, ValueError, pa.ArrowException):
            return False

    def table(self, below: str = "", columns: list[str] | None = None) -> pa.Table:
        """All kept (or dropped) rows as one table."""
        tables = list(self.tables(below, columns))
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})

    def total(self, ending: str, below: str = "") -> int:
        """Sum of all columns of the kept (or dropped) rows whose names end so."""
        total = 0
        for part in self.parts(below):
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
        columns = (table[id_column] for table in self.tables(below, [id_column]))
        chunks = list(chain.from_iterable(column.chunks for column in columns))
        return pa.chunked_array(chunks, pa.string())

    def done_ids(self, id_column: str) -> pa.ChunkedArray:
        """Ids of all rows that the folder holds, kept and dropped."""
        return pa.chunked_array([*self.ids(id_column).chunks, *self.ids(id_column, "dropped").chunks], pa.string())

    def count(self, below: str = "") -> int:
        """Number of kept (or dropped) rows."""
        with ThreadPoolExecutor(OPEN_AT_ONCE) as openers:
            return sum(openers.map(self._length, self.parts(below)))

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

    def commit(
        self,
        manifest: Manifest,
        id_column: str | None = None,
        expected: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Manifest:
        """Check that every row is accounted for, then write the manifest.

        Args:
            manifest: what is known of the stage so far.
            id_column: the column with the rows' ids, where the folder holds rows.
            expected: how many rows entered the stage; by default as many as the folder holds.
            check: fails if the run is no longer this driver's.

        Raises:
            ConservationError: ids in, out and dropped do not add up, or two rows have the same id.
        """
        if id_column is not None:
            self._count(manifest, id_column, expected)
        manifest.files = {name: self._checksum(name) for name in self._all_files()}
        manifest.columns = self._column_digests(id_column) if id_column else {}
        manifest.digest = digest(sorted(manifest.files.items()))
        manifest.created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        check()
        if self.in_store:
            self._create_manifest(json_bytes(asdict(manifest)), check)
        else:
            self.write_json(MANIFEST, asdict(manifest))
        return manifest

    def _column_digests(self, id_column: str) -> dict[str, str]:
        with ThreadPoolExecutor(OPEN_AT_ONCE) as openers:
            return column_digests(openers.map(lambda name: self._column_sums(name, id_column), self.parts()))

    def _column_sums(self, name: str, id_column: str) -> dict[str, int]:
        with self.fs.open(self._at(name), "rb") as file:
            footer = footer_of(pq.read_schema(file))
        return column_sums(self.part(name), id_column) if footer is None else footer

    def _create_manifest(self, content: bytes, check: Callable[[], None]) -> None:
        """Put the manifest where there is none: a driver that hung after its check does not overwrite another's."""
        target = ConditionalObject(self.address(MANIFEST))
        try:
            target.create(content)
        except Changed:
            # Either this driver is the one that hung, or it is the other, which meets what the first has left.
            check()
            self.write_bytes(MANIFEST, content)

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
        if twice := duplicates(self, id_column):
            raise ConservationError(f"{self.name}: {len(twice)} duplicate ids, the first is {min(twice)}")

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


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sum_ending_in(ending: str, table: pa.Table) -> int:
    return sum(pc.sum(table[name]).as_py() or 0 for name in table.column_names if name.endswith(ending))
