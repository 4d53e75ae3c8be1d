"""The MLPs of decoder layers read a few tokens of a long row at a time.

An MLP looks at each token alone, so a row may be cut where one likes: the numbers are those of the whole row. Its
inner states, several times as wide as the hidden states, are kept for no tile: the backward pass makes them again, a
tile at a time (TiledMLP of Arctic Long Sequence Training, arXiv 2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdpo.errors import InputError

SETTING = "training.mlp_tile"
NAMES = ("mlp", "feed_forward", "ffn")
"""What architectures of transformers call a decoder layer's MLP, or the experts in its place."""


def tile_mlps(layers: Iterable[nn.Module], tokens: int) -> None:
    """From now on the MLP of each layer reads so many tokens at a time.

    Raises:
        InputError: no layer has a module that is known to be its MLP.
    """
    layers = list(layers)
    found = [mlp for layer in layers for name in NAMES if (mlp := getattr(layer, name, None)) is not None]
    if not found:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "this architecture"
        raise InputError(f"{SETTING}: {kinds} has no MLP of its own that could be read in tiles; remove it")
    for mlp in found:
        mlp.forward = partial(_tiled, mlp.forward, tokens)


def _tiled(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor, *more: Any, **named: Any) -> Tensor:
    """What `forward` makes of hidden states (..., H), by tiles of (1, tokens, H)."""
    if more or named:
        raise InputError(f"{SETTING}: an MLP of this architecture reads more than hidden states; remove it")

    positions = hidden.reshape(-1, hidden.shape[-1])
    made = [_read(forward, tile[None]) for tile in positions.split(tokens)]
    return torch.cat(made, dim=1).reshape(hidden.shape)


def _read(forward: Callable[[Tensor], Tensor], tile: Tensor) -> Tensor:
    found = checkpoint(forward, tile, use_reentrant=False)
    if not isinstance(found, Tensor) or found.shape != tile.shape:
        raise InputError(f"{SETTING}: an MLP of this architecture gives more than hidden states; remove it")
    return found
