"""Stage folders: Parquet parts, a dropped table, and a manifest that is written last.

A folder without a manifest is unfinished. Each part is written under a temporary name and renamed,
and is named after the ids in it, so that a retried task overwrites its own part; what is there when
a run comes back is whole and need not be made again. The manifest's existence is the commit.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rdpo.errors import ConservationError, InputError
from rdpo.records import digest

if TYPE_CHECKING:
    import ray.data

MANIFEST = "manifest.json"
IN_PROGRESS = "in_progress.json"


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


class Folder:
    """A folder on local disk or in an object store (any fsspec address)."""

    def __init__(self, path: str):
        self.path = str(path).rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.path)

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return self.fs.exists(self._at(name))

    def local(self, name: str = "") -> str:
        """Path of `name` as the file system itself writes it."""
        return self._at(name).rstrip("/")

    def read_bytes(self, name: str) -> bytes:
        """Content of a file."""
        with self.fs.open(self._at(name), "rb") as file:
            return file.read()

    def read_json(self, name: str) -> Any:
        """Content of a JSON file, or None if there is none."""
        return json.loads(self.read_bytes(name)) if self.exists(name) else None

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file so that it is there whole or not at all."""
        target = self._at(name)
        temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            with self.fs.open(temporary, "wb") as file:
                file.write(content)
            self.fs.mv(temporary, target)
        except PermissionError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror}); choose another --run-dir") from None

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as indented JSON, whole or not at all."""
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False, default=str).encode())

    def names(self, suffix: str, below: str = "") -> list[str]:
        """Names, relative to this folder, of the files in `below` that end in `suffix`; sorted."""
        base = self._at(below).rstrip("/")
        if not self.fs.isdir(base):
            return []
        prefix = f"{below}/" if below else ""
        found = (path.rsplit("/", 1)[1] for path in self.fs.ls(base, detail=False) if path.endswith(suffix))
        return sorted(prefix + name for name in found)

    def clear(self) -> None:
        """Remove the folder and all that is in it."""
        if self.fs.exists(self.root):
            self.fs.rm(self.root, recursive=True)


class StageFolder(Folder):
    """The committed output of one stage, or its unfinished parts."""

    def __init__(self, run_dir: str, name: str):
        super().__init__(f"{run_dir}/{name}")
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
            self.write_json(IN_PROGRESS, {"key": key, "began": time.time()})

    def write_parts(self, table: pa.Table, id_column: str) -> WriteProgress:
        """Write one block: kept rows to `part-*`, rows with a reason in `dropped` to `dropped/part-*`."""
        reasons = table["dropped"].cast(pa.string()) if "dropped" in table.column_names else None
        if reasons is None:
            kept, lost = table, table.slice(0, 0)
        else:
            kept = table.filter(pc.is_null(reasons)).drop_columns(["dropped"])
            lost = table.filter(pc.is_valid(reasons))
        self._write_part(kept, id_column, "")
        self._write_part(lost, id_column, "dropped/")
        counted = [name for name in kept.column_names if name.endswith("_tokens")]
        tokens = sum(pc.sum(kept[name]).as_py() or 0 for name in counted)
        return WriteProgress(kept.num_rows, lost.num_rows, tokens)

    def _write_part(self, table: pa.Table, id_column: str, below: str) -> None:
        if not table.num_rows:
            return
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        name = f"{below}part-{digest(sorted(table[id_column].to_pylist()))[:16]}.parquet"
        self.write_bytes(name, sink.getvalue().to_pybytes())

    def parts(self) -> list[str]:
        """Names of the kept parts."""
        return self.names(".parquet")

    def table(self, below: str = "", columns: list[str] | None = None) -> pa.Table:
        """All kept rows (or, with `below="dropped"`, the dropped ones) as one table."""
        tables = []
        for name in self.names(".parquet", below):
            with self.fs.open(self._at(name), "rb") as file:
                tables.append(pq.read_table(file, columns=columns))
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})

    def done_ids(self, id_column: str) -> set[str]:
        """Ids of the rows that unfinished parts already hold, kept or dropped."""
        done: set[str] = set()
        for below in ("", "dropped"):
            table = self.table(below, [id_column]) if self.names(".parquet", below) else None
            done.update(table[id_column].to_pylist() if table else [])
        return done

    def dataset(self) -> ray.data.Dataset:
        """The kept rows as a Ray Dataset, whatever the types of empty columns in single parts."""
        import ray.data

        parts = self.parts()
        if not parts:
            return ray.data.from_items([])
        schemas = []
        for name in parts:
            with self.fs.open(self._at(name), "rb") as file:
                schemas.append(pq.read_schema(file).remove_metadata())
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        paths = [self.fs.unstrip_protocol(self._at(name)) for name in parts]
        return ray.data.read_parquet(paths, schema=schema)

    def commit(self, manifest: Manifest, id_column: str | None = None, expected: int | None = None) -> Manifest:
        """Check that every row is accounted for, then write the manifest.

        Raises:
            ConservationError: ids in, out and dropped do not add up, or an id stands twice.
        """
        if id_column is not None:
            self._count(manifest, id_column, expected)
        manifest.files = {name: self._checksum(name) for name in self._all_files()}
        manifest.digest = digest(manifest.key, sorted(manifest.files.items()))
        manifest.created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.write_json(MANIFEST, asdict(manifest))
        return manifest

    def _count(self, manifest: Manifest, id_column: str, expected: int | None) -> None:
        kept = self.table(columns=[id_column]) if self.parts() else pa.table({id_column: []})
        lost = self.table("dropped")
        kept_ids = kept[id_column].to_pylist()
        lost_ids = lost[id_column].to_pylist() if lost.num_rows else []
        manifest.rows_out = len(kept_ids)
        manifest.dropped = dict(Counter(lost["dropped"].to_pylist())) if lost.num_rows else {}
        manifest.rows_in = len(kept_ids) + len(lost_ids) if expected is None else expected
        twice = [name for name, count in Counter(kept_ids + lost_ids).items() if count > 1]
        if twice:
            raise ConservationError(f"{self.name}: {len(twice)} ids stand twice, the first is {twice[0]}")
        if manifest.rows_in != len(kept_ids) + len(lost_ids):
            raise ConservationError(
                f"{self.name}: {manifest.rows_in} rows in, but {len(kept_ids)} out and {len(lost_ids)} dropped"
            )

    def _all_files(self) -> list[str]:
        found = self.fs.find(self.root)
        names = [path[len(self.root) + 1 :] for path in found]
        return sorted(name for name in names if name not in (MANIFEST, IN_PROGRESS))

    def _checksum(self, name: str) -> str:
        checksum = hashlib.blake2b(digest_size=16)
        with self.fs.open(self._at(name), "rb") as file:
            while block := file.read(1 << 22):
                checksum.update(block)
        return checksum.hexdigest()


def write_rows(
    rows: ray.data.Dataset, folder: StageFolder, id_column: str, on_block: Callable[[WriteProgress], None]
) -> None:
    """Run a Ray Dataset and store its rows part by part; `on_block` hears of each as it is written."""
    path, name = folder.path.rsplit("/", 1)[0], folder.name

    def store(block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([asdict(StageFolder(path, name).write_parts(block, id_column))])

    written = rows.map_batches(store, batch_format="pyarrow", batch_size=None)
    for counts in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for count in counts.to_pylist():
            on_block(WriteProgress(**count))
