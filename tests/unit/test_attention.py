"""Packed attention's index arithmetic: FlashAttention's way with its kernel replaced by plain attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rdpo.modeling import attention
from rdpo.modeling.layout import Span

SPANS = (Span(0, 3, (2, 4)), Span(9, 1, (1, 1)), Span(12, 5, (2, 3, 1)))
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def plain_varlen(query, key, value, query_bounds, key_bounds, most_queries, most_keys, *, scale, window_size):
    """What torch's kernel computes: each sequence's queries are the last ones of its keys."""
    outputs = []
    assert most_queries == query_bounds.diff().max() and most_keys == key_bounds.diff().max()
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    for number in range(len(query_bounds) - 1):
        queries = query[query_bounds[number] : query_bounds[number + 1]].transpose(0, 1)
        own = slice(key_bounds[number], key_bounds[number + 1])
        keys, values = (side[own].transpose(0, 1) for side in (key, value))
        distance = torch.arange(keys.shape[1])[-queries.shape[1] :, None] - torch.arange(keys.shape[1])
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        output = scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_by_sequence_equals_attention_by_span(window):
    torch.manual_seed(0)
    length, placed = SPANS[-1].end, attention.sequences(SPANS, torch.device("cpu"))
    drawn = [torch.randn(1, heads, length, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    ours, theirs = ([side.clone().requires_grad_() for side in drawn] for _ in range(2))

    actual = attention.flash_by_sequence(*ours, placed, scaling=0.3, window=window, kernel=plain_varlen)
    expected = attention.attend_by_span(*theirs, SPANS, scaling=0.3, window=window, softcap=None)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for side, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(side.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size", "softcap", "takes"),
    [
        (torch.bfloat16, 128, None, True),
        (torch.float32, 128, None, False),
        (torch.bfloat16, 128, 50.0, False),
        (torch.bfloat16, 320, None, False),
        (torch.bfloat16, 60, None, False),
    ],
)
def test_flash_attention_takes_what_its_kernels_can(dtype, size, softcap, takes):
    assert attention._flash_takes(torch.zeros(1, 2, 3, size, dtype=dtype), softcap) == takes


def test_a_torch_without_windows_in_its_kernel_falls_back(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal=False: query)
    attention._varlen.cache_clear()
    try:
        assert not attention._flash_takes(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16), None)
    finally:
        attention._varlen.cache_clear()
