"""Packed attention's index arithmetic: FlashAttention's way with its kernel replaced by plain attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma2Config, LlamaConfig

from rdpo.modeling import attention
from rdpo.modeling.attention import card_fault, flash_takes, flex_fits
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


KIB = 1024
SHARED = {"A10, L4, L40S, RTX 4090": 99 * KIB, "A100": 163 * KIB, "H100": 227 * KIB}
FITS = {
    ("A10, L4, L40S, RTX 4090", 2): {64: True, 96: True, 128: True, 192: False, 256: False, 512: False},
    ("A10, L4, L40S, RTX 4090", 4): {64: True, 96: False, 128: False, 256: False},
    ("A100", 2): {128: True, 192: True, 256: True, 512: False},
    ("A100", 4): {64: True, 128: True, 256: True},
    ("H100", 2): {128: True, 256: True, 512: True},
    ("H100", 4): {128: True, 256: True},
}


@pytest.mark.parametrize("card", FITS, ids=str)
def test_flex_attention_fits_a_card_by_its_heads_and_its_shared_memory(card):
    name, item_bytes = card
    assert {size: flex_fits(size, SHARED[name], item_bytes) for size in FITS[card]} == FITS[card]


def test_the_figure_of_pytorchs_issue():
    """Heads of 256 in bfloat16 ask for 147,456 bytes."""
    assert flex_fits(256, 147_456) and not flex_fits(256, 147_455)


def test_a_card_is_asked_only_for_what_flash_attention_does_not_do():
    """Gemma 2 caps its scores, and has heads of 256; Gemma 3 does not cap them."""
    small, large = 99 * KIB, 227 * KIB
    gemma2 = Gemma2Config(head_dim=256, attn_logit_softcapping=50.0)
    plain = Gemma2Config(head_dim=256, attn_logit_softcapping=None)
    fault = card_fault(gemma2, torch.bfloat16, small)
    assert fault == "heads of 256 in bfloat16 take more shared memory than the 99 KiB of this card"
    assert card_fault(gemma2, torch.bfloat16, large) == card_fault(gemma2, torch.bfloat16, None) == ""
    assert bool(card_fault(plain, torch.bfloat16, small)) == (not flash_takes(256, torch.bfloat16, None))
    llama = LlamaConfig(hidden_size=512, num_attention_heads=4)
    assert "heads of 128 in float32" in card_fault(llama, torch.float32, small)
