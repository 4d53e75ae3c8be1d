"""The pools of actors of a job, as its stages declare them."""

from __future__ import annotations

from rdpo.cluster.pools import Pool
from rdpo.config import Job
from rdpo.evaluation.generate import answer_pool
from rdpo.preference.reference import reference_pool
from rdpo.preference.rewards import reward_pools
from rdpo.preference.selection import selection_pool
from rdpo.synthesis.made import writer_pool
from rdpo.synthesis.teacher import speaker_pools


def pools_of(job: Job) -> list[Pool]:
    """The pools of a job, in the order of its stages."""
    pools = [writer_pool(job)] if job.prompts.made else []
    pools += speaker_pools(job) if job.synthesis.task else []
    pools += [selection_pool(job)] if job.selection else []
    pools += reward_pools(job)
    pools.append(reference_pool(job))
    if job.training.max_steps != 0:
        pools.append(training_pool(job))
    return [*pools, answer_pool(job)]


def training_pool(job: Job) -> Pool:
    """The training workers, which Ray Train starts."""
    training, nodes = job.training, job.cluster.placement.trainer
    cpus = training.cpus_per_worker or 1
    return Pool("training", "training", training.num_workers, cpus, training.gpus_per_worker, nodes)
