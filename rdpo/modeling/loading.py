"""Whether a checkpoint is what its architecture expects: its tensors by name and shape, its token ids, its positions.

transformers draws at random what a checkpoint lacks, leaves aside what it has too much, and only warns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rdpo.errors import InputError

UNUSED = re.compile(r"(^|\.)(lm_head\.|rotary_emb\.inv_freq$|position_ids$|attn\.(masked_)?bias$)")
"""Tensors that older checkpoints hold, or those of a language model, and that nothing is computed with."""
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
SHOWN = 3


def check_loaded(where: str, model: Any, info: Mapping[str, Any]) -> None:
    """Compare the tensors of a checkpoint with those of its architecture.

    Args:
        where: what the message begins with: the setting, and the model's name.
        model: the model, its tensors on any device, `meta` included.
        info: what `from_pretrained(..., output_loading_info=True)` gave beside it.

    Raises:
        InputError: tensors are missing, have another shape, or are not used; with their numbers and names.
    """
    total, architecture = len(model.state_dict()), type(model).__name__
    missing = sorted(info["missing_keys"])
    unused = sorted(name for name in info["unexpected_keys"] if not UNUSED.search(name))
    wrong = [f"{name} {tuple(stored)} for {tuple(wanted)}" for name, stored, wanted in sorted(info["mismatched_keys"])]

    found = []
    if missing:
        found.append(f"{_are(missing)} not in the weights and would be random: {_named(missing)}")
    if wrong:
        found.append(f"{_are(wrong)} stored in another shape: {_named(wrong)}")
    if unused:
        found.append(f"{_are(unused)} stored that it has no place for: {_named(unused)}")
    if found:
        advice = "give a checkpoint that was saved by this architecture, whole"
        raise InputError(f"{where}: of the {total} tensors of {architecture}, {'; '.join(found)}; {advice}")


def _are(names: Collection[str]) -> str:
    return f"{len(names)} {'is' if len(names) == 1 else 'are'}"


def _named(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def check_token_ids(where: str, model: Any, tokenizer: Any) -> None:
    """Compare the tokenizer's ids with the rows of the embedding.

    Raises:
        InputError: there are ids beyond it.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        beyond = sum(token >= rows for token in tokenizer.get_vocab().values())
        raise InputError(
            f"{where}: the embedding has {rows} rows, and {beyond} ids of the tokenizer, up to {highest}, lie beyond; "
            "give the tokenizer that the model was trained with, or a model whose embedding was resized"
        )


def positions_of(model: Any) -> int | None:
    """Most tokens that a model has positions for; None where its configuration sets no limit.

    RoBERTa and its kin count positions from behind the padding's, so that their table holds a few more.
    """
    from torch import nn

    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [named] if isinstance(named, int) and named > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - before)
    return min(limits, default=None)
