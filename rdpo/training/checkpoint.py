"""Checkpoints of a training run, and the weights that leave it.

A checkpoint holds each worker's ZeRO shards; Ray Train merges the workers' files into one directory.
The policy that leaves is safetensors only: the adapter, or the whole model.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch

from rdpo.policy.models import WEIGHTS

EXPORT = "policy"
MERGED = "merged"

StepMetrics = dict[str, float]
TAG = "state"


def save_checkpoint(engine: Any, history: list[StepMetrics], policy: Any = None) -> None:
    """Report a checkpoint of all workers; with `policy` given, the last one, with the weights to leave.

    `history`, the metrics of every step so far, is part of it, so that none is missing after a restart.
    """
    with tempfile.TemporaryDirectory() as directory:
        engine.save_checkpoint(
            directory,
            tag=TAG,
            client_state={"history": history},
            exclude_frozen_parameters=engine.module.adapted,
        )
        if policy is not None:
            export_policy(policy, Path(directory) / EXPORT)
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(history[-1] if history else {}, checkpoint=checkpoint)


def restore_checkpoint(engine: Any) -> list[StepMetrics]:
    """Load the last checkpoint, if there is one; the metrics of the optimizer steps it has behind it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as directory:
        strict = not engine.module.adapted
        _, state = engine.load_checkpoint(directory, tag=TAG, load_module_strict=strict)
    return list(state["history"])


def export_policy(policy: Any, folder: Path) -> None:
    """Gather the trained weights over all workers; rank 0 writes them as safetensors."""
    model = policy.model
    state = gathered_state(model, adapter_only=policy.adapted)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, state_dict=state)
    torch.distributed.barrier()


def gathered_state(model: Any, adapter_only: bool) -> dict[str, torch.Tensor]:
    """Full tensors of the (trained) parameters on rank 0's CPU, whatever ZeRO partitioned; empty elsewhere.

    One parameter is gathered at a time, so that no worker ever holds two whole ones.
    """
    import deepspeed

    state = {}
    for name, parameter in model.named_parameters():
        if adapter_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if torch.distributed.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def finish_policy(exported: Path, base: Path, merged: Path, trust_remote_code: bool = False) -> None:
    """Make a complete model folder of what training exported, in the precision the base is stored in.

    An adapter is merged, in fp32; the tokenizer's files are added.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(merged, ignore_errors=True)
    adapter = (exported / "adapter_config.json").is_file()
    source = base if adapter else exported
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    if adapter:
        model = PeftModel.from_pretrained(model, str(exported)).merge_and_unload()
    stored = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).dtype or torch.float32
    model.to(stored).save_pretrained(merged)
    for pattern in WEIGHTS[1:]:
        for file in base.glob(pattern):
            if not (merged / file.name).exists() and not file.name.endswith(".index.json"):
                shutil.copy(file, merged / file.name)
