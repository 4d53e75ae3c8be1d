"""Parts of the settings that several stages depend on: the student, its tokenizer, a question."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.files.manifest import Settings


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
