"""What each stage's output depends on: its settings, and fingerprints of the models and files it reads.

A stage's key is a hash of these and of its inputs' content. Settings that only say where and in what
portions work is done (`PLACEMENT`) do not count.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from typing import Any

from rdpo.cluster.hardware import compute_dtype
from rdpo.config import FunctionReward, ImplicitReward, Job, JudgeReward
from rdpo.files.stores import open_file
from rdpo.modeling.weights import adapter_fingerprint, fingerprint
from rdpo.records import digest


def _file_hash(source: str) -> str:
    from rdpo.synthesis.sources import source_files

    if source.startswith("hf:"):
        return source

    total = hashlib.blake2b(digest_size=16)
    for path in source_files(source):
        with open_file(path) as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def _student(job: Job) -> dict[str, Any]:
    dtype = compute_dtype(job.student.dtype, job.training.gpus_per_worker > 0)
    return {**job.student.model_dump(), "dtype": dtype, "weights": fingerprint(job.student.model, job.student.revision)}


def _source(name: str) -> str:
    """Hash of the source of the module that a function is named by, and of the one that defines it."""
    from rdpo.preference.function import load_function

    modules = {inspect.getmodule(load_function(name)), sys.modules[name.partition(":")[0]]}
    return digest(sorted(inspect.getsource(module) for module in modules if module and inspect.getsourcefile(module)))


def _reward_settings(job: Job) -> list[dict[str, Any]]:
    from rdpo.preference.implicit import reference_of

    settings = []
    for reward in job.rewards:
        entry = reward.model_dump()
        if isinstance(reward, FunctionReward):
            entry["source"] = _source(reward.function)
        else:
            entry["weights"] = fingerprint(*job.model_or_student(reward.model)[:2])
        if isinstance(reward, ImplicitReward):
            entry["reference"] = fingerprint(*reference_of(reward, job)[:2])
        settings.append(entry)
    return settings


def prompts(job: Job) -> dict[str, Any]:
    """Settings of the prompts stage, with the content of its source."""
    return {
        **job.prompts.model_dump(),
        "content": _file_hash(job.prompts.source),
        # Pairs that are ready are read, and named, in another way than prompts.
        "given": job.synthesis.task is None,
        **_tokenizer(job),
        "seed": job.seed,
    }


def _tokenizer(job: Job) -> dict[str, Any]:
    return {"student": job.student.model, "revision": job.student.revision}


def _wording(job: Job, condition: str | None) -> dict[str, Any]:
    """The words of the task, where a stage asks one of its questions."""
    from rdpo.synthesis.instructions import load_task

    if not (condition and job.synthesis.task):
        return {}
    return {"turns": load_task(job.synthesis.task).model_dump(), "words": job.synthesis.values}


def synthesis(job: Job) -> dict[str, Any]:
    """Settings of the synthesis stage, with the task's wording and the teacher's weights."""
    from rdpo.synthesis.instructions import load_task

    if job.synthesis.task is None:
        return {"split": job.synthesis.split, "limit": job.synthesis.limit}
    task = load_task(job.synthesis.task).model_dump()
    weights = None if job.synthesis.endpoint else fingerprint(*job.model_or_student(job.synthesis.teacher)[:2])
    settings = {**job.synthesis.model_dump(), "turns": task, "weights": weights, "seed": job.seed}
    if job.synthesis.adapter:
        settings["adapter_weights"] = adapter_fingerprint(job.synthesis.adapter)
    if endpoint := job.synthesis.endpoint:
        # How it is asked does not change what it says.
        settings |= {"endpoint": {"url": endpoint.url, "model": endpoint.model}, "engine": None}
    return settings


def rewards(job: Job) -> dict[str, Any]:
    """Settings of the rewards stage, with models and functions as they are now."""
    from rdpo.preference.pairs import scored_answers

    return {"rewards": _reward_settings(job), "answers": scored_answers(job)}


def calibration(job: Job) -> dict[str, Any]:
    """Settings of the trial of the rewards, with the known pairs and the models as they are now."""
    from rdpo.preference.calibration import known_pairs, trial_prompts, tried_rewards

    tried = tried_rewards(job)
    rewards = _reward_settings(job.model_copy(update={"rewards": tried}))
    return {
        **trial_prompts(job).model_dump(exclude={"source"}),
        "content": _file_hash(known_pairs(job)),
        **_tokenizer(job),
        "seed": job.seed if any(isinstance(reward, JudgeReward) for reward in tried) else None,
        "rewards": [{**one, "weight": 1.0} for one in rewards],
    }


def training(job: Job) -> dict[str, Any]:
    """Settings of the training stage."""
    settings = job.training.model_dump(exclude={"extrapolation"})
    if job.training.select == "best":
        # Only what is a checkpoint can be the best one.
        settings["select_among_every"] = job.training.checkpoint_every
    return {**settings, "student": _student(job), "seed": job.seed}


def policy(job: Job) -> dict[str, Any]:
    """Settings of the whole model that is made of what training left."""
    return {"extrapolation": job.training.extrapolation, "student": _student(job)}


def retention(job: Job) -> dict[str, Any]:
    """Settings of the retention stage, with the content of its source."""
    if job.retention is None:
        return {}
    system = {"system": job.prompts.system, "max_prompt_tokens": job.prompts.max_prompt_tokens}
    return {**job.retention.model_dump(), **system, "content": _file_hash(job.retention.source)}


def evaluation(job: Job) -> dict[str, Any]:
    """Settings of the evaluation stage."""
    asked = _wording(job, job.evaluation.condition or ("refine" if job.evaluation.refine else None))
    final = {"final": job.pairs.chosen} if job.evaluation.refine else {}
    start = {"start": start_answers(job)}
    return {
        **final,
        **job.evaluation.model_dump(exclude={"samples"}),
        **asked,
        **start,
        "rewards": _reward_settings(job),
        "seed": job.seed,
    }


def start_answers(job: Job) -> dict[str, Any]:
    """What the start model's answers to the held-out prompts depend on, beside the prompts."""
    settings = job.evaluation.model_dump(include={"sampling", "engine"})
    return {**settings, **_wording(job, job.evaluation.condition), "student": _student(job), "seed": job.seed}


def pairs(job: Job) -> dict[str, Any]:
    """Settings of the pairs stage."""
    asked = _wording(job, job.pairs.condition)
    return {**job.pairs.model_dump(), **asked, "seed": job.seed if job.pairs.flip else None}


def replay(job: Job) -> dict[str, Any]:
    """Settings of the replay stage, with the content of its source."""
    if job.replay is None:
        return {}
    system = {"system": job.prompts.system, "max_prompt_tokens": job.prompts.max_prompt_tokens}
    return {**job.replay.model_dump(), **system, "content": _file_hash(job.replay.source), "seed": job.seed}


def reference(job: Job) -> dict[str, Any]:
    """Settings of the reference stage, with the student's weights."""
    return {**job.reference.model_dump(), "student": _student(job)}


def publish(job: Job) -> dict[str, Any]:
    """Settings of the published model."""
    return job.publish.model_dump()
