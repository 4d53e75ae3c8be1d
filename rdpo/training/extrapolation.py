"""ExPO: a trained model moved further along the way that training took it (arXiv 2404.16792).

    theta' = theta_1 + alpha * (theta_1 - theta_0)

It costs no training. An adapter's update is linear in its second matrix, so scaling that by 1 + alpha is the same, and
adapter and merged model stay one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ADAPTER = "adapter_model.safetensors"
SECOND_MATRIX = "lora_B"


def extrapolate(exported: Path, base: Path, alpha: float) -> None:
    """Move the policy in the folder `exported`, an adapter or whole weights, by alpha away from the model `base`."""
    if (exported / ADAPTER).is_file():
        _scale_adapter(exported / ADAPTER, 1 + alpha)
        return
    start = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in exported.glob("*.safetensors"):
        trained = load_file(file)
        moved = {name: _moved(tensor, start[name], alpha) for name, tensor in trained.items()}
        save_file(moved, file, metadata={"format": "pt"})


def _scale_adapter(file: Path, factor: float) -> None:
    weights = load_file(file)
    scaled = {name: tensor * factor if SECOND_MATRIX in name else tensor for name, tensor in weights.items()}
    save_file(scaled, file, metadata={"format": "pt"})


def _moved(trained: torch.Tensor, start: torch.Tensor, alpha: float) -> torch.Tensor:
    after, before = trained.float(), start.float()
    return (after + alpha * (after - before)).to(trained.dtype).contiguous()
