"""Rewards: the scores of all answers that a pair may need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.execution.stage import RowWork, Stage

if TYPE_CHECKING:
    import ray.data

    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings


def settings(job: Job) -> Settings:
    """Settings of the rewards stage, with models and functions as they are now."""
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.rewards import reward_settings

    return {"rewards": reward_settings(job), "answers": scored_answers(job)}


def score(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The scores of all answers that a pair may need."""
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.rewards import score_answers

    return score_answers(rows, run.job, scored_answers(run.job), run.streams)


STAGE = Stage(
    "rewards",
    inputs=("synthesis",),
    settings=settings,
    rows=RowWork(lambda run: run.source("synthesis"), score, has_failed=bool),
    joins=True,
    packages=("rdpo", "vllm", "torch", "transformers"),
    command="score",
)
