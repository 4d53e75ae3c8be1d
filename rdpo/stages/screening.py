"""Screening: what the student says of the answers, before any reward is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.execution.stage import RowWork, Stage
from rdpo.stages.settings import rendering_of_student, student_settings

if TYPE_CHECKING:
    import ray.data

    from rdpo.cluster.pools import Pool
    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings


def settings(job: Job) -> Settings:
    """Settings of the screening stage, with the weights of both models; not how many rows are chosen afterwards."""
    from rdpo.modeling.weights import ModelRef
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.selection import sampled_turn, settings_of

    reference = settings_of(job).reference
    against = {"against": {"weights": ModelRef.of(job, reference).fingerprint()}} if reference else {}
    answers = scored_answers(job) if reference else []
    student = {"student": student_settings(job), **rendering_of_student(job)}
    return {"samples": sampled_turn(job).names, "answers": answers, **student, **against}


def screen(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """Entropy and certainty of all rows."""
    from rdpo.preference.selection import screen

    return screen(rows, run.job)


def pools(job: Job) -> list[Pool]:
    """Who reads the answers."""
    from rdpo.preference.selection import selection_pool

    return [selection_pool(job)]


STAGE = Stage(
    "screening",
    inputs=("synthesis",),
    settings=settings,
    rows=RowWork(lambda run: run.source("synthesis"), screen, pools=pools),
    packages=("rdpo", "torch", "transformers"),
    wanted=lambda job: job.selection is not None,
)
