"""ExPO: a trained model moved further along the way that training took it (arXiv 2404.16792).

    theta' = theta_1 + alpha * (theta_1 - theta_0)

With alpha below 0 it is an average of both. It costs no training. An adapter's update is linear in its second matrix,
so scaling that by 1 + alpha is the same, and adapter and merged model stay one. What an adapter holds whole is moved as
whole weights are.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdpo.errors import InputError
from rdpo.modeling.loading import load_whole
from rdpo.modeling.saving import save_model

ADAPTER = "adapter_model.safetensors"
FIRST_MATRIX = re.compile(r"\.lora_(embedding_)?A(\.|$)")
SECOND_MATRIX = re.compile(r"\.lora_(embedding_)?B(\.|$)")
OTHER_ADAPTER = re.compile(r"\.lora_\w+")
IN_BASE = re.compile(r"^base_model\.model\.|\.base_layer|\.modules_to_save")


def extrapolate(exported: Path, base: Path, alpha: float, trust_remote_code: bool = False) -> None:
    """Move the policy in the folder `exported`, an adapter or whole weights, by alpha away from the model `base`.

    Raises:
        InputError: the adapter holds something that cannot be moved exactly; nothing is moved then.
    """
    if (exported / ADAPTER).is_file():
        _move_adapter(exported / ADAPTER, base, alpha)
        return
    model, start = (load_whole(folder, "auto", trust_remote_code) for folder in (exported, base))
    before = dict(start.named_parameters())
    with torch.no_grad():
        # By the names of the architecture, each tied weight once: files may name them otherwise.
        for name, weight in model.named_parameters():
            weight.copy_(_moved(weight, before[name], alpha))
    save_model(model, exported)


def _move_adapter(file: Path, base: Path, alpha: float) -> None:
    weights = load_file(file)
    moved = {name: _moved_part(name, tensor, base, alpha) for name, tensor in weights.items()}
    save_file(moved, file, metadata={"format": "pt"})


def _moved_part(name: str, tensor: Tensor, base: Path, alpha: float) -> Tensor:
    if FIRST_MATRIX.search(name):
        return tensor
    if SECOND_MATRIX.search(name):
        return tensor * (1 + alpha)

    start = None if OTHER_ADAPTER.search(name) else _stored(base, IN_BASE.sub("", name))
    if start is None or start.shape != tensor.shape:
        raise InputError(
            f"training.extrapolation: the adapter's {name} cannot be moved exactly (it is neither a LoRA matrix nor "
            "whole weights that the start model has); set it to 0"
        )
    return _moved(tensor, start, alpha)


def _stored(base: Path, name: str) -> Tensor | None:
    """A tensor of a model's files, by its name there; None if there is none."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                found: Tensor = opened.get_tensor(name)
                return found
    return None


def _moved(trained: Tensor, start: Tensor, alpha: float) -> Tensor:
    after, before = trained.float(), start.float()
    return (after + alpha * (after - before)).to(trained.dtype).contiguous()
