"""Tokens of a pair's answers that count more or less than others in their log-probs, policy's and reference's alike.

log p_w(y|x) = sum of w_t log pi(y_t|x, y_<t) over the tokens that count. All w_t are 1 by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from rdpo.config import TokenWeights
from rdpo.modeling.masking import counted_ids


def pair_weights(
    chosen: Sequence[int], rejected: Sequence[int], settings: TokenWeights
) -> tuple[list[float], list[float]]:
    """Weights of the tokens that count of both answers of a pair, given as token ids."""
    sides = counted_ids(chosen), counted_ids(rejected)
    if settings.kind == "ld_dpo":
        # LD-DPO (arXiv 2409.06411): what an answer has beyond the length of the other one.
        shorter = min(map(len, sides))
        first, second = ([1.0] * min(len(ids), shorter) + [settings.weight] * (len(ids) - shorter) for ids in sides)
        return first, second

    # DDPO (RLHF-V, arXiv 2312.00849): what a revision has changed. No token is junk: all are compared.
    first, second = ([settings.weight] * len(ids) for ids in sides)
    for block in SequenceMatcher(None, *sides, autojunk=False).get_matching_blocks():
        first[block.a : block.a + block.size] = [1.0] * block.size
        second[block.b : block.b + block.size] = [1.0] * block.size
    return first, second
