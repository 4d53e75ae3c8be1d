"""The policy: a causal language model whose forward gives completion log-probs, never all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdpo.config import Lora
from rdpo.policy.logprobs import sum_by_sequence, token_logps
from rdpo.policy.packing import Batch


class Policy(nn.Module):
    """A causal language model, with or without a LoRA adapter, as a function from batches to log-probs."""

    def __init__(self, model: Any, chunk: int):
        super().__init__()
        self.model = model
        self.chunk = chunk

    def _causal(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: Batch) -> Tensor:
        """Summed completion log-probs (S,) in fp32."""
        return sum_by_sequence(self.token_logps(batch), batch.sequence, len(batch.lengths))

    def token_logps(self, batch: Batch) -> Tensor:
        """Log-probs (C,) in fp32 of every completion token."""
        causal = self._causal()
        output = causal.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        hidden = output.last_hidden_state
        states = hidden.reshape(-1, hidden.shape[-1])[batch.predict_at]
        softcap = getattr(causal.config, "final_logit_softcapping", None)
        return token_logps(states, batch.labels, causal.get_output_embeddings(), self.chunk, softcap)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within this context a LoRA policy is its own reference: the adapter is switched off."""
        with self.model.disable_adapter():
            yield


def load_policy(
    folder: str | Path,
    dtype: str,
    chunk: int,
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Policy:
    """Load a policy; with `lora`, frozen and with a fresh adapter (its start equals the base model)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(_with_adapter(model, lora, seed) if lora else model, chunk)


def _with_adapter(model: Any, lora: Lora, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
