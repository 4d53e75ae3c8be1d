"""Attention over packed rows: each answer sees its prompt and itself, as if it stood alone behind it.

Registered with transformers under `NAME`; the model hands the row (see `rdpo.modeling.layout.PackedRow`) through
to it. Three ways compute the same:

- On GPUs in half precision, FlashAttention over sequences of unequal length: each answer's queries against the keys of
  its prompt and its own, which are gathered for it. Nothing is compiled, so lengths may change from row to row.
- On GPUs otherwise (float32, capped scores), one FlexAttention call whose block mask leaves out what may not be seen.
- Elsewhere each sequence is attended on its own, without a mask where it is causal.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rdpo.modeling.layout import PackedRow, Span

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "rdpo_packed"
LAYER_TYPES = {"full_attention", "sliding_attention"}
ATTENTION_DROPOUT = re.compile(r"att(n|ention)\w*drop")
FLASH_HEAD_SIZE = 256
"""The widest head that FlashAttention 2 has kernels for."""
SHAPES_COMPILED = 64
"""How many variants of FlexAttention may be compiled: beyond its own limit torch would go on uncompiled without a word,
and hold scores of T x T."""


FLEX_ROWS = {2: ((128, 384), (256, 288), (None, 192)), 4: ((64, 256), (128, 320), (256, 160), (None, 320))}
"""Rows of queries, keys and values that a kernel of FlexAttention holds at a time, by the bytes of a number and the
widest head: the most of torch 2.13's tiles for cards from Ampere on (`torch._inductor.template_heuristics`)."""


class NotPackable(RuntimeError):
    """The architecture does not hand the packed layout to its attention; train it with layout = "padded"."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    row: PackedRow | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention (1, T, heads, head size) of a packed row; query (1, heads, T, head size).

    Raises:
        NotPackable: the model did not hand the row through, or wants dropout, which is not made here.
    """
    if row is None:
        raise NotPackable(f"{type(module).__name__}: no packed row; set training.layout = 'padded'")
    if dropout:
        raise NotPackable(f"{type(module).__name__}: dropout of attention; set training.layout = 'padded'")
    spans = row.spans
    if not query.is_cuda:
        output = attend_by_span(query, key, value, spans, scaling=scaling, window=sliding_window, softcap=softcap)
        return output, None

    if _flash_takes(query, softcap):
        placed = _placed(spans, query.device)
        return flash_by_sequence(query, key, value, placed, scaling=scaling, window=sliding_window), None

    output = flex_by_block(query, key, value, spans, scaling=scaling, window=sliding_window, softcap=softcap)
    return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Sequences:
    """The N sequences (a prompt with one answer) of a packed row, as FlashAttention reads them.

    The queries of all sequences, one after the other, are the row itself: a span's first sequence is its prompt and
    first answer, each further one is an answer alone. The keys of sequence n are those at
    `key_at[key_bounds[n] : key_bounds[n + 1]]` of the row: its whole prompt, then its answer. Bounds: (N + 1,), int32.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    key_at: Tensor
    most_queries: int
    most_keys: int


def sequences(spans: Sequence[Span], device: torch.device) -> Sequences:
    """Where the queries and keys of each sequence of a packed row stand."""
    queries, keys, places = [], [], []

    for span in spans:
        prompt = torch.arange(span.start, span.start + span.prompt)

        for number, (start, length) in enumerate(zip(span.answer_starts(), span.answers, strict=True)):
            queries.append(length if number else span.prompt + length)
            keys.append(span.prompt + length)
            places += [prompt, torch.arange(start, start + length)]

    return Sequences(
        query_bounds=_bounds(queries).to(device),
        key_bounds=_bounds(keys).to(device),
        key_at=torch.cat(places).to(device),
        most_queries=max(queries),
        most_keys=max(keys),
    )


# All layers of a forward ask for the same.
_placed = lru_cache(maxsize=4)(sequences)


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)


def _flash_takes(query: Tensor, softcap: float | None) -> bool:
    return flash_takes(query.shape[-1], query.dtype, softcap)


def flash_takes(size: int, dtype: torch.dtype, softcap: float | None) -> bool:
    """Whether FlashAttention computes heads of a size: it has no float32 and no cap on scores."""
    fits = size % 8 == 0 and size <= FLASH_HEAD_SIZE
    return fits and not softcap and dtype in (torch.bfloat16, torch.float16) and _varlen() is not None


def flex_fits(head_size: int, shared_memory: int, item_bytes: int = 2) -> bool:
    """Whether FlexAttention's kernels fit on a card, in bytes of shared memory that one block may have there.

    Cards of workstations have 99 KiB, where an A100 has 163 and an H100 227: heads above 128 do not fit (pytorch's
    issue 133254 has the same figure, 147,456 bytes for 256).
    """
    rows = next(rows for widest, rows in FLEX_ROWS[item_bytes] if widest is None or head_size <= widest)
    # A head is read as wide as the next power of two.
    return rows * (1 << (head_size - 1).bit_length()) * item_bytes <= shared_memory


def card_fault(config: PretrainedConfig, dtype: torch.dtype, shared_memory: int | None) -> str:
    """Why a card cannot read packed rows of an architecture; empty if it can, or if that is not known of the card.

    Args:
        config: the architecture's.
        dtype: precision of its forward.
        shared_memory: bytes that one block may have on the card; None if they are not known, or on a CPU.
    """
    text = config.get_text_config()
    capped, size = getattr(text, "attn_logit_softcapping", None), head_size(text)
    if shared_memory is None or flash_takes(size, dtype, capped) or flex_fits(size, shared_memory, dtype.itemsize):
        return ""
    return (
        f"heads of {size} in {str(dtype).removeprefix('torch.')} take more shared memory than the "
        f"{shared_memory / 1024:.0f} KiB of this card"
    )


def head_size(config: PretrainedConfig) -> int:
    """The widest head of an architecture."""
    named = [getattr(config, name, None) for name in ("head_dim", "global_head_dim")]
    sizes = [size for size in named if isinstance(size, int) and size > 0]
    return max(sizes) if sizes else int(config.hidden_size) // int(config.num_attention_heads)


@lru_cache(maxsize=1)
def _varlen() -> Callable[..., Any] | None:
    """torch's attention over sequences of unequal length; None where this torch has none that takes a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None

    # Newer versions want to be told that query heads share key heads; older ones take it as it is.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def flash_by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    placed: Sequences,
    *,
    scaling: float | None,
    window: int | None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention (1, T, heads, head size) by FlashAttention, or by a `kernel` of its form; keys may have fewer heads.

    A query that is the i-th from the end of its sequence sees all keys but the last i, which is causal for whole
    sequences and for answers behind their prompt alike.
    """
    attend = kernel or _varlen()
    if attend is None:
        raise RuntimeError("this torch has no attention over sequences of unequal length")

    keys, values = (side[0].transpose(0, 1).index_select(0, placed.key_at) for side in (key, value))
    output: Tensor = attend(
        query[0].transpose(0, 1),
        keys,
        values,
        placed.query_bounds,
        placed.key_bounds,
        placed.most_queries,
        placed.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output[None]


def attend_by_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[Span],
    *,
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
    sizes: list[int] = []
    for span in spans:
        sizes += [span.prompt + span.answers[0], *span.answers[1:]]
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
    # Without a mask PyTorch's fused kernels do it, whose `is_causal` lines up first queries with first keys.
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
    tokens: list[tuple[int, int, int]] = []
    for group, span in enumerate(spans):
        tokens += [(group, 0, position) for position in range(span.prompt)]
        for part, length in enumerate(span.answers, start=1):
            tokens += [(group, part, span.prompt + position) for position in range(length)]
    return tokens


@lru_cache(maxsize=4)
def _block_mask(spans: tuple[Span, ...], window: int | None, device: torch.device) -> BlockMask:
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
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention (1, heads, T, head size) in one FlexAttention call; key and value may have fewer heads."""
    with _compiled_or_refused():
        attend = _flex_attention(compiled=query.is_cuda)
        output: Tensor = attend(
            query,
            key,
            value,
            score_mod=_capped(softcap) if softcap else None,
            block_mask=_block_mask(spans, window, query.device),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output


def _capped(cap: float) -> Callable[..., Tensor]:
    """FlexAttention's score function of an architecture that bounds its scores."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _compiled_or_refused() -> AbstractContextManager[object]:
    """Within this context a recompilation that torch would give up on is an error."""
    import torch._dynamo

    patched: AbstractContextManager[object] = torch._dynamo.config.patch(
        recompile_limit=SHAPES_COMPILED, fail_on_recompile_limit_hit=True
    )
    return patched


def can_pack(model: PreTrainedModel) -> bool:
    """Whether an architecture's layers see tokens through a replaceable, causal, positioned attention alone."""
    config, base = model.config.get_text_config(), model.base_model
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        dropout_of(config) is None
        and bool(getattr(model, "_supports_attention_backend", False))
        and not config.is_encoder_decoder
        and layers <= LAYER_TYPES
        and "position_ids" in inspect.signature(base.forward).parameters
        and not any("sinks" in name for name, _ in base.named_parameters())
        # A convolution along a row would run from one sequence into the next.
        and not any(isinstance(module, nn.Conv1d) for module in base.modules())
    )


def dropout_of(config: PretrainedConfig) -> str | None:
    """The setting by which an architecture drops attention weights in training, if it does."""
    shares = config.to_dict().items()
    named = (name for name, share in shares if ATTENTION_DROPOUT.search(name) and isinstance(share, float) and share)
    return next(named, None)


def register() -> None:
    """Make the attention known to transformers."""
    from transformers import AttentionInterface

    # What is compiled around it stops here: of each row's own spans there would be too many variants.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
