"""The policy: a causal language model whose forward gives completion log-probs, never all logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdpo.config import Layout, Lora
from rdpo.errors import InputError
from rdpo.modeling import attention
from rdpo.modeling.layout import Batch, Tokens, packed_batch, padded_batch
from rdpo.modeling.logprobs import CompletionHead, sum_by_sequence


@dataclass(frozen=True)
class ForwardSettings:
    """How a model's weights are held and read."""

    dtype: str
    """Precision, by torch's name for it."""
    chunk: int
    """Completion tokens whose logits are made at once."""
    layout: Layout = "auto"
    quantization: str = "none"
    """`nf4`: weights in four bits, computed with in `dtype`."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Tuning:
    """What is added to a model so that it can be trained; nothing by default."""

    lora: Lora | None = None
    """A fresh adapter, over weights that are frozen; without one, all weights are trained."""
    gradient_checkpointing: bool = False
    seed: int = 0
    """Of the adapter's first weights."""


class Policy(nn.Module):
    """A causal language model, with or without a LoRA adapter, as a function from batches to log-probs.

    `packed` says in which layout it reads: every prompt once, without padding, or padded rows.
    """

    def __init__(self, model: Any, chunk: int, packed: bool):
        super().__init__()
        self.model, self.packed = model, packed
        softcap = getattr(self.config, "final_logit_softcapping", None)
        output = self._causal().get_output_embeddings()
        self.head = CompletionHead(output, chunk, _logit_scale(self.config), softcap)

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return self._causal().config.get_text_config()

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained over frozen weights."""
        return hasattr(self.model, "peft_config")

    def _causal(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def layer_types(self) -> list[type]:
        """Classes of the architecture's decoder layers."""
        names = set(self._causal()._no_split_modules or ())
        return list({type(module) for module in self.modules() if type(module).__name__ in names})

    def batch(self, prompts: Sequence[Tokens], *answers: Sequence[Tokens]) -> Batch:
        """P prompts with K answers each in the layout that the policy reads."""
        return (packed_batch if self.packed else padded_batch)(prompts, answers)

    def forward(self, batch: Batch) -> Tensor:
        """Summed completion log-probs (S,) in fp32."""
        return sum_by_sequence(self.token_logps(batch), batch.sequence, len(batch.lengths))

    def token_logps(self, batch: Batch) -> Tensor:
        """Log-probs (C,) in fp32 of every completion token."""
        if batch.spans:
            layout: dict[str, Any] = {"position_ids": batch.position_ids, "spans": batch.spans}
        else:
            layout = {"attention_mask": batch.attention_mask}
        output = self._causal().base_model(input_ids=batch.input_ids, use_cache=False, **layout)
        hidden = output.last_hidden_state
        states = hidden.reshape(-1, hidden.shape[-1])[batch.predict_at]
        logps: Tensor = self.head(states, batch.labels)
        return logps

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within this context a LoRA policy is its own reference: the adapter is switched off."""
        with self.model.disable_adapter():
            yield


def _logit_scale(config: Any) -> float:
    """What an architecture multiplies its logits with (Cohere), or divides them by (Granite)."""
    if divisor := getattr(config, "logits_scaling", None):
        return 1.0 / float(divisor)
    return float(getattr(config, "logit_scale", None) or 1.0)


def load_policy(folder: str | Path, settings: ForwardSettings, tuning: Tuning | None = None) -> Policy:
    """Load a policy; a fresh adapter leaves it equal to the base model.

    Raises:
        InputError: the layout is "packed" and the architecture cannot read it, or `quantization` is asked for
            and bitsandbytes is not installed.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, settings.dtype),
        use_safetensors=True,
        trust_remote_code=settings.trust_remote_code,
        quantization_config=_four_bits(settings.dtype) if settings.quantization == "nf4" else None,
    )
    return as_policy(model, settings, tuning)


def as_policy(model: Any, settings: ForwardSettings, tuning: Tuning | None = None) -> Policy:
    """A causal language model of transformers as a policy, see `load_policy`."""
    packed = _choose_layout(model, settings.layout)
    tuning = tuning or Tuning()
    if tuning.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = _with_adapter(model, tuning.lora, tuning.seed) if tuning.lora else model
    return Policy(adapted, settings.chunk, packed)


def _four_bits(dtype: str) -> Any:
    """NF4 with doubly quantised scales, as in QLoRA (arXiv 2305.14314)."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise InputError('student.quantization: nf4 needs bitsandbytes; pip install "rdpo[qlora]"')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _choose_layout(model: Any, layout: Layout) -> bool:
    possible = attention.can_pack(model)
    if layout == "packed" and not possible:
        raise InputError(f"training.layout: {type(model).__name__} cannot read packed rows; use auto or padded")
    packed = possible and layout != "padded"
    if packed:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    elif getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # transformers' sdpa leaves the cap out without a word (Gemma 2).
        model.set_attn_implementation("eager")
    return packed


def _with_adapter(model: Any, lora: Lora, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    # Else the first layer's input has no gradient, and ZeRO-3 takes its backward for done before it began.
    model.enable_input_require_grads()
    # Adapters in the model's own precision, for their products run on large activations; the optimizer keeps fp32
    # copies of them. peft by itself would make them float32, and cast every activation there and back.
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
