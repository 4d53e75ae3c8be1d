"""Rows through one stage, or through several at the same time.

Each stage of a chain takes rows in, works on them in Ray Data, and stores what comes out block by block; the
next one takes up the blocks as they are stored, so that rewards score the first rows while the teacher writes the
last. What an interrupted run has stored is not made again: each stage takes from the one before also those stored
rows that it has not yet seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.cluster.pools import pools_ended
from rdpo.execution.stage import RowWork, Source
from rdpo.files.manifest import WriteProgress
from rdpo.files.rows import stored
from rdpo.files.stage_folder import StageFolder
from rdpo.files.unfinished import finished_rows, forget_end, raise_end
from rdpo.records import ID_COLUMN
from rdpo.tracking.console import Meter

if TYPE_CHECKING:
    import ray.data
    from ray import ObjectRef

    from rdpo.execution.run import Run


def stream_rows(run: Run, links: Sequence[tuple[RowWork, StageFolder]], meter: Meter) -> None:
    """Run a chain of stages, each from what the one before stores; `meter` counts the last one's rows.

    Raises:
        InputError, EndpointDown: the work on some rows was ended from outside; all others are stored.
    """
    last = links[-1][1]
    meter.total = links[0][0].source(run).count
    meter.advance(last.count() + last.count("dropped"))

    rows: ray.data.Dataset | None = None
    for work, folder in links:
        forget_end(folder)
        # Both the rows that the stage before passes on now, and those that it stored in an interrupted run.
        rows = _joined(rows, _not_done(work.source(run), folder))
        if rows is not None:
            rows = finished_rows(work.make(rows, run), folder)
            rows = stored(rows, folder, ID_COLUMN, pass_on=folder is not last)

    if rows is not None:
        # Nothing is worked on before this: Ray Data makes what is asked for.
        _drain(rows, meter, any(work.generates for work, _ in links))
        if not pools_ended():
            run.console.warn(f"actors of {last.name} have not ended and still hold memory")
    for _, folder in links:
        raise_end(folder)
    # What an earlier stage of the chain dropped has not come by.
    meter.done = meter.total


def _joined(passed_on: ray.data.Dataset | None, waiting: ray.data.Dataset | None) -> ray.data.Dataset | None:
    if passed_on is None:
        return waiting
    return passed_on if waiting is None else passed_on.union(waiting)


def _not_done(source: Source, folder: StageFolder) -> ray.data.Dataset | None:
    """The rows of a source that the stage has not stored yet; None if there are none."""
    done = folder.done_ids(ID_COLUMN)
    if not len(done):
        return source.rows() if source.count else None
    if pc.all(pc.is_in(source.ids(), done)).as_py():
        return None
    import ray

    return source.rows().map_batches(_without, fn_kwargs={"done": ray.put(done)}, batch_format="pyarrow")


def _without(batch: pa.Table, done: ObjectRef[pa.ChunkedArray]) -> pa.Table:
    import ray

    return batch.filter(pc.invert(pc.is_in(batch[ID_COLUMN], ray.get(done))))


def _drain(rows: ray.data.Dataset, meter: Meter, generates: bool) -> None:
    for counts in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for count in counts.to_pylist():
            block = WriteProgress(**count)
            meter.advance(block.rows + block.dropped, block.tokens if generates else 0)
