"""Whether a checkpoint is what its architecture expects: its tensors by name and shape, its token ids, its positions.

transformers draws at random what a checkpoint lacks, leaves aside what it has too much, and only warns.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

UNUSED = re.compile(r"(^|\.)(rotary_emb\.inv_freq$|position_ids$|attn\.(masked_)?bias$)")
"""Tensors that older checkpoints hold, and that nothing is computed with."""
OTHER_HEAD = re.compile(r"(^|\.)lm_head\.")
"""What a model with another head has no use for."""
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")
SPECIAL_ID = re.compile(r"token_(id|index)s?$")
BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change for a whole batch as soon as one of its sequences is long."""
SHOWN = 3


def outline(where: str, auto_class: Any, folder: str | Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """A model without its numbers, and which of its tensors the checkpoint holds; no weights are read.

    Args:
        where: what a message begins with: the setting, and the model's name.
        auto_class: transformers' class that finds the architecture.
        folder: the model's.
        trust_remote_code: whether Python code that ships with it may run.
        options: further arguments of `from_pretrained`.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(
            folder,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{where} cannot be loaded: {str(error).strip().splitlines()[0][:200]}") from None


def architecture_outline(where: str, auto_class: Any, config: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """A model without its numbers as its configuration describes it, whatever its checkpoint holds; not quantised.

    Raises:
        InputError: transformers cannot make it.
    """
    import torch

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    try:
        with torch.device("meta"):
            return auto_class.from_config(plain, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{where} cannot be loaded: {str(error).strip().splitlines()[0][:200]}") from None


def check_loaded(where: str, model: PreTrainedModel, info: Mapping[str, Any], other_head: bool = False) -> None:
    """Compare the tensors of a checkpoint with those of its architecture.

    Args:
        where: what the message begins with: the setting, and the model's name.
        model: the model, its tensors on any device, `meta` included.
        info: what `from_pretrained(..., output_loading_info=True)` gave beside it.
        other_head: the checkpoint may hold the head of a language model, which this model does not have.

    Raises:
        InputError: tensors are missing, have another shape, or are not used; with their numbers and names.
    """
    total, architecture = len(model.state_dict()), type(model).__name__
    missing = sorted(info["missing_keys"])
    unused = sorted(name for name in info["unexpected_keys"] if not UNUSED.search(name))
    unused = [name for name in unused if not (other_head and OTHER_HEAD.search(name))]
    wrong = [f"{name} {tuple(stored)} for {tuple(wanted)}" for name, stored, wanted in sorted(info["mismatched_keys"])]

    found = []
    if missing:
        found.append(f"{_are(missing)} not in the weights and would be random: {named(missing)}")
    if wrong:
        found.append(f"{_are(wrong)} stored in another shape: {named(wrong)}")
    if unused:
        found.append(f"{_are(unused)} stored that it has no place for: {named(unused)}")
    if found:
        advice = "give a checkpoint that was saved by this architecture, whole"
        raise InputError(f"{where}: of the {total} tensors of {architecture}, {'; '.join(found)}; {advice}")


def _are(names: Collection[str]) -> str:
    return f"{len(names)} {'is' if len(names) == 1 else 'are'}"


def named(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def load_whole(folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    """A causal language model of a folder, in evaluation mode.

    Raises:
        InputError: the folder's tensors are not those of its architecture.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(f"model {folder}", model, info)
    loaded: PreTrainedModel = model.eval()
    return loaded


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids a model has a row for."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def check_token_ids(
    where: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, used: Collection[int] | None = None
) -> None:
    """Compare the tokenizer's ids with the rows of the embedding.

    Args:
        where: what the message begins with.
        model: the model, its tensors on any device, `meta` included.
        tokenizer: the one that its texts are read with.
        used: ids that every text will have. With it, special tokens that stand beside the vocabulary (an image's, say,
            in a model of text alone) may lie beyond: rows that have one are dropped.

    Raises:
        InputError: there are ids beyond it.
    """
    rows, vocabulary = embedding_rows(model), set(tokenizer.get_vocab().values())
    beside = set() if used is None else set(getattr(tokenizer, "added_tokens_decoder", {})) - set(used)
    beyond = [token for token in vocabulary - beside if token >= rows]
    if beyond:
        raise InputError(
            f"{where}: the embedding has {rows} rows, and {len(beyond)} ids of the tokenizer, up to {max(beyond)}, lie "
            "beyond; give the tokenizer that the model was trained with, or a model whose embedding was resized"
        )


def special_ids(config: PretrainedConfig) -> set[int]:
    """Token ids that a configuration gives a meaning to, in all its parts."""

    def found(part: Mapping[object, object]) -> Iterator[int]:
        for name, value in part.items():
            if isinstance(value, Mapping):
                yield from found(value)
            elif SPECIAL_ID.search(str(name)):
                yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))

    return set(found(config.to_dict()))


def _position_tables(model: PreTrainedModel) -> list[int]:
    """Rows of the tables of positions, learnt or computed once, that a forward looks positions up in."""
    from torch import nn

    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - before)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in POSITION_TABLES and buffer.dim() == 2:
            limits.append(buffer.shape[0])
    return limits


def positions_of(model: PreTrainedModel) -> int | None:
    """Most tokens that a model has positions for; None where its configuration sets no limit.

    RoBERTa and its kin count positions from behind the padding's, so that their table holds a few more.
    """
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [named] if isinstance(named, int) and named > 0 else []
    return min([*limits, *_position_tables(model)], default=None)


def learned_positions(model: PreTrainedModel) -> int | None:
    """Most tokens whose positions a model can look up; None where it computes them, however many there are."""
    return positions_of(model) if _position_tables(model) else None


def check_length(where: str, model: PreTrainedModel, setting: str, tokens: int) -> None:
    """Compare the longest text that a setting admits with what a model reads.

    Raises:
        InputError: its positions do not reach so far, or what it makes of a text depends on longer ones beside it.
    """
    most, why = learned_positions(model), "has positions for"
    if most is None:
        most, why = _same_frequencies(model.config.get_text_config()), "reads texts as if each stood alone up to"
    if most is not None and tokens > most:
        raise InputError(f"{setting} = {tokens}: {where} {why} {most} tokens; set it to {most} or less")


def _same_frequencies(config: PretrainedConfig) -> int | None:
    """Tokens up to which rotary embeddings are the same for all texts; None where they always are."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [one for one in (scaling, *scaling.values()) if isinstance(one, Mapping)]
    if not any(kind.get("rope_type", kind.get("type")) in BY_LENGTH for kind in kinds):
        return None

    named = [kind.get("original_max_position_embeddings") for kind in kinds]
    named += [getattr(config, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    return next((one for one in named if isinstance(one, int)), None)
