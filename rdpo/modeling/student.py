"""The job's student as training reads it: the one forward that all log-probs of a run come from.

Precision, chunk of the head, layout, quantization and trust in the model's code are decided here, once. Training, the
reference, the divergence of the evaluation and the log-probs of single tokens all take their policy from
`student_forward`, or from `frozen_student`, which is compared with the model's own logits before it is read; numbers
that are subtracted from each other come from the same arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.cluster.hardware import compute_dtype
from rdpo.errors import InputError
from rdpo.modeling.adapters import ALL_LINEAR, SETTING, check_reached, check_wraps
from rdpo.modeling.readers import FrozenModel
from rdpo.modeling.start import checked_start
from rdpo.modeling.weights import ModelRef, local_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rdpo.config import Job, Lora
    from rdpo.modeling.chat import Chat
    from rdpo.modeling.model import ForwardSettings, Policy, Tuning
    from rdpo.modeling.probe import ReadAs

QUESTION = [{"role": "user", "content": "x"}]
"""By which it is found out what ids every text has: those that the chat template writes."""


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
    from rdpo.modeling.model import Tuning, load_policy

    settings = forward_settings(job, merged is None)
    if merged:
        policy = load_policy(merged, settings, tuning_of(job) if to_train else None)
    else:
        tuning = tuning_of(job) if to_train else Tuning(adapter=_continued(job))
        policy = load_policy(weights_of_start(job).folder(), settings, tuning)
    policy.weights = settings.weights
    policy.measures_likeness = to_train and job.training.policy_weight == "wpo"
    return policy


def frozen_student(job: Job, merged: str | None = None) -> FrozenModel:
    """The student to be read only: as training starts from it, or as it left training.

    Args:
        job: as for `student_forward`.
        merged: address of the trained model's folder, adapter merged; by default the start.
    """
    ref = ModelRef(merged, trust=job.student.trust_remote_code) if merged else ModelRef.student(job)
    where = f"student.model {job.student.model}"
    return FrozenModel(ref, forward_settings(job, merged is None), where, beside=job.student.continues)


def weights_of_start(job: Job) -> ModelRef:
    """The model whose weights training loads: the student, without an adapter that is trained further."""
    student = ModelRef.student(job)
    return student.base if job.student.continues else student


def _continued(job: Job) -> Path | None:
    """Folder of the student's adapter that is trained further; None if there is none."""
    return local_adapter(job.student.adapter) if job.student.adapter and job.student.continues else None


def check_student(job: Job, chat: Chat) -> None:
    """Look at the student's checkpoint without reading its weights: whether it is whole, and can be trained as asked.

    Raises:
        InputError: tensors are missing, not used or of another shape; token ids lie beyond the embedding; texts may be
            longer than it reads; it cannot be read in the layout, or not adapted or saved, as the job asks for.
    """
    from rdpo.modeling.loading import check_length
    from rdpo.modeling.model import as_policy
    from rdpo.modeling.saving import check_config_saves

    where, student = f"student.model {job.student.model}", ModelRef.student(job)
    if is_quantised(student) and job.training.max_steps != 0 and job.training.lora is None:
        raise InputError(
            f"{where}: its weights are stored quantised, and cannot be trained as they are; set training.lora, or give "
            "the model in 16 or 32 bits"
        )
    if is_quantised(student) and student.adapter:
        raise InputError(
            f"{where}: its weights are stored quantised, and cannot take student.adapter in exactly; give the model in "
            "16 or 32 bits"
        )
    model = checked_start(job, checked_model(where, student, chat))

    lengths = {
        "reference.max_length": job.reference.max_length,
        "evaluation.engine.max_model_len": job.evaluation.engine.max_model_len,
    }
    for setting, tokens in lengths.items():
        check_length(where, model, setting, tokens)
    check_config_saves(where, model.config)
    if job.training.max_steps != 0:
        fresh = None if job.student.continues else job.training.lora
        _check_adapter(as_policy(model, forward_settings(job), tuning_of(job)), fresh)


def check_architecture(job: Job) -> ReadAs | None:
    """Try, on a small random model of the student's configuration, whether rdpo reads its architecture exactly.

    Returns how that model is read; None if none could be built.

    Raises:
        InputError: its log-probs would not be those of its own logits, or not in the layout or the tiles that the job
            asks for.
    """
    from rdpo.modeling.miniature import check_miniature

    where, config = f"student.model {job.student.model}", ModelRef.student(job).config()
    tiled = job.training.mlp_tile is not None
    found = check_miniature(where, config, forward_settings(job), tiled)
    if tiled and found is None:
        raise InputError(
            f"training.mlp_tile: {where}: whether tiles leave the log-probs as they are cannot be tried, since no "
            "small model of its architecture could be built; remove it"
        )
    return found


def is_quantised(model: ModelRef) -> bool:
    """Whether a model's weights are stored quantised."""
    return bool(getattr(model.config(), "quantization_config", None))


def checked_model(where: str, model: ModelRef, chat: Chat) -> PreTrainedModel:
    """A causal language model without its numbers, compared with its checkpoint and its tokenizer.

    Of a quantised checkpoint only the names and shapes of its architecture are looked at: what it holds is something
    else, and loading will tell.

    Raises:
        InputError: tensors are missing, not used or of another shape, or token ids lie beyond the embedding.
    """
    from transformers import AutoModelForCausalLM

    from rdpo.modeling.loading import architecture_outline, check_loaded, check_token_ids, outline

    if is_quantised(model):
        outlined = architecture_outline(where, AutoModelForCausalLM, model.config(), model.trust)
    else:
        # Not merged for it: an adapter changes neither names nor shapes.
        outlined, info = outline(where, AutoModelForCausalLM, model.base.folder(), model.trust)
        check_loaded(where, outlined, info)
    check_token_ids(where, outlined, chat.tokenizer, used={*chat.prompt_ids(QUESTION), chat.end_id})
    return outlined


def _check_adapter(policy: Policy, lora: Lora | None) -> None:
    """Raise if the adapter would not be trained: tried on the device that has no numbers, or else on zeros.

    `lora`: what made a fresh one; None of the student's own.
    """
    if not policy.adapted:
        return
    setting = SETTING if lora else "student.adapter"
    batch = replace(policy.batch([[0, 0]], [[0, 0]], [[0]]), attention_mask=None)
    try:
        check_reached(policy.model, policy.train().hidden_states(batch.to("meta")), setting=setting)
        return
    except InputError:
        raise
    except Exception:
        # A forward that looks at numbers, as where experts are chosen, cannot run without them.
        fill_with_zeros(policy)

    try:
        check_reached(policy.model, policy.hidden_states(batch.to("cpu")), one_of_many=True, setting=setting)
    except InputError:
        raise
    except Exception as error:
        check_wraps(policy.model, lambda: policy.hidden_states(batch.to("cpu")))
        # Where kernels are for GPUs alone, nothing can be tried here; what reaches all layers is taken on trust.
        remedy = f"use {ALL_LINEAR!r}" if lora else 'set student.adapter_use = "merge"'
        if lora is None or lora.target_modules != ALL_LINEAR:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(
                f"{setting}: whether these would be trained cannot be tried here ({said}); {remedy}"
            ) from None


def fill_with_zeros(policy: Policy) -> None:
    """Give an outlined model zeros for numbers, so that its forward runs: one stored zero for each frozen weight."""
    import torch
    from torch import nn

    for module in policy.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                zeros = torch.zeros(weight.shape) if weight.requires_grad else torch.zeros(()).expand(weight.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    if hasattr(policy.causal, "set_experts_implementation"):
        # The others copy the weights of all experts together.
        policy.causal.set_experts_implementation("eager")


def forward_settings(job: Job, quantised: bool = True) -> ForwardSettings:
    """How the student's weights are held and read; `quantised`: in four bits, where the job asks for it."""
    from rdpo.modeling.model import ForwardSettings

    return ForwardSettings(
        dtype=student_dtype(job),
        chunk=job.training.logprob_chunk,
        layout=job.training.layout,
        quantization=job.student.quantization if quantised else "none",
        trust_remote_code=job.student.trust_remote_code,
        weights=job.training.token_weights,
    )


def tuning_of(job: Job) -> Tuning:
    """What makes the student ready to be trained."""
    from rdpo.modeling.model import Tuning

    training = job.training
    tuning = Tuning(gradient_checkpointing=training.gradient_checkpointing, mlp_tile=training.mlp_tile, seed=job.seed)
    if adapter := _continued(job):
        # Not the dropout that the adapter was trained with before: that belongs to a training, not to an adapter.
        return replace(tuning, adapter=adapter, dropout=training.lora.dropout if training.lora else 0.0)
    return replace(tuning, lora=training.lora)
