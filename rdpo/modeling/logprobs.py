"""Log-probs of completion tokens from hidden states, without holding the logits.

Only positions that predict a completion token pass through the head, and of those at most `chunk`
have logits at a time. What is kept for the backward pass depends on whether the head is trained:

- It is: the log-sum-exp (C,). The backward pass makes a chunk's logits again and turns them into their gradient in
  place.
- It is frozen, as under adapters: the gradient (C, H) of each log-prob with respect to its hidden state, in place of
  the hidden states. It is made from the logits while they are there, and the backward pass only multiplies it, so that
  the head's product with the vocabulary is taken twice and not three times.

The softmax, its sums and the head's gradient are in fp32 whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class _Arithmetic:
    """How logits come of the output layer's product, and how many of them at a time.

    `read` and `change` are functions of this module, or what torch compiled of them.
    """

    chunk: int
    scale: float
    softcap: float | None
    read: Callable[..., _Read]
    change: Callable[..., Tensor]


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
        self.arithmetic = _Arithmetic(chunk, scale, softcap, _read, _change)

    def compile_chunks(self, backend: str = "inductor") -> None:
        """Let torch compile what is done to a chunk's logits, at its first forward, for all lengths at once."""
        read = torch.compile(_read, dynamic=True, backend=backend)
        change = torch.compile(_change, dynamic=True, backend=backend)
        self.arithmetic = replace(self.arithmetic, read=read, change=change)

    def forward(self, hidden: Tensor, labels: Tensor, squares: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probs (C,) in fp32 of `labels` (C,) given hidden states (C, H).

        With `squares` also log sum_v pi_v^2 (C,) over the vocabulary, without a gradient.
        """
        found: Tensor | tuple[Tensor, Tensor] = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, labels, self.arithmetic, squares
        )
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits (C, vocabulary) in fp32: for a few positions only."""
        return _logits(hidden, self.weight, self.bias, self.arithmetic.scale, self.arithmetic.softcap)


class _Read(NamedTuple):
    """What is known of a chunk of C tokens once its logits are gone: numbers (C,) of each, and (C, H)."""

    picked: Tensor
    """Logits of the labels."""
    normaliser: Tensor
    """log sum_v exp(logit_v)."""
    doubled: Tensor | None
    """log sum_v exp(2 logit_v), where it is asked for."""
    by_state: Tensor | None
    """d log-prob / d hidden state, where it is asked for."""


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = linear(hidden, weight, bias).float()
    # In place: a copy of a chunk's logits is as large as they are.
    if scale != 1.0:
        logits *= scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _read(
    states: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    squares: bool,
    by_state: bool,
) -> _Read:
    """Read a chunk's logits."""
    logits = _logits(states, weight, bias, scale, softcap)
    picked = logits.gather(1, labels[:, None])[:, 0]
    normaliser = logits.logsumexp(1)
    doubled = None
    if squares:
        # In place, and back again: exact, since doubling is.
        doubled = logits.mul_(2).logsumexp(1)
        logits.div_(2)
    if not by_state:
        return _Read(picked, normaliser, doubled, None)

    change = _product_gradient(logits, labels, normaliser, torch.ones_like(picked), scale, softcap)
    return _Read(picked, normaliser, doubled, change.to(states.dtype) @ weight)


def _change(
    states: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    normaliser: Tensor,
    gradient: Tensor,
) -> Tensor:
    """The gradient of a chunk's product, see `_product_gradient`; its logits are made again."""
    logits = _logits(states, weight, bias, scale, softcap)
    return _product_gradient(logits, labels, normaliser, gradient, scale, softcap).to(states.dtype)


def _product_gradient(
    logits: Tensor, labels: Tensor, normaliser: Tensor, gradient: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """d(sum of gradient * log-probs) / d(hidden @ weight.T + bias), in the memory of the logits."""
    # d cap * tanh(x / cap) / dx = 1 - tanh(x / cap)^2; before the logits' memory is used for the gradient.
    slope = scale * (1 - (logits / softcap).square()) if softcap else scale
    change = logits.sub_(normaliser[:, None]).exp_().mul_(-gradient[:, None])
    change.scatter_add_(1, labels[:, None], gradient[:, None].to(change.dtype))
    return change.mul_(slope) if softcap or scale != 1.0 else change


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(scaled, capped hidden @ weight.T + bias) at the labels, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        how: _Arithmetic,
        squares: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        reads = [
            how.read(states, ids, weight, bias, how.scale, how.softcap, squares, frozen)
            for states, ids in zip(hidden.split(how.chunk), labels.split(how.chunk), strict=True)
        ]
        normaliser = torch.cat([read.normaliser for read in reads])
        if frozen:
            ctx.save_for_backward(torch.cat([read.by_state for read in reads if read.by_state is not None]))
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, normaliser)
        ctx.how = how

        logps = torch.cat([read.picked for read in reads]) - normaliser
        if not squares:
            return logps

        # pi = exp(x - normaliser), so log sum pi^2 = logsumexp(2 x) - 2 normaliser.
        log_squares = torch.cat([read.doubled for read in reads if read.doubled is not None]) - 2 * normaliser
        ctx.mark_non_differentiable(log_squares)
        return logps, log_squares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_state, *rest = ctx.saved_tensors
        if not rest:
            return ((by_state * gradients[0][:, None]).to(by_state.dtype), *(None,) * 5)

        hidden, weight, bias, labels, normaliser = ctx.saved_tensors
        how = ctx.how
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None

        for start in range(0, len(labels), how.chunk):
            part = slice(start, start + how.chunk)
            states = hidden[part]
            head = (weight, bias, how.scale, how.softcap)
            change = how.change(states, labels[part], *head, normaliser[part], gradients[0][part])
            if grad_hidden is not None:
                torch.mm(change, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += change.T @ states
            if grad_bias is not None:
                grad_bias += change.sum(0, dtype=torch.float32)

        # One for each argument of `forward`; labels, arithmetic and squares have none.
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 3,
        )


def sum_by_sequence(logps: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums (S,) of token log-probs (C,) over each sequence's completion."""
    return logps.new_zeros(num_sequences).index_add(0, sequence, logps)
