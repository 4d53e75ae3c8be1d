"""A small random model of a student's architecture: what an architecture makes of rows and logits, tried before work.

The probe of `rdpo.modeling.probe` needs weights, which for a large model are in place only where the reference is read,
long after the teacher has been paid. What it finds depends on the code of the architecture and on the factors, caps,
windows and kinds of layers in its configuration, hardly on sizes. So the same classes are built with the student's own
configuration, in which only sizes are smaller. A miniature can refuse a model, never admit one: the model itself is
looked at again when its weights are there.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from rdpo.errors import InputError
from rdpo.modeling.loading import SPECIAL_ID, architecture_outline

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from rdpo.modeling.model import ForwardSettings, Policy
    from rdpo.modeling.probe import ReadAs

WIDTHS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "attention_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token"), 2),
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"n_group": 1, "topk_group": 1, "hidden_size_per_layer_input": 8, "rotary_dim": 8, "dim_model": 32},
}
"""Sizes that are set, where a configuration has a larger one."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers", "num_blocks")
FEWEST, MOST = 2, 8
"""Layers: as many as it takes to have one of each kind."""
SPREAD = 0.2
"""Of the random weights: so large that answers differ and attention counts."""
VOCABULARIES = ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input")
VOCABULARY = 512
LARGEST = 10_000_000
"""Parameters."""
SEED = 0
TILE, EXACT = 5, 1e-4
"""Tokens of a tile, which texts are longer than; nats by which log-probs may differ between tiles and none."""


def check_miniature(
    where: str, config: PretrainedConfig, settings: ForwardSettings, tiled: bool = False
) -> ReadAs | None:
    """Try the architecture of a configuration on a small random model; None if it cannot be built small.

    Args:
        where: what a message begins with.
        config: the student's.
        settings: how it is read; its precision is not: this is in fp32.
        tiled: its MLPs are to read rows in tiles.

    Raises:
        InputError: no layout gives the log-probs of the model's own logits, or not the one that is asked for, or tiles
            change them.
    """
    import torch

    from rdpo.modeling.model import as_policy
    from rdpo.modeling.probe import own_logps, probe_texts, settle_layout

    # Sizes that do not fit together, or what is only there for GPUs, say nothing of the model.
    try:
        model = _miniature(where, config, settings.trust_remote_code)
        if model is None:
            return None
        for plain in (True, False):
            if not torch.isfinite(own_logps(model, probe_texts(model), plain)).all():
                return None
    except Exception:
        return None

    tried = f"{where} (tried on a small random model)"
    policy = as_policy(model, settings).eval()
    found = settle_layout(policy, tried, settings.layout)
    if tiled:
        _check_tiles(policy, tried)
    return found


def _check_tiles(policy: Policy, where: str) -> None:
    """Raise if the log-probs are others once MLPs read a few tokens at a time; from then on they do."""
    from rdpo.modeling.probe import policy_logps, probe_texts
    from rdpo.modeling.tiling import SETTING, tile_mlps

    texts = probe_texts(policy.causal)
    whole = policy_logps(policy, texts)
    tile_mlps(policy.layers(), TILE)
    difference = float((policy_logps(policy, texts) - whole).abs().max())
    # Not `>`: a difference that is not a number is refused too.
    if not difference <= EXACT:
        raise InputError(f"{SETTING}: {where}: tiles change the log-probs by {difference:.2g} nats; remove it")


def _miniature(where: str, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel | None:
    """The model, in evaluation mode; None if it cannot be small."""
    import torch
    from transformers import AutoModelForCausalLM

    small = shrunk(config)
    outlined = architecture_outline(where, AutoModelForCausalLM, small, trust_remote_code)
    if sum(weight.numel() for weight in outlined.parameters()) > LARGEST:
        return None

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    return model.eval()


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with smaller sizes, those of its parts included; nothing else is another."""
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    _shrink(small)
    for part in getattr(small, "sub_configs", {}):
        if (inner := getattr(small, part, None)) is not None:
            _shrink(inner)
    return small


def _shrink(config: PretrainedConfig) -> None:
    heads = next((value for name in ("num_attention_heads", "n_head") if (value := _size(config, name))), None)
    for name in KEY_HEADS:
        value = _size(config, name)
        if value is not None:
            setattr(config, name, WIDTHS["num_attention_heads"] if value == heads else 1)
    for name, width in WIDTHS.items():
        value = _size(config, name)
        if value is not None and value > width:
            setattr(config, name, width)

    _shrink_vocabulary(config)
    kinds = getattr(config, "layer_types", None)
    layers = _layers_of_each(kinds) if isinstance(kinds, list) else FEWEST
    for name in LAYERS:
        value = _size(config, name)
        if value is not None and value > layers:
            setattr(config, name, layers)
    if isinstance(kinds, list):
        config.layer_types = kinds[:layers]
    if hasattr(config, "initializer_range"):
        config.initializer_range = SPREAD


def _shrink_vocabulary(config: PretrainedConfig) -> None:
    """Fewer tokens; special ones that lie beyond become the last."""
    for name in VOCABULARIES:
        rows = _size(config, name)
        if rows is not None and rows > VOCABULARY:
            setattr(config, name, VOCABULARY)

    last = VOCABULARY - 1
    for name, value in config.to_dict().items():
        if SPECIAL_ID.search(name) and type(value) is int:
            setattr(config, name, min(value, last))
        elif SPECIAL_ID.search(name) and isinstance(value, list):
            setattr(config, name, [last if type(one) is int and one > last else one for one in value])


def _layers_of_each(kinds: list[str]) -> int:
    """How many layers from the first on hold one of each kind."""
    return min(max(FEWEST, *(kinds.index(kind) + 1 for kind in set(kinds))), MOST)


def _size(config: PretrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if type(value) is int else None
