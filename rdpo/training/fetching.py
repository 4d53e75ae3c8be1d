"""A checkpoint brought from a store to the nodes that resume from it: every file at most once a node.

A worker goes on from what it wrote itself and from what the first worker wrote for all. The files of the others stay
in the store, unless another number of workers is to go on: then each node converts all of them. What a checkpoint holds
beside the engine's state, the weights that may leave, is read to see that it is whole, and not kept.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.files.folder import checksum

if TYPE_CHECKING:
    import pyarrow.fs

SUMS = "checksums-{}.json"
SUMS_FILE = re.compile(r"checksums-(\d+)\.json")
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Place:
    """A worker among all, and among those of its node."""

    rank: int
    workers: int
    local_rank: int
    local_workers: int


@dataclass(frozen=True)
class Files:
    """Checksums of a checkpoint's files by name, by the worker that wrote them."""

    by_worker: Mapping[int, Mapping[str, str]]

    @classmethod
    def read(cls, filesystem: pyarrow.fs.FileSystem, path: str) -> Files:
        """Of a checkpoint in a store.

        Raises:
            OSError: the store does not give them.
            ValueError: they are damaged, or there are none.
        """
        import pyarrow.fs

        found = {}
        for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path)):
            if named := SUMS_FILE.fullmatch(info.base_name):
                with filesystem.open_input_stream(info.path) as file:
                    found[int(named[1])] = json.loads(file.read())
        if not found:
            raise ValueError(f"{path}: no checksums")
        return cls(found)

    @property
    def checksums(self) -> dict[str, str]:
        """Of all files, by name."""
        return {name: digest for written in self.by_worker.values() for name, digest in written.items()}

    def needed(self, place: Place, fits: bool, beside: Sequence[str]) -> list[str]:
        """What a worker brings to its node.

        Args:
            place: the worker's.
            fits: each worker goes on from its own files; else the node converts those of all.
            beside: files, and folders, that nobody goes on from.
        """
        state = [name for name in sorted(self.checksums) if not _is_in(name, beside)]
        if not fits:
            return state[place.local_rank :: place.local_workers]

        own = {*self.by_worker.get(place.rank, {})}
        # What the first worker wrote for all is shared by those of a node.
        shared = set(self.by_worker.get(0, {})) if place.local_rank == 0 else set()
        return [name for name in state if name in own | shared]

    def looked_at(self, place: Place, beside: Sequence[str]) -> list[str]:
        """What a worker only reads: its share of what nobody goes on from."""
        rest = [name for name in sorted(self.checksums) if _is_in(name, beside)]
        return rest[place.rank :: place.workers]


def _is_in(name: str, places: Sequence[str]) -> bool:
    return any(name == place or name.startswith(f"{place}/") for place in places)


@contextmanager
def parts_of(filesystem: pyarrow.fs.FileSystem, path: str, names: Sequence[str]) -> Iterator[Path]:
    """A folder of this machine with some files and folders of a checkpoint, as long as the context lasts.

    Of one in a store nothing else is fetched: the optimizer's state is many times the weights that leave.
    """
    import pyarrow.fs

    local = pyarrow.fs.LocalFileSystem()
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        yield Path(path)
        return

    with tempfile.TemporaryDirectory(prefix="rdpo-leaving-") as folder:
        for name in names:
            source, target = f"{path}/{name}", f"{folder}/{name}"
            if filesystem.get_file_info(source).type == pyarrow.fs.FileType.Directory:
                # What is in it is copied, not the folder itself.
                local.create_dir(target)
            pyarrow.fs.copy_files(source, target, source_filesystem=filesystem, destination_filesystem=local)
        yield Path(folder)


@dataclass(frozen=True)
class Fetch:
    """A checkpoint in a store, on its way into a folder that the workers of a node share."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    folder: Path

    def outline(self, files: Files) -> None:
        """Make an empty file for each of the checkpoint's: how many there are says how many workers wrote them."""
        for name in files.checksums:
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()

    def is_whole(self, files: Files, kept: Sequence[str], looked_at: Sequence[str]) -> bool:
        """Bring the files `kept` here and read the others; whether all of them are as they were written.

        Raises:
            OSError: the store does not give one that it has.
        """
        written = files.checksums
        try:
            return all(self._kept(name) == written[name] for name in kept) and all(
                self._looked_at(name) == written[name] for name in looked_at
            )
        except FileNotFoundError:
            return False

    def _kept(self, name: str) -> str:
        with self._stored(name) as stored, (self.folder / name).open("wb") as file:
            shutil.copyfileobj(stored, file, COPY_BYTES)
        with (self.folder / name).open("rb") as file:
            return checksum(file)

    def _looked_at(self, name: str) -> str:
        with self._stored(name) as stored:
            return checksum(stored)

    def _stored(self, name: str) -> Any:
        return self.filesystem.open_input_stream(f"{self.path}/{name}")
