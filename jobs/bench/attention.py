"""Packed attention's ways on one GPU, forward and backward, at the shape of an 8B Llama: milliseconds for each.

python jobs/bench/attention.py [--tokens 8192] [--pairs 16]

`flash`: FlashAttention over gathered sequences; `flex`: compiled FlexAttention with a block mask; `whole`: one causal
sequence of all tokens through scaled_dot_product_attention, which computes more than is asked for and is no rival but a
measure.
"""

import argparse
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from rdpo.modeling.attention import flash_by_sequence, flex_by_block, sequences
from rdpo.modeling.layout import Span

HEADS, KEY_HEADS, SIZE = 32, 8, 128
ROUNDS = 10


def spans_of(tokens, pairs):
    """Equal spans, a third of each a prompt and a third each answer."""
    part = tokens // pairs // 3
    return tuple(Span(index * 3 * part, part, (part, part)) for index in range(pairs))


def milliseconds(attend, spans):
    """Median time of forward and backward."""
    length = spans[-1].end
    counts = (HEADS, KEY_HEADS, KEY_HEADS)
    sides = [
        torch.randn(1, length, count, SIZE, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for count in counts
    ]
    seconds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        output = attend(*sides)
        output.backward(torch.ones_like(output))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1e3 * sorted(seconds)[ROUNDS // 2]


def main():
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    spans = spans_of(options.tokens, options.pairs)
    placed = sequences(spans, torch.device("cuda"))
    ways = {
        "flash": lambda q, k, v: flash_by_sequence(q, k, v, placed, scaling=None, window=None),
        "flex": lambda q, k, v: flex_by_block(q, k, v, spans, scaling=None, window=None, softcap=None),
        "whole": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    for name, attend in ways.items():
        print(
            f"attention {name:<6} {spans[-1].end} tokens, {options.pairs} pairs: {milliseconds(attend, spans):.2f} ms"
        )


if __name__ == "__main__":
    main()
