"""Ids that stand in more than one row of a stage's folder: found, and one row of each left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rdpo.files.stage_folder import StageFolder

KINDS = ("", "dropped")
"""Where kept and dropped rows lie."""


def duplicates(folder: StageFolder, id_column: str) -> pa.ChunkedArray:
    """Ids of more than one row, kept or dropped."""
    # A million ids are large, their hashes are not; only ids whose hashes meet are compared.
    hashes = np.sort(np.concatenate([np.empty(0, np.int64), *map(_hashes, _id_chunks(folder, id_column))]))
    meeting = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(meeting):
        return pa.chunked_array([], pa.string())
    suspects = [chunk.filter(np.isin(_hashes(chunk), meeting)) for chunk in _id_chunks(folder, id_column)]
    counts = pc.value_counts(pa.chunked_array(suspects, pa.string()))
    return pa.chunked_array([counts.filter(pc.greater(counts.field("counts"), 1)).field("values")])


def remove_duplicates(folder: StageFolder, id_column: str) -> int:
    """Leave one row of each id, a kept one before a dropped one; returned is how many rows were removed.

    A task that is done again may cut its rows into other blocks, and store some of them a second time.
    """
    twice = set(duplicates(folder, id_column).to_pylist())
    if not twice:
        return 0

    removed, seen, written = 0, set[str](), set[str]()
    for below in KINDS:
        for name in folder.parts(below):
            # It has been written here, over a part with the same ids.
            if name in written:
                continue
            part = folder.part(name)
            stay = _first_of(part[id_column].to_pylist(), twice, seen)
            if all(stay):
                continue
            left = part.filter(pa.array(stay, pa.bool_()))
            # First what stays: an interruption between the two leaves duplicates, and no row is lost.
            written.update(folder.write_rows_below(left, id_column, below))
            folder.fs.rm(f"{folder.root}/{name}")
            removed += part.num_rows - left.num_rows
    return removed


def _first_of(ids: list[str], twice: set[str], seen: set[str]) -> list[bool]:
    """Which of the ids come for the first time; those that come again are added to `seen`."""
    stay = []
    for name in ids:
        stay.append(name not in seen)
        if name in twice:
            seen.add(name)
    return stay


def _id_chunks(folder: StageFolder, id_column: str) -> Iterator[pa.Array]:
    for below in KINDS:
        for table in folder.tables(below, [id_column]):
            yield from table[id_column].chunks


def _hashes(ids: pa.Array) -> NDArray[np.int64]:
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))
