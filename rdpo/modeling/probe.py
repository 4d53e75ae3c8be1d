"""A policy's log-probs beside those of the model's own logits, on a few short texts, before they are relied on.

rdpo never makes all logits: it puts the output layer, a factor and a cap on the hidden states that predict answers,
and reads several sequences in one row. Whether an architecture may be read like that is tried, not believed: its own
forward reads each sequence alone, by transformers' plain attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from rdpo.cluster.hardware import shared_memory
from rdpo.errors import InputError
from rdpo.modeling import attention
from rdpo.modeling.loading import learned_positions, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rdpo.config import Layout
    from rdpo.modeling.model import Policy

PROMPTS, ANSWERS = (23, 8), ((13, 5), (9, 16))
"""Lengths of two prompts, and of the first and the second answer to each."""
MIN_LENGTH = 2
SHOWN_CHARS = 120
MACHINE = (torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that say nothing of the model."""
WINDOWS = ("sliding_window", "attention_window_size", "attention_window", "window_size", "attention_chunk_size")
SHORT_WINDOW = 6
TOLERANCE = {torch.float32: 1e-3}
"""Nats of one token, root of the mean square."""
HALF_TOLERANCE, NOISES = 0.2, 3
"""In 16 bits the last places of hidden states and logits depend on the kernels, and experts may be chosen otherwise:
the least tolerance there, and how many times the distance between two ways of transformers' own."""


@dataclass(frozen=True)
class ReadAs:
    """The layout in which a policy's log-probs are those of its own logits, to within so many nats a token."""

    layout: Literal["packed", "padded"]
    within: float
    packable: bool
    """Whether packed rows are exact too."""
    why: str = ""
    """Why they are not, where they were tried."""


@dataclass(frozen=True)
class Texts:
    """P prompts with K answers each, as token ids."""

    prompts: list[list[int]]
    answers: list[list[list[int]]]

    def sequences(self) -> Iterator[tuple[list[int], list[int]]]:
        """Each prompt with each answer, in the order of a batch's sequences."""
        for column in self.answers:
            yield from zip(self.prompts, column, strict=True)


def settle_layout(policy: Policy, where: str, layout: Layout = "auto") -> ReadAs:
    """Compare a policy with its own logits; from then on it reads in a layout that is exact, packed where that may be.

    Args:
        policy: in evaluation mode, on its device, its weights whole.
        where: what a message begins with.
        layout: what the job asks for.

    Raises:
        InputError: no layout gives the log-probs of the model's own logits, or not the one that is asked for.
    """
    texts = probe_texts(policy.causal)
    policy.read_as(packed=False)
    with _or_refused(where):
        own = own_logps(policy.causal, texts)
        within = _tolerance(policy, texts, own)

    packable, why = attention.can_pack(policy.causal), ""
    if packable:
        why = attention.card_fault(policy.causal.config, policy.dtype, shared_memory(own.device))
        packable = not why
    if packable:
        policy.read_as(packed=True)
        why = _packed_fault(policy, texts, own, within)
        packable = not why

    if layout == "packed" and not packable:
        raise InputError(f"training.layout: {where} cannot be read in packed rows ({why}); use auto or padded")
    policy.read_as(packable and layout != "padded")
    if policy.packed:
        return ReadAs("packed", within, packable)

    with _or_refused(where):
        difference = distance(policy, texts, own)
    # Not `>`: a difference that is not a number is refused too.
    if not difference <= within:
        raise InputError(
            f"{where}: the log-probs differ by {difference:.2g} nats a token from those of the model's own logits, "
            f"{within:g} is allowed: {type(policy.causal).__name__} makes its logits in a way that rdpo does not know; "
            "use a model of another architecture"
        )
    return ReadAs("padded", within, packable, why)


def _tolerance(policy: Policy, texts: Texts, own: Tensor) -> float:
    if policy.dtype in TOLERANCE:
        return TOLERANCE[policy.dtype]

    labels = own.argmax(-1, keepdim=True)
    otherwise = own_logps(policy.causal, texts, plain=False)
    noise = float((otherwise - own).gather(1, labels).square().mean().sqrt())
    # In steps, so that what is noted of it is the same the next time.
    return max(HALF_TOLERANCE, math.ceil(10 * NOISES * noise) / 10)


def _packed_fault(policy: Policy, texts: Texts, own: Tensor, within: float) -> str:
    """What is wrong with packed rows; nothing if they are right."""
    try:
        difference = distance(policy, texts, own)
        if difference <= within and windows_of(policy.causal):
            # A window is seldom shorter than a probe: it is made so, for the model's own forward too.
            with short_windows(policy.causal):
                difference = distance(policy, texts, own_logps(policy.causal, texts))
    except MACHINE:
        raise
    except Exception as error:
        # What an architecture makes of arguments that it does not know is up to it.
        return in_short(error)
    return "" if difference <= within else f"differ by {difference:.2g} nats a token from the model's own logits"


@contextmanager
def _or_refused(where: str) -> Iterator[None]:
    """Within this context what an architecture does not take is the model's fault."""
    try:
        yield
    except MACHINE:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: it does not read text alone like a language model ({in_short(error)})") from None


def in_short(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN_CHARS]}"


def probe_texts(model: PreTrainedModel) -> Texts:
    """Texts of ordinary tokens, always the same for a model; no longer than it has positions for."""
    rows, avoided = model.config.get_text_config().vocab_size, special_ids(model.config)
    ids = [token for token in range(rows) if token not in avoided] or [*range(rows)]
    # A fixed seed: what is noted of a model must be the same at every look.
    draws, limit = np.random.default_rng(0), learned_positions(model)

    def text(length: int) -> list[int]:
        length = length if limit is None else max(MIN_LENGTH, min(length, limit // 2))
        return [ids[place] for place in draws.integers(len(ids), size=length)]

    return Texts(
        [text(length) for length in PROMPTS],
        [list(map(text, column)) for column in ANSWERS],
    )


def own_logps(model: PreTrainedModel, texts: Texts, plain: bool = True) -> Tensor:
    """Log-probs (C, vocabulary) in fp32 of all tokens, where answers are predicted: by the model's own forward.

    Each sequence is read alone, without padding; `plain`: by the attention that transformers writes out.
    """
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode(), plain_attention(model) if plain else nullcontext():
        for prompt, answer in texts.sequences():
            ids = torch.tensor([[*prompt, *answer]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(torch.log_softmax(logits.float(), -1))
    return torch.cat(found)


def distance(policy: Policy, texts: Texts, own: Tensor) -> float:
    """How far a policy's log-probs are from `own`, in nats of one token (root of the mean square).

    Compared are the tokens that are likeliest by `own`: there numbers in 16 bits are most exact.
    """
    expected, labels = own.max(-1)
    batch = policy.batch(texts.prompts, *texts.answers).to(own.device)
    with torch.inference_mode():
        actual = policy.token_logps(replace(batch, labels=labels))
    return float((actual - expected).square().mean().sqrt())


def policy_logps(policy: Policy, texts: Texts) -> Tensor:
    """The same of a policy as rdpo reads it."""
    batch = policy.batch(texts.prompts, *texts.answers).to(next(policy.parameters()).device)
    with torch.inference_mode():
        states = policy.hidden_states(batch).flatten(0, 1)[batch.predict_at]
        return torch.log_softmax(policy.head.logits(states), -1)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within this context a model reads by the attention that transformers writes out, where it has a choice."""
    kept = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
    except (ValueError, AttributeError):
        # An architecture without a choice.
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(kept)


def windows_of(model: PreTrainedModel) -> list[tuple[object, str, int]]:
    """Where a model keeps the widths of its windows: its configuration and its modules."""
    holders = [model.config.get_text_config(), *model.modules()]
    found = ((holder, name, getattr(holder, name, None)) for holder, name in product(holders, WINDOWS))
    return [(holder, name, width) for holder, name, width in found if type(width) is int and width > 0]


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the windows of a model are shorter than a probe."""
    kept = windows_of(model)
    try:
        for holder, name, width in kept:
            setattr(holder, name, min(width, SHORT_WINDOW))
        yield
    finally:
        for holder, name, width in kept:
            setattr(holder, name, width)
