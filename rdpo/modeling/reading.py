"""By which attention a model of transformers reads rows: packed ones, or padded ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from rdpo.modeling.weights import ModelRef


def cap_settings(model: ModelRef) -> dict[str, Any]:
    """A mark, where a model caps its attention: earlier versions read classifiers without the cap."""
    return {"attention": "capped"} if caps_attention(model.config()) else {}


def caps_attention(config: PretrainedConfig) -> bool:
    """Whether an architecture bounds its attention scores, which transformers' sdpa leaves out without a word."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def read_packed(model: PreTrainedModel) -> None:
    """Let a model read packed rows."""
    from rdpo.modeling import attention

    attention.register()
    model.set_attn_implementation(attention.NAME)


def read_padded(model: PreTrainedModel, usual: str | None = None) -> None:
    """Let a model read padded rows, or one sequence alone.

    Args:
        model: the model.
        usual: the attention that it has by default, where it may have another one now.
    """
    from rdpo.modeling import attention

    if caps_attention(model.config):
        model.set_attn_implementation("eager")
    elif usual and model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation(usual)
