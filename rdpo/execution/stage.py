"""What a stage is: the rows that enter it, what it does with them, and what its output depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rdpo.records import ID_COLUMN, digest

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from rdpo.cluster.pools import Pool
    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Manifest, Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter


PLACE_COLUMN = "source"
"""The column with the file that a row is from. It may be moved: no stage reads it but to tell people where a row is."""


@dataclass(frozen=True)
class Reads:
    """What a stage reads of one of its inputs; by default all that it holds.

    Of rows the `columns` (None: all), but those in `without`; of other files those in the folder `below`. With
    `summary` the manifest's summary too, and with `making` all that the input was made of.
    """

    columns: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    below: str = ""
    summary: bool = False
    making: bool = False

    def of(self, manifest: Manifest) -> str:
        """Hash of what is read, into whatever parts the rows are divided."""
        rows = {name: value for name, value in (manifest.columns or {}).items() if self._reads_column(name)}
        files = {name: value for name, value in manifest.files.items() if self._reads_file(name, manifest)}
        about = [manifest.summary if self.summary else None, manifest.key if self.making else None]
        return digest(sorted(rows.items()), sorted(files.items()), *about)

    def _reads_column(self, name: str) -> bool:
        if name in self.without or name == PLACE_COLUMN:
            return False
        return self.columns is None or name in self.columns

    def _reads_file(self, name: str, manifest: Manifest) -> bool:
        # Rows whose columns are hashed are known by these; earlier versions hashed none.
        return name.startswith(self.below) and not (manifest.columns and name.endswith(".parquet"))


@dataclass(frozen=True)
class Source:
    """The rows that enter a stage, how many they are, and their ids, read when they are asked for."""

    rows: Callable[[], ray.data.Dataset]
    count: int
    ids: Callable[[], pa.ChunkedArray]


Make = Callable[["ray.data.Dataset", "Run"], "ray.data.Dataset"]
"""What is made of rows."""


@dataclass(frozen=True)
class RowWork:
    """What a stage does that maps rows to rows.

    `make` is all of it, unless there are `steps`, each of which may hold a model of its own. What all steps but the
    last make, dropped rows too, is kept beside the stage's parts until the stage is finished.

    `summarize` looks at the finished folder. `generates`: the rows' `*_tokens` are this stage's work and count for its
    rate. `has_failed`: whether the reasons why all rows were dropped, with how many each, mean that the stage failed as
    a whole; it is not committed then, and its rows stay to be done. `pools`: who works on the rows; until twice as many
    are done as they have at the same time nothing tells how long the others will take.
    """

    source: Callable[[RunReader], Source]
    make: Make | None = None
    summarize: Callable[[Run, StageFolder], Summary] = lambda run, folder: {}
    generates: bool = False
    has_failed: Callable[[Mapping[str, int]], bool] = lambda reasons: False
    steps: Callable[[Run], Sequence[Make]] | None = None
    pools: Callable[[Job], Sequence[Pool]] = lambda job: ()

    def makes(self, run: Run) -> list[Make]:
        """Its steps, or the one thing that it does."""
        steps = self.steps(run) if self.steps else [self.make]
        return [step for step in steps if step]


@dataclass(frozen=True)
class Stage:
    """One stage: what it reads, what its output depends on, and what it does.

    `rows` is the work of a stage that maps rows to rows; `joins`: it may take up rows while the stage before it,
    its input, still makes them. Any other stage has `execute`, which returns the manifest's summary; `rows_in` in
    it is the number of rows that entered.

    `reads`: what it reads of those inputs of which it does not read all. `packages`: those whose versions decide what
    it makes, so that what is half made is not gone on with by another one; none where it begins from nothing each time.

    A stage without an `id_column` leaves files of another kind than rows; `unit` is what its progress counts.
    `command` is what a person types to bring this stage alone up to date. `wanted`: whether a job has the stage.
    `doubt`: why rows that an earlier version made with the same settings cannot be taken as they are, if they cannot.
    """

    name: str
    inputs: tuple[str, ...]
    settings: Callable[[Job], Settings]
    execute: Callable[[Run, StageFolder, Meter], Summary] | None = None
    rows: RowWork | None = None
    joins: bool = False
    reads: Mapping[str, Reads] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    id_column: str | None = ID_COLUMN
    unit: str = "rows"
    command: str | None = None
    wanted: Callable[[Job], bool] = lambda job: True
    doubt: Callable[[Job, StageFolder], str] = lambda job, folder: ""

    def read_of(self, name: str, manifest: Manifest) -> str:
        """Hash of what this stage reads of an input."""
        return self.reads.get(name, Reads()).of(manifest)

    def outdated_inputs(self, made: Manifest, inputs: Mapping[str, Manifest]) -> list[str]:
        """The inputs that hold something else by now than when this stage was made of them."""
        # Earlier versions noted the digest of all that was there.
        return [
            name
            for name, noted in made.inputs.items()
            if name in inputs and noted not in (self.read_of(name, inputs[name]), inputs[name].digest)
        ]
