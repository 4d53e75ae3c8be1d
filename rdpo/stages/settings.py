"""Parts of the settings that several stages depend on: the student, its tokenizer, a question."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.files.manifest import Settings

SPEAKER = ("teacher", "adapter", "chat_template_kwargs", "sampling", "engine")
"""Settings that a table of synthesis and one of a voice have in common."""


def student_settings(job: Job) -> Settings:
    """The student, the precision that it is computed in, and a fingerprint of its weights."""
    from rdpo.cluster.hardware import compute_dtype
    from rdpo.modeling.weights import ModelRef, adapter_fingerprint

    student, dtype = ModelRef.student(job), compute_dtype(job.student.dtype, job.training.gpus_per_worker > 0)
    # Code that is not run changes nothing.
    code = {"code": student.code_fingerprint()} if student.trust else {}
    worn = {"adapter_weights": adapter_fingerprint(student.adapter)} if student.adapter else {}
    return {**job.student.model_dump(), "dtype": dtype, "weights": student.base.fingerprint(), **code, **worn}


def tokenizer_settings(job: Job) -> Settings:
    """The model by whose tokenizer prompts are measured, with a fingerprint of tokenizer and chat template."""
    from rdpo.modeling.weights import ModelRef

    read = {"tokenizer": ModelRef.student(job).tokenizer_fingerprint()}
    rendering = rendering_of_student(job)
    if found := rendering.get("rendering"):
        # Which tokens of an answer count is nothing to a prompt.
        rendering = {"rendering": {name: value for name, value in found.items() if name != "masks"}}
    return {"student": job.student.model, "revision": job.student.revision, **read, **rendering}


def rendering_of_student(job: Job) -> Settings:
    """What the student's chat template makes a stage depend on beside the model's files; nothing for most templates."""
    from rdpo.modeling.chat import rendering_settings, student_chat

    return rendering_settings(student_chat(job))


def question_settings(job: Job, condition: str | None) -> Settings:
    """The words of the task, where a stage asks one of its questions."""
    from rdpo.synthesis.instructions import load_task

    if not (condition and job.synthesis.task):
        return {}
    return {"turns": load_task(job.synthesis.task).model_dump(), "words": job.synthesis.values}


def prefill_settings(job: Job) -> Settings:
    """A mark, where words that answers begin with are a template: they were once taken as they stand."""
    from rdpo.synthesis.instructions import load_task

    turns = load_task(job.synthesis.task).turns if job.synthesis.task else []
    return {"prefill": "rendered"} if any("{" in turn.prefill for turn in turns) else {}


def speaker_settings(job: Job, rendering: Settings | None = None) -> Settings:
    """What the words of a job's teacher depend on, beside the settings of its table.

    `rendering`: what its chat template makes them depend on, where it is not asked as a teacher is.
    """
    from rdpo.modeling.chat import rendering_settings, teacher_chat
    from rdpo.modeling.weights import ModelRef, adapter_fingerprint
    from rdpo.synthesis.engine import engine_settings

    if endpoint := job.synthesis.endpoint:
        # How it is asked does not change what it says.
        return {"endpoint": {"url": endpoint.url, "model": endpoint.model}, "engine": None, "weights": None}
    teacher = ModelRef.of(job, job.synthesis.teacher)
    read = rendering_settings(teacher_chat(job)) if rendering is None else rendering
    found = {"weights": teacher.fingerprint(), **read}
    found["engine"] = engine_settings(job.synthesis.engine, teacher)
    if job.synthesis.adapter:
        found["adapter_weights"] = adapter_fingerprint(job.synthesis.adapter)
    return found
