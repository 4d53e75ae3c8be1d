"""What rows hold, as hashes that do not depend on how the rows lie in parts.

Each part carries the sums of its columns' hashes in its footer, written where the part is written; a whole folder's
hashes are the sums over its parts. They tell content apart that came about by itself, and are no defence against
content that is made to collide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rdpo.records import digest

FOOTER = b"rdpo.columns"
MODULUS = 1 << 64

Hashes = NDArray[np.uint64]
Sums = Mapping[str, int]
"""For each column the sum of its values' hashes, below 2**64."""


def column_sums(table: pa.Table, id_column: str) -> dict[str, int]:
    """The sums of a table's columns, each value hashed together with the id of its row.

    A value that is null counts for nothing: in a table where all are null the column may be missing.
    """
    ids = _hashes(_whole(table[id_column]))
    sums: dict[str, int] = {}
    for name in table.column_names:
        column = _whole(table[name])
        # A sum, unlike a hash of hashes, needs no order; ids are unique, so that no term meets itself.
        terms = _mixed(_hashes(column) + _mixed(ids))[_known(column)]
        if len(terms):
            sums[name] = int(terms.sum(dtype=np.uint64))
    return sums


def with_footer(table: pa.Table, id_column: str) -> pa.Table:
    """The table with its columns' sums in the metadata of its schema, which Parquet keeps in a file's footer."""
    sums = column_sums(table, id_column)
    # The checksums of Parquet's pages do not reach the footer.
    return table.replace_schema_metadata({FOOTER: json.dumps({"sums": sums, "check": digest(sums)})})


def footer_of(schema: pa.Schema) -> dict[str, int] | None:
    """The sums that a part carries; None of a part that an earlier version has written.

    Raises:
        ValueError: they are damaged.
    """
    written = (schema.metadata or {}).get(FOOTER)
    if written is None:
        return None
    footer = json.loads(written)
    if not isinstance(footer, dict) or footer.get("check") != digest(footer.get("sums")):
        raise ValueError("the sums of the columns are not as they were written")
    return dict(footer["sums"])


def column_digests(parts: Iterable[Sums]) -> dict[str, str]:
    """A hash of each column, 16 hexadecimal digits by its name, from the sums of all parts."""
    totals: dict[str, int] = {}
    for sums in parts:
        for name, total in sums.items():
            totals[name] = (totals.get(name, 0) + total) % MODULUS
    return {name: f"{total:016x}" for name, total in sorted(totals.items())}


def _whole(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _known(array: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(pc.is_valid(array).to_numpy(zero_copy_only=False), dtype=bool)


def _hashes(array: pa.Array) -> Hashes:
    """One hash for each value; what null has is of no account."""
    kind = array.type
    if pa.types.is_null(kind):
        return np.zeros(len(array), np.uint64)
    if pa.types.is_struct(kind):
        return _of_structs(array)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _of_lists(array)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _of_numbers(array)
    return _of_texts(array)


def _of_texts(array: pa.Array) -> Hashes:
    kind = pa.large_binary() if pa.types.is_binary(array.type) else pa.large_string()
    filled = array.cast(kind).fill_null(b"" if pa.types.is_large_binary(kind) else "")
    _, places, content = filled.buffers()
    # An array may begin anywhere in its buffers.
    offsets = np.frombuffer(places, np.int64)[filled.offset : filled.offset + len(filled) + 1]
    return _of_slices(memoryview(content or b""), offsets)


def _of_numbers(array: pa.Array) -> Hashes:
    """Of numbers; one that some part holds as integer and another as float has one hash, where both hold it exactly."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    filled = array.fill_null(0)
    try:
        bits = filled.cast(pa.float64()).to_numpy(zero_copy_only=False).view(np.uint64)
    except pa.ArrowInvalid:
        bits = filled.to_numpy(zero_copy_only=False).astype(np.uint64)
    return _mixed(bits)


def _of_structs(array: pa.Array) -> Hashes:
    """Of tables: a field that is null counts for nothing, as if the part did not have it."""
    total = np.zeros(len(array), np.uint64)
    for position, field in enumerate(array.type):
        values = pc.struct_field(array, [position])
        name = _of_texts(pa.array([field.name]))
        total += np.where(_known(values), _mixed(_hashes(values) + name), np.uint64(0))
    return _mixed(total)


def _of_lists(array: pa.Array) -> Hashes:
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    elements = array.flatten()
    hashes = np.where(_known(elements), _hashes(elements), np.uint64(0))
    ends = np.cumsum(np.concatenate([[0], lengths])) * hashes.itemsize
    return _of_slices(memoryview(hashes.tobytes()), ends)


def _of_slices(content: memoryview, offsets: NDArray[np.int64]) -> Hashes:
    """Of each slice of some bytes; it begins at one offset and ends at the next."""
    places = offsets.tolist()
    slices = (content[start:end] for start, end in pairwise(places))
    digests = b"".join([hashlib.blake2b(one, digest_size=8).digest() for one in slices])
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mixed(values: Hashes) -> Hashes:
    """Each value spread over all 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
