"""The DeepSpeed configuration, from ours; and what ZeRO-3 gathers together."""

from __future__ import annotations

from typing import Any

from rdpo.config import Training
from rdpo.policy.model import Policy


def zero_config(training: Training, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary.

    The accumulation boundary is set by hand in the loop, since steps differ in their number of
    micro-batches; the schedule and the scaling of the loss are the loop's too.
    """
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if training.offload != "none" and training.zero_stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.gpus_per_worker > 0}
    if training.offload == "all" and training.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": training.gpus_per_worker > 0}
    adamw = {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "torch_adam": True,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def gather_by_layer(policy: Policy) -> None:
    """Let ZeRO-3 gather and release a decoder layer as one, not each of its projections and adapters.

    DeepSpeed's hooks do Python work at every module it follows, and at each release it walks all
    modules up to its reuse distance: with LoRA on every projection a small model spent more time there
    than in its matrices (see jobs/bench/RESULTS.md).
    """
    from deepspeed.utils import set_z3_leaf_modules

    if layers := policy.layer_types():
        set_z3_leaf_modules(policy, layers)
