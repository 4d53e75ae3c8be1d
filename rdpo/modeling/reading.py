"""By which attention a model of transformers reads rows: packed ones, or padded ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.modeling import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_packed(model: PreTrainedModel) -> None:
    """Let a model read packed rows."""
    attention.register()
    model.set_attn_implementation(attention.NAME)


def read_padded(model: PreTrainedModel, usual: str | None = None) -> None:
    """Let a model read padded rows, or one sequence alone.

    Args:
        model: the model.
        usual: the attention that it has by default, where it may have another one now.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # transformers' sdpa leaves the cap out without a word (Gemma 2).
        model.set_attn_implementation("eager")
    elif usual and model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation(usual)
