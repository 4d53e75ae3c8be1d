"""The arithmetic of a training step: what it needs, and what a device gives.

Counted as the field does for model FLOPs utilisation: the products of forward and backward on real tokens, a
prompt once where it is computed once; nothing for recomputed activations, norms, softmax or the optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rdpo.modeling.model import Policy
from rdpo.modeling.packing import PairSize

MATMUL_ROWS = 2048
MATMUL_REPEATS = 20
MATMUL_ROUNDS = 5


@dataclass(frozen=True)
class Arithmetic:
    """A policy's products: weight elements of its layers and of its head, and its attention's width.

    `attention` is layers x heads x head size; `frozen` says that no weight gradients are made (LoRA).
    """

    layers: int
    head: int
    attention: int
    frozen: bool

    @classmethod
    def of(cls, policy: Policy) -> Arithmetic:
        """Counted from the linear layers, whatever ZeRO partitioned; not for experts, of which few are active."""
        head = policy.head.weight
        # By features, not by elements: of a partitioned weight this worker may hold none.
        linear = [module for module in policy.model.modules() if isinstance(module, nn.Linear)]
        inner = [module for module in linear if module.weight is not head]
        # A model of other names is trained all the same, and counts without its attention.
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        vocabulary, hidden, depth, heads = (getattr(policy.config, name, 0) for name in names)

        head_size = getattr(policy.config, "head_dim", None) or hidden // max(heads, 1)
        return cls(
            layers=sum(module.in_features * module.out_features for module in inner),
            head=vocabulary * hidden,
            attention=depth * heads * head_size,
            frozen=policy.adapted,
        )

    def flops(self, sizes: Sequence[PairSize], packed: bool) -> float:
        """FLOPs of forward and backward over pairs."""
        passes = 2 if self.frozen else 3
        tokens = sum(size.packed if packed else size.tokens for size in sizes)
        answers = sum(sum(size.answers) for size in sizes)
        seen = sum(_seen(size, packed) for size in sizes)
        return 2.0 * passes * (self.layers * tokens + self.head * answers) + 3 * 4.0 * self.attention * seen


def _seen(size: PairSize, packed: bool) -> float:
    """Pairs of a query and a key that it sees, over all answers."""
    prompt, answers = size.prompt, size.answers
    once = prompt**2 / 2 * (1 if packed else len(answers))
    return once + sum(answer * (prompt + answer / 2) for answer in answers)


def matmul_rate(hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large product of the model's shape on this device, the best of a few rounds."""
    one = torch.randn(MATMUL_ROWS, hidden, dtype=dtype, device=device)
    other = torch.randn(hidden, inner, dtype=dtype, device=device)

    best = 0.0
    for _ in range(MATMUL_ROUNDS):
        began = time.perf_counter()
        for _ in range(MATMUL_REPEATS):
            one @ other
        # Products on a GPU are only queued until then.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, MATMUL_REPEATS * 2 * MATMUL_ROWS * hidden * inner / (time.perf_counter() - began))
    return best
