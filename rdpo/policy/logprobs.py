"""Log-probs of completion tokens from hidden states, in chunks.

Only positions that predict a completion token pass through the head, and of those at most `chunk`
have logits at a time, forward and backward: the head's chunks are recomputed in the backward pass.
Logits are taken to fp32 before the softmax. The head is called as a module, so that ZeRO-3 gathers
its partitioned (and possibly tied) weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def token_logps(hidden: Tensor, labels: Tensor, head: nn.Module, chunk: int, softcap: float | None) -> Tensor:
    """Log-probs (C,) in fp32 of `labels` (C,) under the head's softmax over `hidden` (C, H)."""
    parts = []
    for states, ids in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logps, states, ids, head, softcap, use_reentrant=False))
        else:
            parts.append(_chunk_logps(states, ids, head, softcap))
    return torch.cat(parts)


def _chunk_logps(states: Tensor, ids: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    logits = head(states).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)


def sum_by_sequence(logps: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums (S,) of token log-probs (C,) over each sequence's completion."""
    return logps.new_zeros(num_sequences).index_add(0, sequence, logps)
