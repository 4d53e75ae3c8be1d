"""Rewards: an external score for every answer, from one or several sources.

For each answer column NAME adds `NAME_scores` (each reward's score by name) and `NAME_score` (their
weighted sum, the one that is optimised). A reward is a classifier head through transformers, a
language model as judge, a trained model against its start, or a Python function.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rdpo.cluster.pools import actor_pool, share_of
from rdpo.config import ClassifierReward, FunctionReward, ImplicitReward, Job, JudgeReward, Reward
from rdpo.modeling.chat import load_chat
from rdpo.preference.classifier import Classifier, checked_classifier
from rdpo.preference.function import load_function, score_by_function
from rdpo.preference.implicit import Implicit, checked_implicit
from rdpo.preference.judge import Judge
from rdpo.preference.ratings import check_rubric, rating_values
from rdpo.preference.scores import combine_table
from rdpo.synthesis.engine import engine_pool
from rdpo.synthesis.given import REWARD as GIVEN

if TYPE_CHECKING:
    import ray.data

BLOCK_ROWS = 64
FUNCTION_BLOCK_ROWS = 512


def score_answers(rows: ray.data.Dataset, job: Job, answers: list[str], together: bool = False) -> ray.data.Dataset:
    """Score the named answer columns by every reward of the job, then combine the scores.

    The rewards take their turn one after the other, so that a machine which holds only one of the
    models can run them all; `together` lets rows flow from one to the next.
    """
    for index, reward in enumerate(job.rewards):
        if index and not together:
            rows = rows.materialize()
        rows = _score_by(rows, job, reward, answers)
    weights = {reward.name: reward.weight for reward in job.rewards} or {GIVEN: 1.0}
    return rows.map_batches(combine_table, fn_kwargs={"weights": weights, "answers": answers}, batch_format="pyarrow")


def _score_by(rows: ray.data.Dataset, job: Job, reward: Reward, answers: list[str]) -> ray.data.Dataset:
    arguments: dict[str, Any] = {"reward": reward, "answers": answers}
    nodes = job.cluster.placement.reward
    if isinstance(reward, JudgeReward):
        return engine_pool(rows, Judge, reward.engine, {**arguments, "job": job}, nodes)
    if isinstance(reward, FunctionReward):
        arguments["path"] = os.getcwd()
        blocks = rows.repartition(target_num_rows_per_block=FUNCTION_BLOCK_ROWS)
        return blocks.map_batches(score_by_function, fn_kwargs=arguments, batch_format="pyarrow")
    blocks = rows.repartition(target_num_rows_per_block=BLOCK_ROWS)
    implicit = isinstance(reward, ImplicitReward)
    return blocks.map_batches(
        Implicit if implicit else Classifier,
        fn_constructor_kwargs={**arguments, "job": job} if implicit else arguments,
        batch_format="pyarrow",
        batch_size=BLOCK_ROWS,
        compute=actor_pool(reward.concurrency),
        num_gpus=reward.gpus,
        resources=share_of(nodes),
    )


def check_rewards(job: Job) -> None:
    """Find out before the long work whether every reward can be had.

    Raises:
        InputError: a model, rating, rubric or function is not usable.
    """
    for reward in job.rewards:
        if isinstance(reward, ClassifierReward):
            checked_classifier(reward)
        elif isinstance(reward, JudgeReward):
            check_rubric(reward)
            chat = load_chat(*job.model_or_student(reward.model))
            if reward.score == "expected":
                rating_values(chat, reward)
        elif isinstance(reward, ImplicitReward):
            checked_implicit(reward, job)
        else:
            load_function(reward.function)
