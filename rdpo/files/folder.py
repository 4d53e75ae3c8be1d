"""Folders on the local disk or in an object store, whose files are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from rdpo.errors import InputError
from rdpo.files.stores import ObjectStore, fetched, file_system, upload

TEMPORARY = ".tmp"
MANIFEST = "manifest.json"
IN_PROGRESS = "in_progress.json"
"""Names of the files by which a stage's folder says what it is."""

Stamp = tuple[int, float]
"""Bytes of a file, and when it was written, in seconds."""


class Folder:
    """A folder on local disk or in an object store (any fsspec address)."""

    def __init__(self, path: str):
        self.path = str(path).rstrip("/")
        self.fs, self.root = file_system(self.path)
        self.on_disk = isinstance(self.fs, LocalFileSystem)
        self.in_store = isinstance(self.fs, ObjectStore)

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return bool(self.fs.exists(self._at(name)))

    def address(self, name: str = "") -> str:
        """Where `name` is, for a person or another process: a path, or an address with its scheme."""
        path = self._at(name).rstrip("/")
        return path if self.on_disk else str(self.fs.unstrip_protocol(path))

    def local(self, name: str = "") -> str:
        """Path of the folder `name` on this machine; out of an object store, of a copy that is never a stale one."""
        return self._at(name).rstrip("/") if self.on_disk else str(fetched(self.address(name)))

    @contextmanager
    def made(self, name: str = "", keep: bool = False) -> Iterator[Path]:
        """A folder on this machine to make `name` in; an object store has it when the context ends without an error.

        With `keep`, what `name` holds is there to begin with.
        """
        if self.on_disk:
            Path(self._at(name)).mkdir(parents=True, exist_ok=True)
            yield Path(self._at(name))
            return
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory) / "made"
            shutil.copytree(self.local(name), place) if keep else place.mkdir()
            yield place
            self.put(place, name)

    def put(self, source: Path, name: str = "") -> None:
        """Put a copy of a folder on this machine in the place of the folder `name`; into it, where that is all."""
        # Files of an older copy would stay among the new ones.
        if name and self.exists(name):
            self.fs.rm(self._at(name), recursive=True)
        if self.on_disk:
            shutil.copytree(source, self._at(name), dirs_exist_ok=True)
        else:
            upload(source, self.fs, self._at(name).rstrip("/"))

    def read_bytes(self, name: str) -> bytes:
        """Content of a file."""
        with self.fs.open(self._at(name), "rb") as file:
            content: bytes = file.read()
        return content

    def read_json(self, name: str) -> Any:
        """Content of a JSON file, or None if there is none, or none that is whole."""
        try:
            return json.loads(self.read_bytes(name)) if self.exists(name) else None
        except ValueError:
            return None

    def read_lines(self, name: str) -> list[Any]:
        """The values of a file of JSON lines; none if there is no such file."""
        return [json.loads(line) for line in self.read_bytes(name).splitlines()] if self.exists(name) else []

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file so that it is there whole or not at all."""
        target = self._at(name)
        # An object is there once its upload is complete, and not before.
        if self.in_store:
            with self.fs.open(target, "wb") as file:
                file.write(content)
            return

        # Beside the file itself, so that the rename stays on one disk and is whole or not at all.
        partial = temporary(target)
        try:
            self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            with self.fs.open(partial, "wb") as file:
                file.write(content)
            self.fs.mv(partial, target)
        except PermissionError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror}); choose another --run-dir") from None

    def write_json(self, name: str, value: object) -> None:
        """Write a value as indented JSON, whole or not at all."""
        self.write_bytes(name, json_bytes(value))

    def names(self, suffix: str, below: str = "") -> list[str]:
        """Names, relative to this folder, of the files in `below` that end in `suffix`; sorted."""
        base = self._at(below).rstrip("/")
        if not self.fs.isdir(base):
            return []
        prefix = f"{below}/" if below else ""
        found = (path.rsplit("/", 1)[1] for path in self.fs.ls(base, detail=False) if path.endswith(suffix))
        return sorted(prefix + name for name in found)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self.fs.rm(self._at(name))

    def clear(self) -> None:
        """Remove the folder and all that is in it."""
        if self.fs.exists(self.root):
            self.fs.rm(self.root, recursive=True)

    def entries(self) -> list[str]:
        """Names of the files and folders in this folder; sorted."""
        found = self.fs.ls(self.root, detail=False) if self.fs.exists(self.root) else []
        return sorted(path.rstrip("/").rsplit("/", 1)[1] for path in found)

    def empty(self, keep: Collection[str] = ()) -> None:
        """Remove all that is in the folder but the entries to `keep`."""
        for name in self.entries():
            if name not in keep:
                self.fs.rm(self._at(name), recursive=True)

    def stamps(self) -> dict[str, Stamp]:
        """Size and time of all files in this folder and below it, by name; by one listing, no file is opened."""
        found = self.fs.find(self.root, detail=True)
        return {path[len(self.root) + 1 :]: (entry["size"], _written_at(entry)) for path, entry in found.items()}

    def files(self) -> list[str]:
        """Names of all files in this folder and below it; sorted."""
        return sorted(path[len(self.root) + 1 :] for path in self.fs.find(self.root))


def _written_at(entry: Mapping[str, Any]) -> float:
    """When a file was written, in seconds; 0 where its file system does not say."""
    at = entry.get("mtime") or entry.get("created") or 0.0
    return at.timestamp() if isinstance(at, datetime) else float(at)


def json_bytes(value: object) -> bytes:
    """A value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str).encode()


def checksum(file: IO[bytes]) -> str:
    """BLAKE2 of a file's content, 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    while block := file.read(1 << 22):
        found.update(block)
    return found.hexdigest()


def temporary(target: str) -> str:
    """A name beside a file's own, under which it is written."""
    return f"{target}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
