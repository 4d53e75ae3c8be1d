"""Selection: the rows that the rewards are to score, chosen among all that were screened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.execution.stage import RowWork, Stage
from rdpo.records import ID_COLUMN

if TYPE_CHECKING:
    import ray.data

    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings


def settings(job: Job) -> Settings:
    """Settings of the selection stage."""
    from rdpo.preference.selection import settings_of

    return settings_of(job).model_dump(include={"prompts", "pairs"})


def choose_rows(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The rows, those that are not chosen dropped with the reason."""
    from rdpo.preference.selection import CERTAINTY, ENTROPY, choose, cutoff_of, settings_of

    # Of the finished screening: which rows are chosen depends on all of them, and not on which are still to be stored.
    measured = run.folder("screening").tables(columns=[ID_COLUMN, ENTROPY, CERTAINTY])
    cutoff = cutoff_of(measured, settings_of(run.job))
    return rows.map_batches(choose, fn_kwargs={"cutoff": cutoff}, batch_format="pyarrow")


STAGE = Stage(
    "selection",
    inputs=("screening",),
    settings=settings,
    rows=RowWork(lambda run: run.source("screening"), choose_rows),
    packages=("rdpo",),
    wanted=lambda job: job.selection is not None,
)
