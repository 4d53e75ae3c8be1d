"""Log-probs of completion tokens from hidden states, without holding the logits.

Only positions that predict a completion token pass through the head, and of those at most `chunk`
have logits at a time, forward and backward: the backward pass makes a chunk's logits again and turns
them into their gradient in place. Beyond that only the log-sum-exp (C,) is kept. The softmax, its
sums and the head's gradient are in fp32 whatever the model's precision.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class CompletionHead(nn.Module):
    """A causal model's output layer as a function to log-probs.

    It holds the same parameters as the model's own layer (tied or not), so that ZeRO-3 gathers them
    around this module's forward and backward.
    """

    def __init__(self, output: nn.Module, chunk: int, scale: float = 1.0, softcap: float | None = None):
        super().__init__()
        if type(output) is not nn.Linear and getattr(output, "weight", None) is None:
            raise TypeError(f"the output layer {type(output).__name__} has no weight of its own to multiply with")
        self.weight = cast(Tensor, output.weight)
        self.bias: Tensor | None = getattr(output, "bias", None)
        self.chunk, self.scale, self.softcap = chunk, scale, softcap

    def forward(self, hidden: Tensor, labels: Tensor, squares: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probs (C,) in fp32 of `labels` (C,) given hidden states (C, H).

        With `squares` also log sum_v pi_v^2 (C,) over the vocabulary, without a gradient.
        """
        found: Tensor | tuple[Tensor, Tensor] = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, labels, self.chunk, self.scale, self.softcap, squares
        )
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits (C, vocabulary) in fp32: for a few positions only."""
        return _logits(hidden, self.weight, self.bias, self.scale, self.softcap)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = linear(hidden, weight, bias).float()
    # In place: a copy of a chunk's logits is as large as they are.
    if scale != 1.0:
        logits *= scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(scaled, capped hidden @ weight.T + bias) at the labels, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
        squares: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        normalisers, picked, doubled = [], [], []
        # Only numbers of size (C,) outlive an iteration; the logits are made again on the way back.
        for states, ids in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            logits = _logits(states, weight, bias, scale, softcap)
            picked.append(logits.gather(1, ids[:, None])[:, 0])
            normalisers.append(logits.logsumexp(1))
            if squares:
                doubled.append(logits.mul_(2).logsumexp(1))
        normaliser = torch.cat(normalisers)
        ctx.save_for_backward(hidden, weight, bias, labels, normaliser)
        ctx.settings = (chunk, scale, softcap)
        logps = torch.cat(picked) - normaliser
        if not squares:
            return logps

        # pi = exp(x - normaliser), so log sum pi^2 = logsumexp(2 x) - 2 normaliser.
        log_squares = torch.cat(doubled) - 2 * normaliser
        ctx.mark_non_differentiable(log_squares)
        return logps, log_squares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normaliser = ctx.saved_tensors
        chunk, scale, softcap = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None

        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            states = hidden[part]
            logits = _logits(states, weight, bias, scale, softcap)
            # d cap * tanh(x / cap) / dx = 1 - tanh(x / cap)^2; before the logits' memory is used for the gradient.
            slope = scale * (1 - (logits / softcap).square()) if softcap else scale
            change = _logits_gradient(logits, labels[part], normaliser[part], gradients[0][part])
            change = (change.mul_(slope) if softcap or scale != 1.0 else change).to(hidden.dtype)

            if grad_hidden is not None:
                torch.mm(change, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += change.T @ states
            if grad_bias is not None:
                grad_bias += change.sum(0, dtype=torch.float32)

        # One for each argument of `forward`; labels, chunk, scale, cap and squares have none.
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _logits_gradient(logits: Tensor, labels: Tensor, normaliser: Tensor, gradient: Tensor) -> Tensor:
    """d(sum of gradient * log-probs) / d logits, in the logits' own memory."""
    change = logits.sub_(normaliser[:, None]).exp_().mul_(-gradient[:, None])
    return change.scatter_add_(1, labels[:, None], gradient[:, None].to(change.dtype))


def sum_by_sequence(logps: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums (S,) of token log-probs (C,) over each sequence's completion."""
    return logps.new_zeros(num_sequences).index_add(0, sequence, logps)
