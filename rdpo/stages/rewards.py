"""Rewards: the scores of all answers that a pair may need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.execution.stage import RowWork, Source, Stage

if TYPE_CHECKING:
    import ray.data

    from rdpo.cluster.pools import Pool
    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder


def settings(job: Job) -> Settings:
    """Settings of the rewards stage, with models and functions as they are now."""
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.rewards import reward_settings

    return {"rewards": reward_settings(job), "answers": scored_answers(job)}


def answered(run: RunReader) -> Source:
    """The rows with answers: all of them, or those that were selected."""
    return run.source("selection" if run.job.selection else "synthesis")


def score(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The scores of all answers that a pair may need."""
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.rewards import score_answers

    return score_answers(rows, run.job, scored_answers(run.job), run.streams, run.folder("rewards"))


def summary(run: Run, folder: StageFolder) -> Summary:
    """What the endpoints of judges and targets read, wrote and cost; says so."""
    from rdpo.config import TargetReward
    from rdpo.preference.rewards.judge_endpoint import READ, WRITTEN
    from rdpo.synthesis.endpoint import cost

    spent: dict[str, dict[str, float]] = {}
    within = [reward.reward for reward in run.job.rewards if isinstance(reward, TargetReward)]
    for reward in [*run.job.rewards, *within]:
        endpoint = getattr(reward, "endpoint", None)
        if endpoint is None:
            continue
        columns = READ + reward.name, WRITTEN + reward.name
        read, written = (folder.total(column) + folder.total(column, "dropped") for column in columns)
        price = cost(read, written, endpoint.price_per_million)
        run.console.say(f"{'':<12}endpoint of {reward.name}: {read} tokens read, cost {price:.2f}")
        spent[reward.name] = {"tokens_read": read, "tokens_written": written, "cost": price}
    return {"endpoints": spent} if spent else {}


def pools(job: Job) -> list[Pool]:
    """Who scores."""
    from rdpo.preference.rewards import reward_pools

    return reward_pools(job)


STAGE = Stage(
    "rewards",
    inputs=("synthesis", "selection"),
    settings=settings,
    rows=RowWork(answered, score, summary, has_failed=bool, pools=pools),
    joins=True,
    packages=("rdpo", "vllm", "torch", "transformers"),
    command="score",
)
