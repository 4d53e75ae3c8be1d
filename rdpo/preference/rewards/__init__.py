"""Rewards: an external score for every answer, from one or several sources.

For each answer column NAME adds `NAME_scores` (each reward's score by name) and `NAME_score` (their
weighted sum, the one that is optimised). A reward is a classifier head through transformers, a
language model as judge, a trained model against its start, a server, a Python function, or another
model that is asked the answers: one file each, and one line in `registry.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.config import Job
from rdpo.files.manifest import Settings
from rdpo.files.stage_folder import StageFolder
from rdpo.files.unfinished import finished_rows
from rdpo.preference.rewards.registry import kind_of
from rdpo.preference.scores import combine_table
from rdpo.synthesis.columns import Needed
from rdpo.synthesis.given import REWARD as GIVEN

if TYPE_CHECKING:
    import ray.data

    from rdpo.cluster.pools import Pool


def score_answers(
    rows: ray.data.Dataset, job: Job, answers: list[str], together: bool = False, folder: StageFolder | None = None
) -> ray.data.Dataset:
    """Score the named answer columns by every reward of the job, then combine the scores.

    The rewards take their turn one after the other, so that a machine which holds only one of the
    models can run them all; `together` lets rows flow from one to the next. Rows whose work was ended from outside, as
    by a server's account, are left out, and `folder` notes what ended it: no other reward is asked, and paid, for them.
    """
    for index, reward in enumerate(job.rewards):
        # A reward that is not done yet would hold its GPU while the next one asks for it.
        if index and not together:
            rows = rows.materialize()
        rows = kind_of(reward).score(rows, job, answers)
        if folder is not None:
            rows = finished_rows(rows, folder)

    weights = {reward.name: reward.weight for reward in job.rewards} or {GIVEN: 1.0}
    return rows.map_batches(combine_table, fn_kwargs={"weights": weights, "answers": answers}, batch_format="pyarrow")


def check_rewards(job: Job) -> None:
    """Find out before the long work whether every reward can be had.

    Raises:
        InputError: a model, rating, rubric or function is not usable.
    """
    for reward in job.rewards:
        kind_of(reward).check_named(job)
        kind_of(reward).check(job)


def check_named_rewards(job: Job) -> None:
    """Try of the rewards what can be tried in a moment, without a model.

    Raises:
        InputError: a rubric or function is not usable.
    """
    for reward in job.rewards:
        kind_of(reward).check_named(job)


def reward_settings(job: Job) -> list[Settings]:
    """The rewards, with fingerprints of their models and of their functions' source: a part of a stage's key."""
    return [kind_of(reward).settings(job) for reward in job.rewards]


def reward_columns(job: Job) -> list[Needed]:
    """The columns of the source of the prompts that the rewards read beside the prompt."""
    columns: list[Needed] = []
    for reward in job.rewards:
        columns += kind_of(reward).columns()
    return columns


def reward_pools(job: Job) -> list[Pool]:
    """The pools of actors that score, in the order of the rewards."""
    pools: list[Pool] = []
    for reward in job.rewards:
        pools += kind_of(reward).pools(job)
    return pools
