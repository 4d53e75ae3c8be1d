"""Rows of a Ray Dataset into the parts of a stage folder, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.files.manifest import WriteProgress
from rdpo.files.stage_folder import StageFolder

if TYPE_CHECKING:
    import ray.data


def stored(
    rows: ray.data.Dataset, folder: StageFolder, id_column: str, pass_on: bool, whole: bool = False
) -> ray.data.Dataset:
    """The data set with a last step that stores each block as a part of the folder.

    It yields the kept rows where others take them up (`pass_on`), else one `WriteProgress` for each block. `whole`:
    rows that are dropped lie among the others and go on with them; they are counted at the end.
    """
    path, name = folder.path.rsplit("/", 1)[0], folder.name

    def store(block: pa.Table) -> pa.Table:
        into = StageFolder(path, name)
        if whole:
            into.write_rows_below(block, id_column, "")
            progress = WriteProgress(block.num_rows, 0, 0)
        else:
            progress = into.write_parts(block, id_column)
        if not pass_on:
            return pa.Table.from_pylist([asdict(progress)])
        return block if whole else block.filter(pc.is_null(block["dropped"].cast(pa.string())))

    return rows.map_batches(store, batch_format="pyarrow", batch_size=None)


def write_rows(
    rows: ray.data.Dataset, folder: StageFolder, id_column: str, on_block: Callable[[WriteProgress], None]
) -> None:
    """Run a Ray Dataset and store its rows part by part; `on_block` hears of each as it is written."""
    written = stored(rows, folder, id_column, pass_on=False)
    for counts in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for count in counts.to_pylist():
            on_block(WriteProgress(**count))
