"""Rows of a stage as Parquet parts: kept ones in the folder itself, dropped ones with their reasons below `dropped`.

Each part is written under a temporary name and renamed (in an object store, put there whole), and is named after the
ids in it, so that a retried task overwrites its own part. Of a folder with a manifest only the parts count that it
names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rdpo.errors import InputError
from rdpo.files.content import column_digests, column_sums, footer_of, with_footer
from rdpo.files.folder import MANIFEST, Folder
from rdpo.files.manifest import Manifest, WriteProgress
from rdpo.records import digest

if TYPE_CHECKING:
    import ray.data

TOKENS = "_tokens"
PART = ".parquet"
OPEN_AT_ONCE = 16
PART_ROWS = 4096


class PartsFolder(Folder):
    """A folder with rows in parts."""

    def manifest(self) -> Manifest | None:
        """The manifest of a committed folder; None while the stage is unfinished."""
        content = self.read_json(MANIFEST)
        return Manifest(**content) if content else None

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

    def table(self, below: str = "", columns: list[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
        """All kept (or dropped) rows as one table, with the `optional` columns that some of them have."""
        tables = list(self.tables(below, columns, optional))
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

    def reasons(self) -> dict[str, int]:
        """How many rows were dropped for each reason."""
        counted: dict[str, int] = {}
        for table in self.tables("dropped", ["dropped"]):
            for entry in pc.value_counts(table["dropped"]).to_pylist():
                counted[entry["values"]] = counted.get(entry["values"], 0) + entry["counts"]
        return counted

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

    def _column_digests(self, id_column: str) -> dict[str, str]:
        with ThreadPoolExecutor(OPEN_AT_ONCE) as openers:
            return column_digests(openers.map(lambda name: self._column_sums(name, id_column), self.parts()))

    def _column_sums(self, name: str, id_column: str) -> dict[str, int]:
        with self.fs.open(self._at(name), "rb") as file:
            footer = footer_of(pq.read_schema(file))
        return column_sums(self.part(name), id_column) if footer is None else footer


def _read_parts(names: pa.Table, path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    folder = PartsFolder(path)
    for name in names["name"].to_pylist():
        yield pa.concat_tables([schema.empty_table(), folder.part(name)], promote_options="permissive")


def _sum_ending_in(ending: str, table: pa.Table) -> int:
    return sum(pc.sum(table[name]).as_py() or 0 for name in table.column_names if name.endswith(ending))
