"""Ids that stand in more than one row of a stage's folder: found, and one row of each left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from rdpo.files.stage_folder import StageFolder

KINDS = ("", "dropped")
"""Where kept and dropped rows lie."""


def repeated(parts: Callable[[], Iterable[Sequence[str]]]) -> set[str]:
    """Names that stand in more than one place; `parts` gives all of them, twice if need be."""
    # A million names are large, their hashes are not; only names whose hashes meet are counted.
    found = [np.fromiter(map(hash, names), np.int64, len(names)) for names in parts()]
    hashes = np.sort(np.concatenate([np.empty(0, np.int64), *found]))
    meeting = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not meeting:
        return set()

    counts: Counter[str] = Counter()
    for names in parts():
        counts.update(name for name in names if hash(name) in meeting)
    return {name for name, count in counts.items() if count > 1}


def duplicates(folder: StageFolder, id_column: str) -> set[str]:
    """Ids of more than one row, kept or dropped."""
    return repeated(lambda: _ids(folder, id_column))


def remove_duplicates(folder: StageFolder, id_column: str) -> int:
    """Leave one row of each id, a kept one before a dropped one; returned is how many rows were removed.

    A task that is done again may cut its rows into other blocks, and store some of them a second time.
    """
    twice = duplicates(folder, id_column)
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


def _ids(folder: StageFolder, id_column: str) -> Iterator[list[str]]:
    for below in KINDS:
        for table in folder.tables(below, [id_column]):
            yield table[id_column].to_pylist()
