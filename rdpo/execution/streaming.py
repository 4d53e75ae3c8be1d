"""Rows through one stage, or through several at the same time.

Each link of a chain takes rows in, works on them in Ray Data, and stores what comes out block by block; the
next one takes up the blocks as they are stored, so that rewards score the first rows while the teacher writes the
last. What an interrupted run has stored is not made again: each link takes from the one before also those stored
rows that it has not yet seen. A link is a stage, or a step of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.cluster.pools import pools_ended
from rdpo.execution.stage import Make, RowWork, Source
from rdpo.files.manifest import WriteProgress
from rdpo.files.rows import stored
from rdpo.files.stage_folder import StageFolder
from rdpo.files.unfinished import finished_rows, forget_end, raise_end
from rdpo.records import ID_COLUMN
from rdpo.tracking.console import Meter
from rdpo.tracking.trace import span

if TYPE_CHECKING:
    import ray.data
    from ray import ObjectRef

    from rdpo.execution.run import Run

STEP = "step-"
"""Beginning of the names of the folders, in that of a stage, that its steps store into."""


@dataclass(frozen=True)
class Link:
    """Rows from a source, what is made of them, and where that is stored.

    `later` are the folders of the stage's later steps, whose rows need not be made here again. Only the last link of a
    stage tells kept rows from dropped ones, and counts their tokens where it `generates` them.
    """

    source: Source
    make: Make
    folder: StageFolder
    later: tuple[StageFolder, ...] = ()
    generates: bool = False
    at_once: int = 0
    """How many rows its pools have at the same time."""
    label: str = ""
    """Which step it is, for a person; nothing where a stage has one alone."""

    @property
    def is_last(self) -> bool:
        """Whether the stage is done with it."""
        return not self.later


def chain_of(run: Run, works: Iterable[tuple[RowWork, StageFolder]]) -> Iterator[Link]:
    """A link for each step of each stage; what is in a folder is looked at when the link behind it is asked for."""
    for work, folder in works:
        makes, source = work.makes(run), work.source(run)
        steps = [StageFolder(folder.path, f"{STEP}{number}") for number in range(1, len(makes))]
        folders = [*steps, folder]
        at_once = sum(pool.rows_at_once for pool in work.pools(run.job))
        for index, (make, into) in enumerate(zip(makes, folders, strict=True)):
            label = f"step {index + 1} of {len(makes)}" if steps else ""
            yield Link(source, make, into, tuple(folders[index + 1 :]), work.generates, at_once, label)
            source = _source_in(into)


def _source_in(folder: StageFolder) -> Source:
    """The rows that a step has stored."""
    return Source(folder.dataset, folder.count(), lambda: folder.ids(ID_COLUMN))


def steps_kept(folder: StageFolder) -> list[StageFolder]:
    """The folders in which an unfinished stage keeps what its steps before the last have made, in order."""
    numbers = {int(name.removeprefix(STEP).partition("/")[0]) for name in folder.files() if name.startswith(STEP)}
    return [StageFolder(folder.path, f"{STEP}{number}") for number in sorted(numbers)]


def stream_rows(run: Run, links: Sequence[Link], meter: Meter) -> None:
    """Run a chain from what each link's one before stores; `meter` counts the last one's rows.

    Raises:
        InputError, EndpointDown: the work on some rows was ended from outside; all others are stored.
    """
    last = links[-1]
    meter.total = links[0].source.count
    at_once = sum(link.at_once for link in links)
    meter.begin(len(_done_ids(last)), at_once, last.label if len(links) == 1 else "")

    rows: ray.data.Dataset | None = None
    for link in links:
        forget_end(link.folder)
        if not link.is_last:
            link.folder.remove_unreadable()
        # Both the rows that the link before passes on now, and those that it stored in an interrupted run.
        rows = _joined(rows, _not_done(link))
        if rows is not None:
            rows = finished_rows(link.make(rows, run), link.folder)
            rows = stored(rows, link.folder, ID_COLUMN, pass_on=link is not last, whole=not link.is_last)

    if rows is not None:
        # Nothing is worked on before this: Ray Data makes what is asked for.
        with span("rows"):
            _drain(rows, meter, any(link.generates for link in links))
        with span("actors end"):
            ended = pools_ended()
        if not ended:
            run.console.warn(f"actors of {last.folder.name} have not ended and still hold memory")
    for link in links:
        raise_end(link.folder)
    # What an earlier stage of the chain dropped has not come by.
    meter.done = meter.total


def _done_ids(link: Link) -> pa.Array:
    """Ids of the rows that a link, or a later one of its stage, has stored."""
    chunks: list[pa.Array] = []
    for folder in (link.folder, *link.later):
        chunks += folder.done_ids(ID_COLUMN).chunks
    return pc.unique(pa.chunked_array(chunks, pa.string()))


def _joined(passed_on: ray.data.Dataset | None, waiting: ray.data.Dataset | None) -> ray.data.Dataset | None:
    if passed_on is None:
        return waiting
    return passed_on if waiting is None else passed_on.union(waiting)


def _not_done(link: Link) -> ray.data.Dataset | None:
    """The rows of a link's source that are not stored yet; None if there are none."""
    source, done = link.source, _done_ids(link)
    if not len(done):
        return source.rows() if source.count else None
    if pc.all(pc.is_in(source.ids(), done)).as_py():
        return None
    import ray

    return source.rows().map_batches(_without, fn_kwargs={"done": ray.put(done)}, batch_format="pyarrow")


def _without(batch: pa.Table, done: ObjectRef[pa.Array]) -> pa.Table:
    import ray

    return batch.filter(pc.invert(pc.is_in(batch[ID_COLUMN], ray.get(done))))


def _drain(rows: ray.data.Dataset, meter: Meter, generates: bool) -> None:
    for counts in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for count in counts.to_pylist():
            block = WriteProgress(**count)
            meter.advance(block.rows + block.dropped, block.tokens if generates else 0)
