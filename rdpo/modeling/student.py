"""The job's student as training reads it: the one forward that all log-probs of a run come from.

Precision, chunk of the head, layout, quantization and trust in the model's code are decided here, once. Training, the
reference, the divergence of the evaluation and the log-probs of single tokens all take their policy from
`student_forward`; numbers that are subtracted from each other come from the same arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.cluster.hardware import compute_dtype
from rdpo.modeling.weights import ModelRef

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.modeling.model import ForwardSettings, Policy, Tuning


def student_dtype(job: Job) -> str:
    """Precision in which training runs the student, and so its reference too."""
    return compute_dtype(job.student.dtype, job.training.gpus_per_worker > 0)


def student_forward(job: Job, merged: Path | None = None, to_train: bool = False) -> Policy:
    """The student with the weights that training starts from, or with those that left it.

    With `student.quantization` the start is in four bits wherever it is read: training holds the policy to the
    reference that it has in its hands, so the reference log-probs, the KL divergence and `rdpo show --logps` must go
    by the very same weights. The model that is published is not quantised (its adapter is merged into the stored
    weights), so the trained one is not either. What is measured between the two, KL for one, is then the distance of
    the model that users get from the reference of the loss: what training moved, and what four bits rounded away. It
    is not 0 for a model that was not trained.

    Args:
        job: its `student` and `training` say how the forward is computed.
        merged: folder of the trained model, adapter merged; by default the start is loaded.
        to_train: the start is made ready to be trained: with the job's adapter and gradient checkpointing.

    Raises:
        InputError: the model cannot be had, cannot be read in the layout that the job asks for, or bitsandbytes is
            missing.
    """
    from rdpo.modeling.model import load_policy

    folder = merged or ModelRef.student(job).folder()
    return load_policy(folder, forward_settings(job, merged is None), tuning_of(job) if to_train else None)


def forward_settings(job: Job, quantised: bool = True) -> ForwardSettings:
    """How the student's weights are held and read; `quantised`: in four bits, where the job asks for it."""
    from rdpo.modeling.model import ForwardSettings

    return ForwardSettings(
        dtype=student_dtype(job),
        chunk=job.training.logprob_chunk,
        layout=job.training.layout,
        quantization=job.student.quantization if quantised else "none",
        trust_remote_code=job.student.trust_remote_code,
    )


def tuning_of(job: Job) -> Tuning:
    """What makes the student ready to be trained."""
    from rdpo.modeling.model import Tuning

    return Tuning(job.training.lora, job.training.gradient_checkpointing, job.seed)
