"""The DeepSpeed configuration, from ours; and what ZeRO-3 gathers together."""

from __future__ import annotations

from typing import Any

from rdpo.config import Training
from rdpo.modeling.model import Policy

BUCKET = 50_000_000
"""Elements that are reduced, or fetched ahead, in one message."""
LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 may keep; a smaller model stays whole from forward to backward."""


def zero_config(training: Training, dtype: str, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary; `universal`: a checkpoint of another number of workers will be loaded.

    The accumulation boundary is set by hand in the loop, since steps differ in their number of
    micro-batches; the schedule and the scaling of the loss are the loop's too.
    """
    stage = stage_of(training, dtype)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = BUCKET
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
        zero["stage3_prefetch_bucket_size"] = BUCKET
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE
    if training.offload != "none" and stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.gpus_per_worker > 0}
    if training.offload == "all" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": training.gpus_per_worker > 0}
    adamw: dict[str, Any] = {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "torch_adam": True,
    }
    if training.gpus_per_worker:
        # One kernel for all weights; offloaded, all cores instead of one.
        adamw["fused"] = True
    config = _engine_config(training, dtype, universal, zero, adamw)
    if stage == 3 and dtype == "bfloat16":
        # Sums of many small gradients in bfloat16 lose those that come last. Stages 1 and 2 keep theirs in another
        # optimizer then, whose checkpoints are not partitioned in the same way.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _engine_config(
    training: Training, dtype: str, universal: bool, zero: dict[str, Any], adamw: dict[str, Any]
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 1 << 30,
    }


def stage_of(training: Training, dtype: str) -> int:
    """The ZeRO stage that runs: without ZeRO, DeepSpeed would train bfloat16 weights without fp32 master copies."""
    return max(training.zero_stage, 1) if dtype == "bfloat16" else training.zero_stage


def gather_by_layer(policy: Policy) -> None:
    """Let ZeRO-3 gather and release a decoder layer as one, not each of its projections and adapters.

    DeepSpeed's hooks do Python work at every module it follows, and at each release it walks all
    modules up to its reuse distance: with LoRA on every projection a small model spent more time there
    than in its matrices (see jobs/bench/RESULTS.md).
    """
    from deepspeed.utils import set_z3_leaf_modules

    if layers := policy.layer_types():
        set_z3_leaf_modules(policy, layers)
