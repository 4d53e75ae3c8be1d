"""Small random models of all causal architectures that transformers has, their configurations cut down by name."""

import inspect
import os

VOCABULARY, LARGEST = 96, 10_000_000

SMALL = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "dim_model"), 32
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "dff", "dim_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "feed_forward_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "attention_num_kv_heads"), 1),
    **dict.fromkeys(("head_dim", "dim_head", "attention_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token"), 2),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 4),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "d_state"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"n_group": 1, "topk_group": 1, "hidden_size_per_layer_input": 8, "lru_width": 32, "hidden_act": "silu"},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_num_heads": 4},
    **{"mamba_d_ssm": 64, "mamba_head_dim": 16, "n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "initializer_range": 0.2, "rotary_dim": 8},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "is_decoder": True, "expand": 2, "conv_kernel": 4},
}
OWN = {
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.25},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "num_hidden_layers": 3},
    "cohere": {"logit_scale": 0.5},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
}
"""What an architecture needs to be small, or what makes its logits something else than a product, so that it shows."""


VARIANTS = (
    {},
    {"num_key_value_heads": 2},
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    {"hidden_act": None, "mamba_d_ssm": 64},
    {"num_hidden_layers": 6, "num_key_value_heads": 2},
    {"num_key_value_heads": None},
    {"layer_types": ["sliding_attention", "full_attention"]},
    {"head_dim": None, "num_key_value_heads": 2},
)
"""Changes to `SMALL` that one architecture or another needs; None leaves a setting out."""


def small_model(model_type):
    """A random model in evaluation mode that reads three tokens, its weights large enough for logits that differ."""
    import torch

    fault = None
    for variant in VARIANTS:
        try:
            model = _built(model_type, variant)
            for attention in ("eager", model.config._attn_implementation):
                model.set_attn_implementation(attention)
                with torch.no_grad():
                    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
            return model
        except Exception as error:
            # A configuration may refuse by any error.
            fault = fault or error
    raise ValueError(f"{type(fault).__name__}: {' '.join(str(fault).split())[:100]}")


def _built(model_type, variant):
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[model_type]
    wanted = {**SMALL, **variant, **OWN.get(model_type, {})}
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    config = kind(**{name: value for name, value in wanted.items() if name in known and value is not None})
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError("its parts cannot be made small")
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def settled(model_type):
    """A small model as a policy, and how its probe has it read, by words where it is refused."""
    from rdpo.errors import InputError
    from rdpo.modeling.model import ForwardSettings, as_policy
    from rdpo.modeling.probe import settle_layout

    model = small_model(model_type)
    try:
        policy = as_policy(model, ForwardSettings("float32", 8)).eval()
        return model, policy, settle_layout(policy, model_type)
    except InputError as error:
        return model, None, str(error)


def causal_types():
    """The model types with a causal language model, or those that the environment names."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = os.environ.get("RDPO_ARCHITECTURES", "")
    return named.split(",") if named else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
