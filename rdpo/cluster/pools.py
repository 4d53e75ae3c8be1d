"""Pools of actors: which ones a job has, what each actor takes, and how a pool grows and ends.

A kind of node is named by a custom resource that its nodes declare (`ray start --resources='{"teacher": 1}'`), and
every actor that is meant for it takes a thousandth of that. Ray's node labels would do the same, but Ray Train counts
the workers that there is room for by resources alone, and an autoscaler without label support would start nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdpo.config import ClassifierReward, Concurrency, Engine, ImplicitReward, Job, JudgeReward, largest, smallest

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

SHARE = 0.001
"""What an actor takes of its kind. Ray Train divides sums of it with a floor, which not every fraction survives."""
FULL = 1.0
POOL_ACTOR = "MapWorker"
ENDS_WITHIN_S = 60.0
PAUSE_S = 0.5


@dataclass(frozen=True)
class Pool:
    """Actors of one stage that hold a model, as many as `size`, with `cpus` and `gpus` for each, on nodes named so."""

    stage: str
    setting: str
    size: Concurrency
    cpus: int
    gpus: float
    nodes: str | None

    def __str__(self) -> str:
        return f"{self.cpus} CPU, {self.gpus:g} GPU on {self.nodes or 'any node'}"

    @property
    def actor(self) -> dict[str, float]:
        """What Ray sets aside for one of its actors."""
        return {"CPU": self.cpus, "GPU": self.gpus, **(share_of(self.nodes) or {})}


def share_of(nodes: str | None) -> dict[str, float] | None:
    """The custom resource that keeps an actor on nodes of a kind; None is anywhere."""
    return {nodes: SHARE} if nodes else None


def pools_of(job: Job) -> list[Pool]:
    """The pools of a job, in the order of its stages."""
    where, reference, training = job.cluster.placement, job.reference, job.training
    pools = []
    if job.synthesis.task and not job.synthesis.endpoint:
        pools.append(_engines("synthesis", "synthesis.engine", job.synthesis.engine, where.teacher))
    pools += _reward_pools(job)
    pools.append(Pool("reference", "reference", reference.concurrency, 1, reference.gpus, where.trainer))
    if training.max_steps != 0:
        cpus = training.cpus_per_worker or 1
        pools.append(Pool("training", "training", training.num_workers, cpus, training.gpus_per_worker, where.trainer))
    return [*pools, _engines("evaluation", "evaluation.engine", job.evaluation.engine, where.teacher)]


def _reward_pools(job: Job) -> Iterator[Pool]:
    nodes = job.cluster.placement.reward
    for reward in job.rewards:
        setting = f"rewards.{reward.name}"
        if isinstance(reward, JudgeReward):
            yield _engines("rewards", f"{setting}.engine", reward.engine, nodes)
        elif isinstance(reward, ClassifierReward | ImplicitReward):
            yield Pool("rewards", setting, reward.concurrency, 1, reward.gpus, nodes)


def _engines(stage: str, setting: str, engine: Engine, nodes: str | None) -> Pool:
    return Pool(stage, setting, engine.concurrency, engine.cpus or 1, engine.gpus, nodes)


def adapt_pools() -> None:
    """Let pools grow as soon as all their places are taken.

    Ray's own threshold is above the share that an actor with one waiting task ever reaches.
    """
    from ray.data import DataContext

    DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = FULL


def pools_ended(within_s: float = ENDS_WITHIN_S) -> bool:
    """Wait until no actor of this run's pools is left, so that what they held is free; whether that is so.

    A cluster without a dashboard does not say which actors it has; there nothing is waited for.
    """
    import ray
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    mine = [("job_id", "=", context.get_job_id()), ("state", "!=", "DEAD")]
    deadline = time.monotonic() + within_s
    while True:
        try:
            actors = list_actors(address=context.gcs_address, filters=mine)
        except (ConnectionError, RayStateApiException):
            return True
        if not any(actor.class_name.startswith(POOL_ACTOR) for actor in actors):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE_S)


def actor_pool(concurrency: Concurrency, at_once: int = 1) -> ActorPoolStrategy:
    """A pool of actors that grows while all its places are taken and shrinks when work runs out.

    Args:
        concurrency: number of actors, or the smallest and the largest.
        at_once: tasks that one actor works on at the same time.
    """
    from ray.data import ActorPoolStrategy

    sizes = {"min_size": smallest(concurrency), "max_size": largest(concurrency)}
    # One more task waits in each actor, so that an engine has no gap between two blocks.
    return ActorPoolStrategy(**sizes, max_tasks_in_flight_per_actor=at_once + 1)
