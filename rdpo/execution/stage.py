"""What a stage is: the rows that enter it, what it does with them, and what its output depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdpo.records import ID_COLUMN

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter


@dataclass(frozen=True)
class Source:
    """The rows that enter a stage, how many they are, and their ids, read when they are asked for."""

    rows: Callable[[], ray.data.Dataset]
    count: int
    ids: Callable[[], pa.ChunkedArray]


@dataclass(frozen=True)
class RowWork:
    """What a stage does that maps rows to rows.

    `summarize` looks at the finished folder. `generates`: the rows' `*_tokens` are this stage's work and
    count for its rate.
    """

    source: Callable[[RunReader], Source]
    make: Callable[[ray.data.Dataset, Run], ray.data.Dataset]
    summarize: Callable[[Run, StageFolder], dict[str, Any]] = lambda run, folder: {}
    generates: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage: what it reads, what its output depends on, and what it does.

    `rows` is the work of a stage that maps rows to rows; `joins`: it may take up rows while the stage before it,
    its input, still makes them. Any other stage has `execute`, which returns the manifest's summary; `rows_in` in
    it is the number of rows that entered.

    A stage without an `id_column` leaves files of another kind than rows; `unit` is what its progress counts.
    `command` is what a person types to bring this stage alone up to date. `wanted`: whether a job has the stage.
    """

    name: str
    inputs: tuple[str, ...]
    settings: Callable[[Job], dict[str, Any]]
    execute: Callable[[Run, StageFolder, Meter], dict[str, Any]] | None = None
    rows: RowWork | None = None
    joins: bool = False
    id_column: str | None = ID_COLUMN
    unit: str = "rows"
    command: str | None = None
    wanted: Callable[[Job], bool] = lambda job: True
