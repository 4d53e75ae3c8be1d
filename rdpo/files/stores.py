"""Where files live: the local disk, an object store (`s3://`, `gs://`), or any other address that fsspec knows.

Object stores are pyarrow's own, the same that Ray reads and writes with. The standard environment says where a store is
and who asks (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, …), on each machine for itself; an address holds no key.
A request that fails or is refused for the moment (HTTP 500, 503) is made again by the store's client, with growing
pauses and a bound; the one kind that it gives up at once is made again here (`_Reader`).
"""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import pyarrow.fs
from filelock import FileLock
from fsspec import AbstractFileSystem
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from rdpo.errors import InputError
from rdpo.records import digest

# Pauses double from 25 ms: a store that cannot be reached is given up after half a minute, a silent one after five.
ATTEMPTS = 10
CONNECT_S = 10.0
ANSWER_S = 30.0
PAUSE_S = 0.025
READ_AHEAD = 1 << 20
AT_ONCE = 16
# What S3 copies in one request.
LARGEST_COPY = 5 << 30
# What pyarrow says when the store's refusal is longer than the range that was asked for.
REFUSED_READ = "AWS Error INTERNAL_FAILURE"
STORE_ERROR = re.compile(r"(?:AWS|Store) Error [^\n]*|google::cloud::Status[^\n]*")
REMEDIES = {
    "NO_SUCH_BUCKET": "create the bucket, or correct its name",
    "ACCESS_DENIED": "give credentials that may read and write it (AWS_ACCESS_KEY_ID, AWS_PROFILE, …)",
    "NETWORK_CONNECTION": "check the network and AWS_ENDPOINT_URL",
}

Stamp = tuple[str, int, str]


def cache_dir() -> Path:
    """Where converted and fetched models are kept: `RDPO_CACHE`, or `~/.cache/rdpo`; it may be removed at any time."""
    return Path(os.environ.get("RDPO_CACHE", "~/.cache/rdpo")).expanduser()


def is_remote(address: str | Path) -> bool:
    """Whether an address is not on the local disk."""
    return "://" in str(address) and not str(address).startswith("file://")


def absolute(address: str) -> str:
    """The address of a folder, whatever the working directory."""
    return address.rstrip("/") if is_remote(address) else os.path.abspath(address.removeprefix("file://"))


def file_system(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, as fsspec sees it, and the path in it.

    Raises:
        InputError: the address holds a key or an option.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in _STORES:
        return cast(tuple[AbstractFileSystem, str], fsspec.core.url_to_fs(address))
    if "@" in rest.split("/")[0] or "?" in rest:
        raise InputError(f"{scheme}:// address: holds a key or an option; give them in the environment (AWS_…) instead")
    return _STORES[scheme](), "/".join(part for part in rest.split("/") if part)


def arrow_file_system(fs: AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """The same file system as pyarrow sees it."""
    if isinstance(fs, ObjectStore):
        return fs.fs
    return pyarrow.fs.LocalFileSystem() if isinstance(fs, LocalFileSystem) else _other(fs)


def _other(fs: AbstractFileSystem) -> pyarrow.fs.FileSystem:
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def open_file(address: str) -> IO[bytes]:
    """A file to read bytes from."""
    fs, path = file_system(address)
    file: IO[bytes] = fs.open(path, "rb")
    return file


class ObjectStore(ArrowFSWrapper):  # type: ignore[misc]
    """fsspec's view of pyarrow's object store, in which one that fails is never taken for one that is empty."""

    def isdir(self, path: str) -> bool:
        """Whether something lies below this path."""
        return self._type(path) is pyarrow.fs.FileType.Directory

    def isfile(self, path: str) -> bool:
        """Whether this is an object."""
        return self._type(path) is pyarrow.fs.FileType.File

    def _open(self, path: str, mode: str = "rb", *_: object, **__: object) -> Any:
        """A file; it is read in large blocks, however small the pieces asked for."""
        if mode != "rb":
            return super()._open(path, mode)
        return io.BufferedReader(_Reader(self.fs.open_input_file(path)), READ_AHEAD)

    def _type(self, path: str) -> pyarrow.fs.FileType:
        return self.fs.get_file_info(self._strip_protocol(path).rstrip("/")).type

    def find(self, path: str, maxdepth: None = None, withdirs: bool = False, detail: bool = False, **_: object) -> Any:
        """All objects below a path, by one listing."""
        below = pyarrow.fs.FileSelector(self._strip_protocol(path), allow_not_found=True, recursive=True)
        entries = [self._make_entry(info) for info in self.fs.get_file_info(below)]
        found = {entry["name"]: entry for entry in entries if withdirs or entry["type"] == "file"}
        return found if detail else sorted(found)

    def cp_file(self, path1: str, path2: str, **_: object) -> None:
        """Copy an object, within the store where that takes one request."""
        if self.fs.get_file_info(path1).size <= LARGEST_COPY:
            self.fs.copy_file(path1, path2)
            return
        plain = {"compression": None}
        with self.fs.open_input_stream(path1, **plain) as source, self.fs.open_output_stream(path2, **plain) as target:
            shutil.copyfileobj(source, target, READ_AHEAD)


class _Reader(io.RawIOBase):
    """An object to read from, in which a read that the store refuses for the moment is made again."""

    def __init__(self, file: pyarrow.NativeFile):
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        place = self.file.tell()
        for attempt in range(ATTEMPTS):
            try:
                # A read that failed half way may have moved on.
                self.file.seek(place)
                content = self.file.read(len(buffer))
                break
            except OSError as error:
                if REFUSED_READ not in str(error) or attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(PAUSE_S * 2**attempt)
        buffer[: len(content)] = content
        return len(content)


class _S3(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """pyarrow's S3, which on another machine is made with the same retries, and with that machine's credentials."""

    def __init__(self, endpoint: str | None, region: str | None):
        self.place = (endpoint, region)
        super().__init__(
            endpoint_override=endpoint,
            region=region,
            connect_timeout=CONNECT_S,
            request_timeout=ANSWER_S,
            # One request for a small object, where three would open, write and close it.
            allow_delayed_open=True,
            # The other strategy has a budget of retries, which one long bad spell uses up.
            retry_strategy=pyarrow.fs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS),
        )

    def __reduce__(self) -> tuple[type[_S3], tuple[str | None, str | None]]:
        return _S3, self.place


def _s3() -> ObjectStore:
    named = os.environ.get
    return _s3_at(s3_endpoint(), named("AWS_REGION") or named("AWS_DEFAULT_REGION"))


def s3_endpoint() -> str | None:
    """The URL of the S3 store; None for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@lru_cache(maxsize=8)
def _s3_at(endpoint: str | None, region: str | None) -> ObjectStore:
    # One client for each place: it has the connections, and the pauses between retries.
    return ObjectStore(_S3(endpoint, region))


@lru_cache(maxsize=1)
def _gcs() -> ObjectStore:
    return ObjectStore(pyarrow.fs.GcsFileSystem(retry_time_limit=timedelta(seconds=ANSWER_S)))


_STORES: dict[str, Callable[[], ObjectStore]] = {"s3": _s3, "gs": _gcs, "gcs": _gcs}


def store_trouble(error: BaseException | str) -> str | None:
    """What an object store said, with the remedy, if that is behind an error, also behind one that a worker raised."""
    said = STORE_ERROR.search(str(error))
    if said is None:
        return None
    remedy = next((text for name, text in REMEDIES.items() if name in said[0]), "wait")
    return f"the object store fails: {said[0].strip()[:300]}; {remedy}"


def upload(source: Path, fs: AbstractFileSystem, root: str) -> None:
    """Copy the files of a local folder into another file system."""
    target = arrow_file_system(fs)
    pyarrow.fs.copy_files(str(source), root, pyarrow.fs.LocalFileSystem(), target, chunk_size=READ_AHEAD)


def fetched(address: str) -> Path:
    """The folder at an address as it is now, on this machine; downloaded once and kept by what it holds.

    Raises:
        InputError: nothing is there, or it changed while it was read.
    """
    fs, root = file_system(address)
    stamps = _stamps(fs, root)
    if not stamps:
        raise InputError(f"{address}: nothing is there")

    folder = cache_dir() / "objects" / digest(address, stamps)[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several actors of one machine begin at the same time, and each wants the same model.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _download(fs, root, partial)
            # A store has no snapshot of a folder: files of two versions together would be nobody's model.
            if _stamps(fs, root) != stamps:
                raise InputError(f"{address}: changed while it was read; run the same command again")
            partial.rename(folder)
    return folder


def _download(fs: AbstractFileSystem, root: str, target: Path) -> None:
    def copy(path: str) -> None:
        place = target / path[len(root) + 1 :]
        place.parent.mkdir(parents=True, exist_ok=True)
        with fs.open(path, "rb") as source, place.open("wb") as file:
            shutil.copyfileobj(source, file, READ_AHEAD)

    with ThreadPoolExecutor(AT_ONCE) as copiers:
        list(copiers.map(copy, fs.find(root)))


def _stamps(fs: AbstractFileSystem, root: str) -> list[Stamp]:
    """Name, size and version of each file below a path; what is written anew has another version."""
    found = fs.find(root, detail=True)
    with ThreadPoolExecutor(AT_ONCE) as askers:
        versions = list(askers.map(lambda path: _version(fs, path, found[path]), found))
    return sorted(
        (path[len(root) + 1 :], found[path]["size"], version) for path, version in zip(found, versions, strict=True)
    )


def _version(fs: AbstractFileSystem, path: str, entry: Mapping[str, object]) -> str:
    """The store's name for an object's content; elsewhere, when it was written."""
    if isinstance(fs, ObjectStore):
        with fs.fs.open_input_stream(path, compression=None) as stream:
            if tag := (stream.metadata() or {}).get("ETag"):
                return str(tag)
    return str(entry.get("mtime") or entry.get("created") or "")
