"""Attention over packed rows: each answer sees its prompt and itself, as if it stood alone behind it.

Registered with transformers under `NAME`; the model hands `spans` (see `rdpo.modeling.layout`) through
to it. On GPUs it is one FlexAttention call whose block mask leaves out what may not be seen; elsewhere
each sequence is attended on its own, without a mask where it is causal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rdpo.modeling.layout import Span

NAME = "rdpo_packed"
LAYER_TYPES = {"full_attention", "sliding_attention"}


class NotPackable(RuntimeError):
    """The architecture does not hand the packed layout to its attention; train it with layout = "padded"."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    spans: Sequence[Span] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention (1, T, heads, head size) of a packed row; query (1, heads, T, head size).

    Raises:
        NotPackable: the model did not hand the spans through.
    """
    if not spans:
        raise NotPackable(f"{type(module).__name__}: no spans; set training.layout = 'padded'")
    if query.is_cuda:
        output = flex_by_block(query, key, value, tuple(spans), scaling, sliding_window, softcap)
        return output.transpose(1, 2).contiguous(), None
    return attend_by_span(query, key, value, spans, scaling, sliding_window, softcap), None


def attend_by_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[Span],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention (1, T, heads, head size), span by span; the prompt goes along with the first answer.

    Key and value may have fewer heads; spans cover all of T.
    """
    # The query heads that share a key head side by side: (kv heads, heads for each, T, head size).
    queries = query[0].unflatten(0, (key.shape[1], -1))
    keys, values = (side[0].unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for side in (key, value))
    # In one split, for the gradient of each slice would be a row of zeros as long as T.
    sizes = [size for span in spans for size in (span.prompt + span.answers[0], *span.answers[1:])]
    pieces = zip(*(side.split(sizes, 2) for side in (queries, keys, values)), strict=True)
    parts = []
    for span in spans:
        query, key, value = next(pieces)
        parts.append(_attend(query, key, value, scaling, window, softcap))
        shared = key[:, :, : span.prompt], value[:, :, : span.prompt]
        for query, *own in islice(pieces, len(span.answers) - 1):
            key, value = (torch.cat(both, 2) for both in zip(shared, own, strict=True))
            parts.append(_attend(query, key, value, scaling, window, softcap))
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts]).flatten(1, 2)[None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of the last queries of a sequence to all its keys; heads in one dimension or two."""
    queries, keys = query.shape[2], key.shape[2]
    reach = keys if window is None else window
    if not softcap and queries == keys and reach >= keys:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    position = torch.arange(keys, device=query.device)
    distance = position[keys - queries :, None] - position
    mask = (distance >= 0) & (distance < reach)
    if not softcap:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def visible(spans: Sequence[Span], window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's mask function of a packed row: whether the token at `q` sees the one at `kv`."""
    group, part, position = (torch.tensor(column, device=device) for column in zip(*_tokens(spans), strict=True))

    def mask(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = (group[q] == group[kv]) & (q >= kv) & ((part[kv] == 0) | (part[kv] == part[q]))
        return seen if window is None else seen & (position[q] - position[kv] < window)

    return mask


def _tokens(spans: Sequence[Span]) -> list[tuple[int, int, int]]:
    """Of each token of a packed row: its span, its part (0 is the prompt), its position."""
    tokens = []
    for group, span in enumerate(spans):
        tokens += [(group, 0, position) for position in range(span.prompt)]
        for part, length in enumerate(span.answers, start=1):
            tokens += [(group, part, span.prompt + position) for position in range(length)]
    return tokens


@lru_cache(maxsize=4)
def _block_mask(spans: tuple[Span, ...], window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    length = spans[-1].end
    # Uncompiled it would hold the whole T x T mask.
    compiled = device.type == "cuda"
    return create_block_mask(visible(spans, window, device), None, None, length, length, device, _compile=compiled)


@lru_cache(maxsize=1)
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def flex_by_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: tuple[Span, ...],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention (1, heads, T, head size) in one FlexAttention call; key and value may have fewer heads."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    attend = _flex_attention(compiled=query.is_cuda)
    return attend(
        query,
        key,
        value,
        score_mod=capped if softcap else None,
        block_mask=_block_mask(spans, window, query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def can_pack(model: Any) -> bool:
    """Whether an architecture's layers see tokens through a replaceable, causal, positioned attention alone."""
    config, base = model.config.get_text_config(), model.base_model
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and not config.is_encoder_decoder
        and layers <= LAYER_TYPES
        and "position_ids" in inspect.signature(base.forward).parameters
        and not any("sinks" in name for name, _ in base.named_parameters())
    )


def register() -> None:
    """Make the attention known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
