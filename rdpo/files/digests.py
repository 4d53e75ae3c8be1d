"""Hashes of files' content, kept from one command to the next: a model of 100 GB is read for them once.

A file is known by its place, its size, and by when and where the file system last wrote it. Changing the content
changes these; copying it over with its old times does too, as the system's own time of change cannot be set.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from rdpo.files.stores import cache_dir

KEPT = "digests.sqlite"
SMALL_BYTES = 1 << 20
"""Files up to this size are read sooner than they are looked up."""

State = tuple[int, int, int, int]
"""Size in bytes, times of the last change of content and of all else in nanoseconds, and number on the disk."""


def file_digest(path: Path) -> bytes:
    """BLAKE2b of a file's content, 64 bytes."""
    stat = path.stat()
    return _digest(str(path.resolve()), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=1024)
def _digest(path: str, state: State) -> bytes:
    if state[0] <= SMALL_BYTES:
        return _read(path)
    try:
        return _kept(path, state)
    except (OSError, sqlite3.Error):
        # The cache may be removed, full, or somebody else's.
        return _read(path)


def _kept(path: str, state: State) -> bytes:
    cache_dir().mkdir(parents=True, exist_ok=True)
    key = repr((path, *state))
    with closing(sqlite3.connect(cache_dir() / KEPT, timeout=30)) as kept:
        kept.execute("create table if not exists digests (file text primary key, digest blob)")
        found = kept.execute("select digest from digests where file = ?", [key]).fetchone()
        if found:
            return bytes(found[0])
        digest = _read(path)
        kept.execute("insert or replace into digests values (?, ?)", [key, digest])
        kept.commit()
    return digest


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
