"""Packed attention on a GPU against attention span by span in float32: values and gradients."""

import random

import pytest
import torch

from rdpo.modeling.attention import attend_by_span, flash_by_sequence, flex_by_block, sequences
from rdpo.modeling.layout import Span

pytestmark = pytest.mark.gpu

BF16_ERROR = 2e-2
LLAMA, GEMMA, SMALL = (32, 8, 128), (16, 8, 256), (9, 3, 64)
"""Query heads, key heads, head size."""


def spans_of(length, draw):
    """Random prompts with two answers each that fill `length` tokens."""
    spans, start = [], 0
    while start < length:
        left = length - start
        parts = [draw.randint(1, 300) for _ in range(3)]
        if sum(parts) > left:
            if left < 3:
                break
            parts = [left // 3, left // 3, left - 2 * (left // 3)]
        spans.append(Span(start, parts[0], (parts[1], parts[2])))
        start += sum(parts)
    return tuple(spans)


def relative_error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def errors(attend, shape, spans, *settings):
    """Relative errors of the output and of the gradients of query, key and value, in bfloat16."""
    heads, key_heads, size = shape
    length = spans[-1].end
    torch.manual_seed(length)
    drawn = [torch.randn(1, count, length, size, device="cuda") for count in (heads, key_heads, key_heads)]
    low = [one.to(torch.bfloat16).requires_grad_() for one in drawn]
    high = [one.detach().float().requires_grad_() for one in low]

    ours = attend(*low, spans, None, *settings)
    weight = torch.randn_like(ours, dtype=torch.float32)
    (ours.float() * weight).sum().backward()

    window, softcap = (*settings, None)[:2]
    reference = attend_by_span(*high, spans, scaling=None, window=window, softcap=softcap)
    (reference * weight).sum().backward()
    gradients = (relative_error(one.grad, other.grad) for one, other in zip(low, high, strict=True))
    return [relative_error(ours, reference), *gradients]


def flash(query, key, value, spans, scaling, window):
    return flash_by_sequence(query, key, value, sequences(spans, query.device), scaling=scaling, window=window)


def flex(query, key, value, spans, scaling, window, softcap):
    return flex_by_block(query, key, value, spans, scaling=scaling, window=window, softcap=softcap).transpose(1, 2)


@pytest.mark.parametrize("length", [97, 129, 1000, 8191])
@pytest.mark.parametrize("window", [None, 100])
def test_flash_attention_by_sequence(length, window):
    spans = spans_of(length, random.Random(length))
    assert max(errors(flash, LLAMA, spans, window)) < BF16_ERROR


def test_flash_attention_takes_ever_other_lengths():
    draw = random.Random(0)
    for _ in range(30):
        spans = spans_of(draw.randint(40, 6000), draw)
        assert max(errors(flash, SMALL, spans, None)) < BF16_ERROR


@pytest.mark.parametrize("length", [129, 4000])
def test_flex_attention_with_a_window_and_capped_scores(length):
    spans = spans_of(length, random.Random(length))
    assert max(errors(flex, GEMMA, spans, 512, 50.0)) < BF16_ERROR


def test_flex_attention_takes_ever_other_lengths_without_a_recompilation_given_up():
    draw = random.Random(1)
    for _ in range(20):
        spans = spans_of(draw.randint(40, 6000), draw)
        assert max(errors(flex, SMALL, spans, None, None)) < BF16_ERROR
