"""Rows whose work was ended from outside, as by an account: they stay to be done, the finished ones are stored.

An error that a worker raises ends everything that is under way, the answers of its neighbours included, which are paid
for. So the worker marks the rows that it cannot finish, the others are stored, and the run ends after that.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.errors import EndpointDown, InputError
from rdpo.files.stage_folder import StageFolder
from rdpo.records import Row

if TYPE_CHECKING:
    import ray.data

UNFINISHED = "unfinished"
"""The column with the error that ended the work on a row."""
NOTE = "ended.json"
"""In a stage's folder: the error that ended the work on some of its rows."""
ERRORS = {error.__name__: error for error in (InputError, EndpointDown)}


def unfinished(row: Row, error: Exception) -> Row:
    """The row with the error that ended the work on it."""
    return {**row, UNFINISHED: json.dumps([type(error).__name__, str(error)])}


def finished_rows(rows: ray.data.Dataset, folder: StageFolder) -> ray.data.Dataset:
    """The rows without those that are unfinished; what ended these is noted in the folder."""
    path, name = folder.path.rsplit("/", 1)[0], folder.name

    def finished(block: pa.Table) -> pa.Table:
        if UNFINISHED not in block.column_names:
            return block
        errors = block[UNFINISHED].cast(pa.string())
        ended = pc.drop_null(errors)
        if len(ended):
            StageFolder(path, name).write_json(NOTE, json.loads(ended[0].as_py()))
        return block.filter(pc.is_null(errors)).drop_columns([UNFINISHED])

    return rows.map_batches(finished, batch_format="pyarrow", batch_size=None)


def forget_end(folder: StageFolder) -> None:
    """Remove what an earlier run noted."""
    if folder.exists(NOTE):
        folder.remove(NOTE)


def raise_end(folder: StageFolder) -> None:
    """End the run if the work on some of the folder's rows was ended.

    Raises:
        InputError: by something that is to be corrected, as a key or an account.
        EndpointDown: by a server that answers nothing any more.
    """
    note = folder.read_json(NOTE)
    if note:
        name, said = note
        raise ERRORS[name](said)
