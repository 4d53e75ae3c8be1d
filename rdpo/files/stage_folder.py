"""Stage folders: begun, made, committed by a manifest that is written last, reopened, taken over by another run.

A folder without a manifest is unfinished; what is there when a run comes back is whole and need not be made again. The
manifest's existence is the commit. How rows lie in it, `rdpo.files.parts` knows.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rdpo.errors import ConservationError
from rdpo.files.conditional import Changed, ConditionalObject
from rdpo.files.duplicates import duplicates
from rdpo.files.folder import IN_PROGRESS, MANIFEST, TEMPORARY, checksum, json_bytes, temporary
from rdpo.files.manifest import Manifest
from rdpo.files.parts import OPEN_AT_ONCE, PART, PartsFolder
from rdpo.records import digest

METRICS = "metrics.jsonl"
"""In the folder of training, a line for each optimizer step."""


class StageFolder(PartsFolder):
    """The committed output of one stage, or its unfinished parts."""

    def __init__(self, run_dir: str, name: str):
        super().__init__(f"{run_dir.rstrip('/')}/{name}")
        self.name = name

    def begin(self, key: str, noted: Mapping[str, Any] | None = None) -> None:
        """Get ready to make the output of `key`: parts of another key are removed, its own stay.

        `noted`: what else is to be known of the stage while it is half made.
        """
        if self.exists(MANIFEST) or self.begun.get("key") != key:
            self.clear()
            self._write_attempt(key, noted or {})
        self.remove_unreadable()

    def remove_unreadable(self) -> None:
        """Remove parts that are not whole, as a disk that was full may leave them."""
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

    def _check_unique(self, id_column: str) -> None:
        if twice := duplicates(self, id_column):
            raise ConservationError(f"{self.name}: {len(twice)} duplicate ids, the first is {min(twice)}")

    def _all_files(self) -> list[str]:
        names = (name for name in self.files() if name not in (MANIFEST, IN_PROGRESS))
        return [name for name in names if not name.endswith(TEMPORARY)]

    def _checksum(self, name: str) -> str:
        with self.fs.open(self._at(name), "rb") as file:
            return checksum(file)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
