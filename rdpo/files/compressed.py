"""Files that are stored compressed, as the ending of their name says; they are unpacked as they are read."""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING

import pyarrow as pa

from rdpo.errors import InputError
from rdpo.files.stores import open_file

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ENDINGS = {".gz": "gzip", ".zst": "zstd"}
"""The endings of compressed files, and what pyarrow calls their compression."""
FIRST_BYTES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
READ_AHEAD = 1 << 20


def plain_name(address: str) -> str:
    """The address without the ending of a compressed file."""
    for ending in ENDINGS:
        address = address.removesuffix(ending)
    return address


def ending_by_content(beginning: bytes) -> str | None:
    """The ending that a file with these first bytes should have; None if it is not compressed."""
    return next((ending for first, ending in FIRST_BYTES.items() if beginning.startswith(first)), None)


def open_unpacked(address: str) -> IO[bytes]:
    """A file to read bytes from, of a compressed one what it holds, in bounded memory; it goes forwards only.

    Raises:
        InputError: while it is read, that it is cut off, damaged or not compressed.
    """
    file = open_file(address)
    compression = next((name for ending, name in ENDINGS.items() if address.endswith(ending)), None)
    if compression is None:
        return file
    return io.BufferedReader(_Unpacked(file, address, compression), READ_AHEAD)


class _Unpacked(io.RawIOBase):
    """What a compressed file holds."""

    def __init__(self, file: IO[bytes], address: str, compression: str):
        self.watched = _Watched(file)
        self.address = address
        self.compression = compression
        self.stream = pa.CompressedInputStream(self.watched, compression)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
            self.watched.close()
        super().close()

    def readinto(self, buffer: WriteableBuffer) -> int:
        space = memoryview(buffer)
        try:
            content = self.stream.read(len(space))
        except OSError as error:
            # One of the disk or the store says nothing about what the file holds.
            if self.watched.failed:
                raise
            raise InputError(
                f"{self.address}: cannot be unpacked as {self.compression} ({str(error).strip()[:200]}): it is cut off "
                "or damaged, or is not what the ending of its name says; copy it again, or correct its name"
            ) from None
        space[: len(content)] = content
        return len(content)


class _Watched:
    """A file of which is known whether reading it failed."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.failed = False

    @property
    def closed(self) -> bool:
        return bool(self.file.closed)

    def read(self, size: int = -1) -> bytes:
        try:
            content: bytes = self.file.read(size)
        except Exception:
            self.failed = True
            raise
        return content

    def close(self) -> None:
        self.file.close()
